"""Grounded question answering: the letter, and the spans of the video that show it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vcr1_fast.rewards import parse_spans, span_set_iops, span_set_ious
from vcr1_fast.tasks import blind
from vcr1_fast.tasks.base import Columns, Task, at_least
from vcr1_fast.tasks.multiple_choice import FIELDS, REQUIRED, letter_reward, read_letter
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import (
    Record,
    check_keys,
    check_letter,
    check_prompt,
    check_spans,
    check_video,
)
from vcr1_fast.tasks.written import spans_text


@dataclass(frozen=True)
class GroundedAnswer:
    """A letter, its evidence in seconds, or one of the two where the other cannot be read."""

    letter: str | None
    spans: tuple[tuple[float, float], ...] | None


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


def read(blocks: Mapping[str, str], record: Record) -> GroundedAnswer | None:
    letter, glue = read_letter(blocks, record.options), blocks.get("glue")
    spans = None if glue is None else parse_spans(glue)
    return None if letter is None and spans is None else GroundedAnswer(letter, spans)


def complete(answer: GroundedAnswer) -> bool:
    """Both a letter and spans."""
    return bool(answer.letter and answer.spans)


def iou_reward(
    predictions: Sequence[GroundedAnswer | None],
    records: Sequence[Record],
    durations: Sequence[float | None],
) -> list[float]:
    """IoU of the unions of the predicted and annotated evidence, clipped to the clip."""
    return span_set_ious(_spans(predictions), _evidence(records), durations)


def metrics(predictions: Sequence[GroundedAnswer | None], records: Sequence[Record]) -> Columns:
    """Letter accuracy, IoU and IoP (intersection over prediction) of the evidence with their rates
    at 0.3 and 0.5, and Acc@GQA: right letter with IoP of at least 0.5."""
    accuracy = letter_reward(predictions, records)
    ious = span_set_ious(_spans(predictions), _evidence(records))
    iops = span_set_iops(_spans(predictions), _evidence(records))
    grounded = at_least(iops, 0.5)
    columns = {
        "accuracy": accuracy,
        "mIoU": ious,
        "mIoP": iops,
        "Acc@GQA": [right * well for right, well in zip(accuracy, grounded, strict=True)],
    }
    for level in (0.3, 0.5):
        columns |= {f"IoU@{level}": at_least(ious, level), f"IoP@{level}": at_least(iops, level)}
    return columns


def _spans(
    predictions: Sequence[GroundedAnswer | None],
) -> list[tuple[tuple[float, float], ...] | None]:
    return [answer.spans if answer else None for answer in predictions]


def _evidence(records: Sequence[Record]) -> list[Sequence[Sequence[float]]]:
    return [record.answer["glue"] for record in records]


def blind_guesses(
    train: Sequence[Record], test: Sequence[Record]
) -> dict[str, list[GroundedAnswer]]:
    """Every blind letter with every constant span."""
    letters = blind.letters(train, test, lambda record: record.answer["answer"])
    spans = blind.constant_spans(train, test, lambda record: record.answer["glue"])
    return {
        f"{letter_strategy}, {span_strategy}": [
            GroundedAnswer(letter, (span,)) for letter, span in zip(chosen, given, strict=True)
        ]
        for letter_strategy, chosen in letters.items()
        for span_strategy, given in spans.items()
    }


TASK = Task(
    name="grounded_qa",
    check=check,
    prompt_template=ask(
        "{question} {options}",
        "with the letter and when it can be seen, in seconds, "
        "like <answer>B</answer><glue>[(1.0, 4.5)]</glue>",
    ),
    fields=FIELDS,
    required_placeholders=REQUIRED,
    tags=("answer", "glue"),
    target=target,
    read=read,
    complete=complete,
    rewards={"accuracy": letter_reward, "iou": iou_reward},
    batch_metrics=metrics,
    primary="accuracy",
    blind_guesses=blind_guesses,
    example=Record(
        "example",
        "grounded_qa",
        "example.mp4",
        {"question": "What is seen?"},
        {"answer": "B", "glue": [[1.0, 4.5]]},
        options=("red circle", "blue square"),
    ),
    spans=lambda record: record.answer["glue"],
    label=lambda record: record.answer["answer"],
)
