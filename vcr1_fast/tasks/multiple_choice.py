"""Multiple choice: a question about the video with lettered options. Answer: the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Protocol

from vcr1_fast.rewards import parse_letter
from vcr1_fast.tasks import blind
from vcr1_fast.tasks.base import Columns, Task, equal
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import Record, check_letter, check_prompt


def _lettered(record: Record) -> list[str]:
    return [
        f"({letter}) {option}"
        for letter, option in zip(ascii_uppercase, record.options, strict=False)
    ]


FIELDS = {
    "question": lambda record: record.prompt["question"].strip(),
    "options": lambda record: " ".join(_lettered(record)),
    "option_lines": lambda record: "\n".join(_lettered(record)),
    "option_list": lambda record: str(_lettered(record)),  # as VideoChat-R1 shows them
}
REQUIRED = (("question",), ("options", "option_lines", "option_list"))


def check(record: Record) -> None:
    """`prompt["question"]`; 2 to 26 `options`; `answer` the letter of one."""
    check_prompt(record, "question")
    check_letter("answer", record.answer, record.options)


def target(record: Record) -> str:
    return f"<answer>{record.answer}</answer>"


def read(blocks: Mapping[str, str], record: Record) -> str | None:
    return read_letter(blocks, record.options)


def read_letter(blocks: Mapping[str, str], options: Sequence[str]) -> str | None:
    """The letter in `<answer>`."""
    answer = blocks.get("answer")
    return None if answer is None else parse_letter(answer, options)


def accuracy_reward(
    predictions: Sequence[str | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """1 for the right letter, else 0."""
    return equal(predictions, [record.answer for record in records])


class Lettered(Protocol):
    """A prediction that holds more than its letter."""

    @property
    def letter(self) -> str | None: ...


def letter_reward(
    predictions: Sequence[Lettered | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """1 for the letter `record.answer["answer"]`, else 0."""
    letters = [answer.letter if answer else None for answer in predictions]
    return equal(letters, [record.answer["answer"] for record in records])


def metrics(predictions: Sequence[str | None], records: Sequence[Record]) -> Columns:
    """Accuracy."""
    return {"accuracy": accuracy_reward(predictions, records)}


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[str]]:
    """The most frequent letter, and the likeliest option."""
    return blind.letters(train, test, lambda record: record.answer)


TASK = Task(
    name="multiple_choice",
    check=check,
    prompt_template=ask("{question} {options}", "with the letter, like <answer>B</answer>"),
    fields=FIELDS,
    required_placeholders=REQUIRED,
    target=target,
    read=read,
    rewards={"accuracy": accuracy_reward},
    batch_metrics=metrics,
    primary="accuracy",
    blind_guesses=blind_guesses,
    example=Record(
        "example",
        "multiple_choice",
        "example.mp4",
        {"question": "What is seen?"},
        "B",
        options=("red circle", "blue square"),
    ),
    label=lambda record: record.answer,
)
