"""Tasks whose answer is one thing in `<answer>`, scored by how near it is to the annotated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vcr1_fast.rewards import last_block, well_formed
from vcr1_fast.tasks.base import Metrics, Task, ask, mean_metrics

if TYPE_CHECKING:
    from vcr1_fast.data.records import Record


@dataclass(frozen=True)
class Single:
    """What such a task is made of.

    field: the prompt field that holds the question. how: the answer asked for, with its tags.
    read(text): the answer in a block's text, None if there is none. show(answer): the text of an
    annotated answer. nearness(prediction, answer): 0 to 1, reward and metric at once, called
    `measure`. typical(answers): the one to guess without looking.
    """

    name: str
    field: str
    how: str
    measure: str
    read: Callable[[str], Any]
    show: Callable[[Any], str]
    nearness: Callable[[Any, Any], float]
    typical: Callable[[Sequence[Any]], Any]

    def prompt(self, record: Record, think: bool) -> str:
        return ask(record.prompt[self.field].strip(), think, self.how)

    def target(self, record: Record) -> str:
        return f"<answer>{self.show(record.answer)}</answer>"

    def parse(self, completion: str, record: Record | None = None) -> Any:
        answer = last_block(completion, "answer")
        return None if answer is None else self.read(answer)

    def format_reward(
        self,
        completion: str,
        record: Record,
        duration: float | None = None,
        *,
        think: bool = False,
    ) -> float:
        """1 for the tags asked for around a readable answer, else 0."""
        tags = ("think", "answer") if think else ("answer",)
        return float(self.parse(completion) is not None and well_formed(completion, tags))

    def nearness_reward(
        self,
        completion: str,
        record: Record,
        duration: float | None = None,
        *,
        think: bool = False,
    ) -> float:
        prediction = self.parse(completion)
        return 0.0 if prediction is None else self.nearness(prediction, record.answer)

    def metrics(self, prediction: Any, record: Record) -> Metrics:
        value = 0.0 if prediction is None else self.nearness(prediction, record.answer)
        return {self.measure: value}

    def blind(self, train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
        guess = self.typical([record.answer for record in train]) if train else None
        return {"typical answer": mean_metrics(self.metrics(guess, record) for record in test)}

    def task(self) -> Task:
        return Task(
            name=self.name,
            prompt=self.prompt,
            target=self.target,
            parse=self.parse,
            rewards={"format": self.format_reward, self.measure: self.nearness_reward},
            metrics=self.metrics,
            primary=self.measure,
            blind=self.blind,
        )


def most_common(answers: Sequence[Any]) -> Any:
    """The answer that stands most often, of several the one that sorts first."""
    return min(answers, key=lambda answer: (-answers.count(answer), str(answer)))
