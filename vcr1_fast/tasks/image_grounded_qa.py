"""Image-grounded question answering (VideoChat-R1.5): the answer, and the box that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vcr1_fast.rewards import box_ious
from vcr1_fast.rewards.spatiotemporal import parse_box
from vcr1_fast.tasks import blind
from vcr1_fast.tasks.base import Columns, Task, at_least
from vcr1_fast.tasks.multiple_choice import FIELDS, REQUIRED, letter_reward, read_letter
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import (
    Record,
    check_box,
    check_keys,
    check_letter,
    check_prompt,
)
from vcr1_fast.tasks.written import box_text


@dataclass(frozen=True)
class BoxedAnswer:
    """A letter and its evidence [x0, y0, x1, y1], or one of the two."""

    letter: str | None
    box: tuple[float, ...] | None


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


def read(blocks: Mapping[str, str], record: Record) -> BoxedAnswer | None:
    letter, glue = read_letter(blocks, record.options), blocks.get("glue")
    box = None if glue is None else parse_box(glue)
    return None if letter is None and box is None else BoxedAnswer(letter, box)


def complete(answer: BoxedAnswer) -> bool:
    """Both a letter and a box."""
    return answer.letter is not None and answer.box is not None


def iou_reward(
    predictions: Sequence[BoxedAnswer | None],
    records: Sequence[Record],
    durations: Sequence[float | None] = (),
) -> list[float]:
    """IoU of the box in `<glue>` (R1.5 weighs it 0.2)."""
    boxes = [answer.box if answer else None for answer in predictions]
    return box_ious(boxes, [record.answer["glue"] for record in records])


def metrics(predictions: Sequence[BoxedAnswer | None], records: Sequence[Record]) -> Columns:
    """Letter accuracy, IoU of the evidence and its rate at 0.5, and both right at once."""
    accuracy, ious = letter_reward(predictions, records), iou_reward(predictions, records)
    shown = at_least(ious, 0.5)
    return {
        "accuracy": accuracy,
        "IoU": ious,
        "IoU@0.5": shown,
        "Acc@IoU0.5": [right * well for right, well in zip(accuracy, shown, strict=True)],
    }


def blind_guesses(train: Sequence[Record], test: Sequence[Record]) -> dict[str, list[BoxedAnswer]]:
    """Every blind letter, with the mean box of the training answers."""
    box = blind.mean_box(record.answer["glue"] for record in train)
    letters = blind.letters(train, test, lambda record: record.answer["answer"])
    return {
        f"{strategy}, mean box": [BoxedAnswer(letter, box) for letter in chosen]
        for strategy, chosen in letters.items()
    }


TASK = Task(
    name="image_grounded_qa",
    check=check,
    prompt_template=ask(
        "{question} {options}",
        "with the letter and the box [x0, y0, x1, y1] from 0 to 1 that shows it, "
        "like <answer>B</answer><glue>[0.10, 0.20, 0.30, 0.40]</glue>",
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
        "image_grounded_qa",
        None,
        {"question": "What is seen?"},
        {"answer": "B", "glue": [0.1, 0.2, 0.5, 0.6]},
        image="example.png",
        options=("red circle", "blue square"),
    ),
    label=lambda record: record.answer["answer"],
)
