"""Grounded question answering: the letter, and the spans of the video that show it is right."""

from __future__ import annotations

from collections.abc import Sequence

from vcr1_fast.rewards import interval_set_iop, interval_set_iou, strict
from vcr1_fast.rewards.strict import GroundedAnswer
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics
from vcr1_fast.tasks.multiple_choice import FIELDS, NEEDS, blind_letters
from vcr1_fast.tasks.record import (
    Record,
    check_keys,
    check_letter,
    check_prompt,
    check_spans,
    check_video,
)
from vcr1_fast.tasks.spans import constant_spans
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import spans_text


def check(record: Record) -> None:
    """A video; `prompt["question"]`; 2 to 26 `options`; `answer` {"answer": letter, "glue":
    [[start, end], ...]}, seconds."""
    check_video(record)
    check_prompt(record, "question")
    answer = record.answer
    check_keys("answer", answer, {"answer": "letter", "glue": "spans"})
    check_letter("answer.answer", answer["answer"], record.options)
    check_spans("answer.glue", answer["glue"], empty=True)


def target(record: Record) -> str:
    spans = spans_text(record.answer["glue"])
    return f"<answer>{record.answer['answer']}</answer><glue>{spans}</glue>"


def parse(completion: str, record: Record | None = None) -> GroundedAnswer | None:
    return strict.read_grounded(completion, record.options if record else ())


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around a readable letter and readable spans, else 0."""
    return strict.grounded_format(completion, record.options, think)


def accuracy_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the right letter, else 0."""
    return strict.letter_accuracy(completion, record.answer["answer"], record.options)


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """IoU of the unions of the evidence given and the evidence annotated, clipped to the clip."""
    return strict.evidence_iou(completion, record.answer["glue"], duration)


def metrics(prediction: GroundedAnswer | None, record: Record) -> Metrics:
    """Letter accuracy, IoU and IoP (intersection over prediction) of the evidence with their rates
    at 0.3 and 0.5, and Acc@GQA: right letter with IoP of at least 0.5."""
    letter = prediction.letter if prediction else None
    spans = (prediction.spans if prediction else None) or ()
    right = letter == record.answer["answer"]
    iou = interval_set_iou(spans, record.answer["glue"])
    iop = interval_set_iop(spans, record.answer["glue"])
    out = {
        "accuracy": float(right),
        "mIoU": iou,
        "mIoP": iop,
        "Acc@GQA": float(right and iop >= 0.5),
    }
    for level in (0.3, 0.5):
        out |= {f"IoU@{level}": float(iou >= level), f"IoP@{level}": float(iop >= level)}
    return out


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """Every blind letter with every blind span."""
    letters = blind_letters(train, test, lambda record: record.answer["answer"])
    spans = constant_spans(train, test, lambda record: record.answer["glue"])
    out = {}
    for letter_name, chosen in letters.items():
        for span_name, given in spans.items():
            answers = [GroundedAnswer(c, (s,)) for c, s in zip(chosen, given, strict=True)]
            out[f"{letter_name}, {span_name}"] = mean_metrics(map(metrics, answers, test))
    return out


TASK = Task(
    name="grounded_qa",
    check=check,
    wording=ask(
        "{question} {options}",
        "with the letter and when it can be seen, in seconds, "
        "like <answer>B</answer><glue>[(1.0, 4.5)]</glue>",
    ),
    fields=FIELDS,
    needs=NEEDS,
    tags=("answer", "glue"),
    target=target,
    parse=parse,
    rewards={"format": format_reward, "accuracy": accuracy_reward, "iou": iou_reward},
    metrics=metrics,
    primary="accuracy",
    blind=blind,
    spans=lambda record: record.answer["glue"],
    label=lambda record: record.answer["answer"],
)
