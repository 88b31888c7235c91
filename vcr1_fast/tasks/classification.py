"""Classification: one label of a few, in words. Video quality (VidTAB) is asked like this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vcr1_fast.rewards import last_block, parse_label, strict
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics, tagged
from vcr1_fast.tasks.record import FieldError, Record, check_prompt, describe
from vcr1_fast.tasks.wording import ask

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


def parse(completion: str, record: Record | None = None) -> str | None:
    """The label as it stands in the record's options; None for a text that is none of them."""
    if record is None:
        return strict.read_label(completion)
    answer = last_block(completion, "answer")
    return None if answer is None else _label_of(answer, record)


def _label_of(text: str, record: Record) -> str | None:
    """The one label that the text is, letter for letter, or else as `parse_label` reads both."""
    for read in (lambda label: " ".join(label.split()), parse_label):
        said = read(text)
        found = [option for option in record.options if said and read(option) == said]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around one of the labels, else 0."""
    return float(parse(completion, record) is not None and tagged(completion, think, "answer"))


def accuracy_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the right label, else 0."""
    return float(parse(completion, record) == record.answer)


def metrics(prediction: str | None, record: Record) -> Metrics:
    return {"accuracy": float(prediction == record.answer)}


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """The label most often right in `train`."""
    counts = Counter(record.answer for record in train)
    frequent = min(counts, key=lambda label: (-counts[label], label)) if counts else None
    return {"most frequent label": mean_metrics(metrics(frequent, record) for record in test)}


TASK = Task(
    name="classification",
    check=check,
    wording=ask(
        "{question} Choose one of these labels: {labels}.",
        "with the label, like <answer>{label}</answer>",
    ),
    fields=FIELDS,
    needs=(("question",),),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "accuracy": accuracy_reward},
    metrics=metrics,
    primary="accuracy",
    blind=blind,
    label=lambda record: record.answer,
)
