"""Tasks whose answer is one thing in `<answer>`, scored by how near it is to the annotated one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vcr1_fast.rewards import last_block
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics, tagged
from vcr1_fast.tasks.record import FieldError, Record, check_prompt, describe, is_text
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import LEAST_OVERLAP


@dataclass(frozen=True)
class Single:
    """What such a task is made of.

    field: the prompt field that holds the question. how: the answer asked for, with its tags.
    fits(answer): whether an annotated answer is one, `expected` saying what it should be.
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
    fits: Callable[[Any], bool] = is_text
    expected: str = "a text"

    def check(self, record: Record) -> None:
        check_prompt(record, self.field)
        if not self.fits(record.answer):
            reason = f"expected {self.expected}, got {describe(record.answer)}"
            raise FieldError("answer", reason)
        # Symbols that no reward compares, or tags in the text: no completion could be right.
        read = self.parse(self.target(record))
        if read is None or self.nearness(read, record.answer) < LEAST_OVERLAP:
            reason = f"no completion could earn the reward of {describe(record.answer)}"
            raise FieldError("answer", reason)

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
        return float(self.parse(completion) is not None and tagged(completion, think, "answer"))

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
            check=self.check,
            wording=ask(f"{{{self.field}}}", self.how),
            fields={self.field: lambda record: record.prompt[self.field].strip()},
            needs=((self.field,),),
            target=self.target,
            parse=self.parse,
            rewards={"format": self.format_reward, self.measure: self.nearness_reward},
            metrics=self.metrics,
            primary=self.measure,
            blind=self.blind,
        )


def most_common(answers: Sequence[Any]) -> Any:
    """The answer that stands most often, of several the one that sorts first."""
    counts = Counter(answers)
    return min(answers, key=lambda answer: (-counts[answer], str(answer)))
