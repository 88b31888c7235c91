"""Tasks with one answer in `<answer>`, scored by its similarity to the annotated one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcr1_fast.rewards.format import scan
from vcr1_fast.tasks.base import Columns, Task
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import FieldError, Record, check_prompt, describe, is_text
from vcr1_fast.tasks.written import LEAST_OVERLAP

Similarity = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]
"""(predictions, answers) of a batch -> similarities from 0 to 1."""


@dataclass(frozen=True)
class SingleAnswer:
    """The parts of such a task.

    field: the prompt field that holds the question. answer_format: how to answer, with the tags.
    metric: name of the similarity, which is both reward and metric.
    read(text): the answer in a block's text, None if there is none. write(answer): the text of an
    annotated answer. similarity: of predictions, without None, and annotated answers.
    typical(answers): the answer to guess without the video. is_answer(answer): whether an
    annotation is an answer; `expected` says what it should be. example: an annotated answer.
    """

    name: str
    field: str
    answer_format: str
    metric: str
    read: Callable[[str], Any | None]
    write: Callable[[Any], str]
    similarity: Similarity
    typical: Callable[[Sequence[Any]], Any]
    example: Any
    is_answer: Callable[[Any], bool] = is_text
    expected: str = "a text"

    def check(self, record: Record) -> None:
        """FieldError unless there is a question and an answer of the kind expected."""
        check_prompt(record, self.field)
        if not self.is_answer(record.answer):
            reason = f"expected {self.expected}, got {describe(record.answer)}"
            raise FieldError("answer", reason)
        # Symbols that no reward compares, or tags in the text: no completion could be right.
        read = self.read_blocks(scan(self.target(record), ("answer",)).blocks, record)
        if read is None or self.similarity([read], [record.answer])[0] < LEAST_OVERLAP:
            reason = f"no completion could earn the reward of {describe(record.answer)}"
            raise FieldError("answer", reason)

    def target(self, record: Record) -> str:
        return f"<answer>{self.write(record.answer)}</answer>"

    def read_blocks(self, blocks: Mapping[str, str], record: Record) -> Any | None:
        answer = blocks.get("answer")
        return None if answer is None else self.read(answer)

    def reward(
        self,
        predictions: Sequence[Any],
        records: Sequence[Record],
        durations: Sequence[float | None] = (),
    ) -> list[float]:
        """Similarity to the annotated answer, 0 without a prediction."""
        pairs = [(p, one.answer) for p, one in zip(predictions, records, strict=True)]
        read = [(p, answer) for p, answer in pairs if p is not None]
        values = iter(self.similarity([p for p, _ in read], [answer for _, answer in read]))
        return [0.0 if p is None else next(values) for p, _ in pairs]

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> Columns:
        return {self.metric: self.reward(predictions, records)}

    def blind_guesses(
        self, train: Sequence[Record], test: Sequence[Record]
    ) -> dict[str, Sequence[Any]]:
        guess = self.typical([record.answer for record in train]) if train else None
        return {"typical answer": [guess] * len(test)}

    def task(self) -> Task:
        return Task(
            name=self.name,
            check=self.check,
            prompt_template=ask(f"{{{self.field}}}", self.answer_format),
            fields={self.field: lambda record: record.prompt[self.field].strip()},
            required_placeholders=((self.field,),),
            target=self.target,
            read=self.read_blocks,
            rewards={self.metric: self.reward},
            batch_metrics=self.metrics,
            primary=self.metric,
            blind_guesses=self.blind_guesses,
            example=Record(
                "example", self.name, "example.mp4", {self.field: "What is seen?"}, self.example
            ),
        )


def each(similarity: Callable[[Any, Any], float]) -> Similarity:
    """The similarity of a batch by a function of one prediction and one answer."""

    def similarities(predictions: Sequence[Any], answers: Sequence[Any]) -> list[float]:
        return list(map(similarity, predictions, answers))

    return similarities


def stripped(text: str) -> str | None:
    """The text without white space around it, None if nothing is left."""
    return text.strip() or None
