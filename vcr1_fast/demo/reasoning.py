"""Reasoning texts that the demo's checkpoints learn to write before an answer.

The text is derived from the answer: an imprecise answer has equally imprecise reasoning, and so
fine-tuning shows nothing that GRPO must find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from vcr1_fast.data.records import Record
from vcr1_fast.data.scenes import DIRECTIONS


def with_reasoning(records: Iterable[Record]) -> list[Record]:
    """The records with `metadata["reasoning"]`, which fine-tuning puts into the think tags."""
    return [
        dataclasses.replace(record, metadata={**record.metadata, "reasoning": reasoning(record)})
        for record in records
    ]


def reasoning(record: Record) -> str:
    """One sentence that leads to the record's answer. ValueError for a task without one."""
    answer = record.answer
    if record.task == "temporal_grounding":
        return f"It is there at {_timestep(answer)}."
    if record.task == "tracking":
        return f"It moves {direction(answer)}."
    if record.task == "grounded_qa":
        way = record.options["ABCD".index(answer["answer"])]
        return f"At {_timestep(answer['glue'][0])} it moves {way}."
    if record.task == "multiple_choice":
        return f"It moves {record.options['ABCD'.index(answer)]}."
    if record.task == "classification":
        return f"The shape that moves is {answer}."
    if record.task == "caption":
        return f"There are {len(answer)} events."
    raise ValueError(f"no reasoning for answers of task {record.task!r}")


def direction(boxes: Sequence[Sequence[float]]) -> str:
    """Direction of a box's centre from the first to the last of (N, 4), along the longer axis."""
    (x0, y0), (x1, y1) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (boxes[0], boxes[-1]))
    dx, dy = x1 - x0, y1 - y0
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * dx + DIRECTIONS[name][1] * dy)


def _timestep(span: Sequence[float]) -> str:
    return f"<timestep>{span[0]:.1f} to {span[1]:.1f}</timestep>"
