"""Classification: one of a few labels, in words. Video quality (VidTAB) is asked like this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.rewards import parse_label
from vcr1_fast.tasks.base import Columns, Task, equal
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import FieldError, Record, check_prompt, describe

FIELDS = {
    "question": lambda record: record.prompt["question"].strip(),
    "labels": lambda record: ", ".join(record.options),
    "label": lambda record: record.options[0],  # to show the form of an answer
}


def check(record: Record) -> None:
    """`prompt["question"]`; `answer` one of at least two labels in `options`."""
    check_prompt(record, "question")
    if len(set(record.options)) < 2:
        raise FieldError("options", f"expected at least 2 labels, got {list(record.options)}")
    if record.answer not in record.options:
        reason = f"{describe(record.answer)} is none of {list(record.options)}"
        raise FieldError("answer", reason)


def target(record: Record) -> str:
    return f"<answer>{record.answer}</answer>"


def read(blocks: Mapping[str, str], record: Record) -> str | None:
    """The label as the record's options write it; None for a text that is none of them. Every
    label is an answer where the record has no options."""
    answer = blocks.get("answer")
    label = None if answer is None else parse_label(answer)
    if label is None or not record.options:
        return label
    return {parse_label(option): option for option in record.options}.get(label)


def accuracy_reward(
    predictions: Sequence[str | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """1 for the right label, else 0, whatever its case, markup, quotes and final full stop."""
    return [
        float(label is not None and parse_label(label) == parse_label(record.answer))
        for label, record in zip(predictions, records, strict=True)
    ]


def metrics(predictions: Sequence[str | None], records: Sequence[Record]) -> Columns:
    """Accuracy."""
    return {"accuracy": equal(predictions, [record.answer for record in records])}


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[str | None]]:
    """The most frequent label."""
    frequent = most_common(record.answer for record in train) if train else None
    return {"most frequent label": [frequent] * len(test)}


TASK = Task(
    name="classification",
    check=check,
    prompt_template=ask(
        "{question} Choose one of these labels: {labels}.",
        "with the label, like <answer>{label}</answer>",
    ),
    fields=FIELDS,
    required_placeholders=(("question",),),
    target=target,
    read=read,
    rewards={"accuracy": accuracy_reward},
    metrics=metrics,
    primary="accuracy",
    blind_guesses=blind_guesses,
    example=Record(
        "example",
        "classification",
        "example.mp4",
        {"question": "How good is it?"},
        "low",
        options=("low", "high"),
    ),
    label=lambda record: record.answer,
)
