"""Three-axis rotary positions (M-RoPE) of Qwen2.5-VL prompts.

Every token has a (time, height, width) position. Text counts up by one on all three axes together.
A video that starts at position s has, for the merged patch in row y and column x of temporal grid
t,

    time   = s + floor(t * second_per_grid * tokens_per_second)
    height = s + y
    width  = s + x

and, as the released checkpoints were trained (`mrope` "trained"), the text after it resumes at the
largest position so far, over all axes, plus one. (transformers from 5.3 on resumes at
s + max(rows, columns), so that text after a long clip falls among the clip's own times; `mrope`
"installed" follows whatever transformers is installed.) An image is a video of one grid at time s.

Source of the formula: section 2.1.2 of the Qwen2.5-VL report (multimodal rotary embedding aligned
to absolute time) and transformers 4.49 to 5.2; products are taken in float32 in that order, so that
grid times on an integer boundary fall on the same side.
"""

from dataclasses import dataclass
from itertools import pairwise
from types import MethodType, SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor

from vcr1_fast.model.processor import Mrope


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that mark vision input, and the two constants that scale its grid."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    merge_size: int = 2
    tokens_per_second: float = 2.0

    @classmethod
    def from_config(cls, config: Any) -> "SpecialIds":
        """Read them from a `Qwen2_5_VLConfig`."""
        return cls(
            image=config.image_token_id,
            video=config.video_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
            merge_size=config.vision_config.spatial_merge_size,
            tokens_per_second=config.vision_config.tokens_per_second,
        )


def mrope_positions(
    input_ids: Tensor,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    image_grid_thw: Tensor | None,
    ids: SpecialIds,
    *,
    mrope: Mrope = "trained",
) -> Tensor:
    """Positions of one prompt.

    Args:
        input_ids: (P,) int64, with every image and video pad token already expanded.
        video_grid_thw: (n, 3) patches along time, height and width of each video, in prompt order.
        second_per_grid_ts: (n,) seconds from one temporal grid to the next; None means one second.
        image_grid_thw: (m, 3), the same for images.
        ids: from the model's configuration.
        mrope: "trained" or "installed", see above.

    Returns:
        (3, P) int64 on the device of `input_ids`.

    Raises:
        ValueError: when the pad tokens and the grids do not match in number.
    """
    if mrope not in get_args(Mrope):
        raise ValueError(f"mrope must be one of {get_args(Mrope)}, got {mrope!r}")
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must be (P,), got shape {tuple(input_ids.shape)}")
    device = input_ids.device
    tokens = input_ids.cpu()
    kinds = token_types(tokens, ids)
    runs, grids, seconds = _vision_runs(
        kinds, video_grid_thw, second_per_grid_ts, image_grid_thw, ids
    )
    if mrope == "installed" and runs:
        return _installed(
            tokens, kinds, video_grid_thw, second_per_grid_ts, image_grid_thw, ids
        ).to(device)

    positions = torch.empty(3, len(tokens), dtype=torch.int64)
    index, position = 0, 0
    for (start, length), (t, h, w), interval in zip(runs, grids, seconds, strict=True):
        position = _fill_text(positions, index, start, position)
        block = positions[:, start : start + length].view(3, t, h, w)
        time = torch.arange(t, dtype=torch.float32) * interval * ids.tokens_per_second
        block[0] = time.long()[:, None, None]
        block[1] = torch.arange(h)[None, :, None]
        block[2] = torch.arange(w)[None, None, :]
        block += position
        position = max(int(block[0, -1, 0, 0]), position + h - 1, position + w - 1) + 1
        index = start + length
    _fill_text(positions, index, len(tokens), position)
    return positions.to(device)


def token_types(input_ids: Tensor, ids: SpecialIds) -> Tensor:
    """(..., P) int64: 0 for text, 1 for an image pad token, 2 for a video pad token."""
    return (input_ids == ids.image).long() + 2 * (input_ids == ids.video).long()


def _fill_text(positions: Tensor, begin: int, end: int, position: int) -> int:
    positions[:, begin:end] = torch.arange(position, position + end - begin)
    return position + end - begin


def _vision_runs(
    kinds: Tensor,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    image_grid_thw: Tensor | None,
    ids: SpecialIds,
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]], list[float]]:
    """Runs of pad tokens as (start, length), with each run's merged grid and seconds per grid."""
    bounds = torch.nonzero(torch.diff(kinds, prepend=kinds.new_zeros(1))).flatten().tolist()
    bounds.append(len(kinds))
    kind_at = kinds.tolist()
    found = [(kind_at[a], a, b - a) for a, b in pairwise(bounds) if kind_at[a]]
    lists = {
        1: [] if image_grid_thw is None else image_grid_thw.tolist(),
        2: [] if video_grid_thw is None else video_grid_thw.tolist(),
    }
    seconds = [1.0] * len(lists[2]) if second_per_grid_ts is None else second_per_grid_ts.tolist()
    if len(seconds) != len(lists[2]):
        raise ValueError(f"{len(lists[2])} video grids but {len(seconds)} second_per_grid_ts")
    counts = {kind: sum(k == kind for k, _, _ in found) for kind in (1, 2)}
    if counts != {kind: len(grid) for kind, grid in lists.items()}:
        raise ValueError(
            f"the prompt has {counts[1]} images and {counts[2]} videos, the grids given are for "
            f"{len(lists[1])} and {len(lists[2])}"
        )
    runs, grids, intervals = [], [], []
    for kind, start, length in found:
        t, h, w = lists[kind].pop(0)
        grid = (t, h // ids.merge_size, w // ids.merge_size)
        if grid[0] * grid[1] * grid[2] != length:
            raise ValueError(
                f"{length} vision tokens at index {start}, but grid {(t, h, w)} merged by "
                f"{ids.merge_size} has {grid[0] * grid[1] * grid[2]}"
            )
        runs.append((start, length))
        grids.append(grid)
        intervals.append(seconds.pop(0) if kind == 2 else 0.0)
    return runs, grids, intervals


def _installed(
    tokens: Tensor,
    kinds: Tensor,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    image_grid_thw: Tensor | None,
    ids: SpecialIds,
) -> Tensor:
    """Positions by the installed transformers: its own method, called on a stand-in model."""
    from transformers import Qwen2_5_VLModel

    # transformers annotates LongTensor where any integer tensor serves.
    rope_index: Any = Qwen2_5_VLModel.get_rope_index
    model: Any = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(
                spatial_merge_size=ids.merge_size, tokens_per_second=ids.tokens_per_second
            )
        )
    )
    model.get_vision_position_ids = MethodType(Qwen2_5_VLModel.get_vision_position_ids, model)
    positions, _ = rope_index(
        model,
        tokens[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=None if image_grid_thw is None else image_grid_thw.cpu(),
        video_grid_thw=None if video_grid_thw is None else video_grid_thw.cpu(),
        second_per_grid_ts=None if second_per_grid_ts is None else second_per_grid_ts.cpu(),
    )
    return positions[:, 0]
