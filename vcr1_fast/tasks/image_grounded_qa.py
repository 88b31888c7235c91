"""Image-grounded question answering (VideoChat-R1.5): the answer, and the box that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vcr1_fast.rewards import box_iou, last_block, strict
from vcr1_fast.rewards.spatiotemporal import parse_box
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics, tagged
from vcr1_fast.tasks.multiple_choice import FIELDS, NEEDS, blind_letters
from vcr1_fast.tasks.record import (
    Record,
    check_box,
    check_keys,
    check_letter,
    check_prompt,
)
from vcr1_fast.tasks.wording import ask
from vcr1_fast.tasks.written import box_text

Box = tuple[float, ...]


@dataclass(frozen=True)
class BoxedAnswer:
    """A letter and its evidence [x0, y0, x1, y1], or one of the two."""

    letter: str | None
    box: Box | None


def check(record: Record) -> None:
    """`prompt["question"]`; 2 to 26 `options`; `answer` {"answer": letter, "glue": [x0, y0, x1,
    y1]}, from 0 to 1."""
    check_prompt(record, "question")
    answer = record.answer
    check_keys("answer", answer, {"answer": "letter", "glue": "box"})
    check_letter("answer.answer", answer["answer"], record.options)
    check_box("answer.glue", answer["glue"])


def target(record: Record) -> str:
    box = box_text(record.answer["glue"])
    return f"<answer>{record.answer['answer']}</answer><glue>{box}</glue>"


def parse(completion: str, record: Record | None = None) -> BoxedAnswer | None:
    letter = strict.read_letter(completion, record.options if record else ())
    glue = last_block(completion, "glue")
    box = None if glue is None else parse_box(glue)
    return None if letter is None and box is None else BoxedAnswer(letter, box)


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around a readable letter and a readable box, else 0."""
    answer = parse(completion, record)
    readable = answer is not None and answer.letter is not None and answer.box is not None
    return float(readable and tagged(completion, think, "answer", "glue"))


def accuracy_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the right letter, else 0."""
    return strict.letter_accuracy(completion, record.answer["answer"], record.options)


def iou_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """IoU of the box in `<glue>` (R1.5 weighs it 0.2)."""
    return _box_iou(parse(completion, record), record)


def metrics(prediction: BoxedAnswer | None, record: Record) -> Metrics:
    """Letter accuracy, IoU of the evidence and its rate at 0.5, and both right at once."""
    right = prediction is not None and prediction.letter == record.answer["answer"]
    iou = _box_iou(prediction, record)
    return {
        "accuracy": float(right),
        "IoU": iou,
        "IoU@0.5": float(iou >= 0.5),
        "Acc@IoU0.5": float(right and iou >= 0.5),
    }


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    """Every blind letter, with the mean box of the training answers."""
    boxes = [record.answer["glue"] for record in train]
    mean = tuple(sum(side) / len(boxes) for side in zip(*boxes, strict=True)) or None
    strategies = blind_letters(train, test, lambda record: record.answer["answer"])
    return {
        f"{name}, mean box": mean_metrics(
            metrics(BoxedAnswer(letter, mean), record)
            for letter, record in zip(letters, test, strict=True)
        )
        for name, letters in strategies.items()
    }


def _box_iou(prediction: BoxedAnswer | None, record: Record) -> float:
    if prediction is None or prediction.box is None:
        return 0.0
    return box_iou(prediction.box, record.answer["glue"])


TASK = Task(
    name="image_grounded_qa",
    check=check,
    wording=ask(
        "{question} {options}",
        "with the letter and the box [x0, y0, x1, y1] from 0 to 1 that shows it, "
        "like <answer>B</answer><glue>[0.10, 0.20, 0.30, 0.40]</glue>",
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
    label=lambda record: record.answer["answer"],
)
