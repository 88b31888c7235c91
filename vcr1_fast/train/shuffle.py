"""Clips with their frames out of order, for T-GRPO, without a second pass of the vision encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vcr1_fast.model.prompt import VIDEO
from vcr1_fast.model.vision import reorder_frames
from vcr1_fast.train.dataset import Sample


def shuffled_features(
    samples: Sequence[Sample],
    features: Sequence[Tensor | None],
    tasks: Sequence[str] | None,
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """By place in `samples`: features of the sample's clips with their temporal patches shuffled.

    Left out: tasks not in `tasks` (None: none of them), and samples without an order to lose,
    whose clips have one temporal patch or which show still images. No clip of more than one patch
    keeps its order.
    """
    found = {}
    for i, (sample, given) in enumerate(zip(samples, features, strict=True)):
        grids = sample.prompt.video_grid_thw
        clips = int((sample.prompt.mm_token_type_ids == VIDEO).sum())
        if given is None or len(given) != clips or not bool((grids[:, 0] > 1).any()):
            continue
        if tasks is None or sample.record.task in tasks:
            orders = [another_order(frames, generator) for frames in grids[:, 0].tolist()]
            found[i] = reorder_frames(given.detach(), grids, orders)
    return found


def another_order(count: int, generator: torch.Generator) -> list[int]:
    """A random order of 0 .. count - 1 that is not theirs, unless there is no other."""
    order = list(range(count))
    while count > 1 and order == list(range(count)):
        order = torch.randperm(count, generator=generator).tolist()
    return order
