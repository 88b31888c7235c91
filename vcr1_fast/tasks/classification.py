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
    for label in record.options:
        if _label_of(label, record) != label:
            reason = f"{describe(label)} reads like another label, or like none"
            raise FieldError("options", reason)


def target(record: Record) -> str:
    return f"<answer>{record.answer}</answer>"


def read(blocks: Mapping[str, str], record: Record) -> str | None:
    """The label as the record's options write it; None for a text that is none of them. Every
    label is an answer where the record has no options."""
    answer = blocks.get("answer")
    if answer is None:
        return None
    return _label_of(answer, record) if record.options else parse_label(answer)


def _label_of(text: str, record: Record) -> str | None:
    """The one option that the text is, letter for letter, or else as `parse_label` reads both."""
    for read_label in (lambda label: " ".join(label.split()), parse_label):
        said = read_label(text)
        found = [option for option in record.options if said and read_label(option) == said]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def accuracy_reward(
    predictions: Sequence[str | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """1 for the right label, else 0. Without options in the record, case, markup, quotes and final
    full stop make no difference."""
    return [
        float(label is not None and _same(label, record))
        for label, record in zip(predictions, records, strict=True)
    ]


def _same(label: str, record: Record) -> bool:
    if record.options:  # `read` has chosen one of them; two may read alike
        return bool(label == record.answer)
    return parse_label(label) == parse_label(record.answer)


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
    batch_metrics=metrics,
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
