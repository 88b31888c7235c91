"""What looking and answering cost, pass by pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vcr1_fast.evaluate.completions import Completion, Pass


@dataclass(frozen=True)
class PassCost:
    """Means over the records that had this pass: frames, tokens read and written, seconds."""

    number: int
    """1 for the first pass, and so on; 0 for all passes of a record together."""
    records: int
    frames: float
    prompt_tokens: float
    tokens: float
    seconds: float


def pass_costs(completions: Sequence[Completion]) -> list[PassCost]:
    """One per pass, and where some record had several, one for all of a record's passes.

    The task's own question, which is the last pass, counts under its own number: where evidence
    repeated early, records reach it at a lower number than others.
    """
    by_number: dict[int, list[Sequence[Pass]]] = defaultdict(list)
    for completion in completions:
        for number, one in enumerate(completion.passes, start=1):
            by_number[number].append((one,))
    if len(by_number) > 1:
        by_number[0] = [completion.passes for completion in completions if completion.passes]
    return [_mean(number, groups) for number, groups in by_number.items()]


def _mean(number: int, groups: Sequence[Sequence[Pass]]) -> PassCost:
    def mean(name: str) -> float:
        return fmean(sum(getattr(one, name) for one in group) for group in groups)

    return PassCost(
        number,
        len(groups),
        frames=mean("frames"),
        prompt_tokens=mean("prompt_tokens"),
        tokens=mean("tokens"),
        seconds=mean("seconds"),
    )
