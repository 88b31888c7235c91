"""A prompt as another engine reads it: its clips and images, with seconds that give our positions.

An engine counts M-RoPE positions itself, from grids and seconds. vLLM multiplies in float64 what we
(and transformers up to 5.2) multiply in float32, so on integer boundaries its times differ. The
seconds handed over are therefore fitted: the float64 number, nearest to the clip's own, by which
vLLM's rule gives our times. Then vLLM's whole rule is applied here and compared with the prompt's
positions: a prompt whose positions the engine cannot have is refused, not sampled wrongly.

vLLM's rules: `get_mrope_input_positions` of its models' files, 0.31 and 0.32.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.prompt import IMAGE, VIDEO, Prompt

KINDS = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True, eq=False)
class Medium:
    """One clip or image of a prompt.

    kind: "video" or "image"; start, length: its tokens in the prompt, from the first that stands
    for features to the last; is_embed (length,) bool: which of them stand for features; grid (3,)
    int64, in patches; seconds: from one temporal patch to the next, None for an image; features
    (vision tokens, levels * H), contiguous; key: digest of all that the engine computes from it.
    """

    kind: str
    start: int
    length: int
    is_embed: Tensor
    grid: Tensor
    seconds: float | None
    features: Tensor
    key: str


def media_of(prompt: Prompt, features: Tensor | None, config: Any, version: int) -> list[Medium]:
    """The clips and images of a prompt, in order.

    Args:
        features: (vision tokens, levels * H); None only for a prompt without any.
        config: the model's transformers configuration.
        version: of the weights; part of every key, since features depend on them.

    Raises:
        ValueError: where tokens, grids and features do not match, or the engine's positions would
            differ from the prompt's.
    """
    where = prompt.is_vision.nonzero()[:, 0]
    count = 0 if features is None else len(features)
    if count != len(where):
        raise ValueError(f"the prompt has {len(where)} vision tokens but {count} features")
    if features is None:
        return []
    merge = config.vision_config.spatial_merge_size
    grids = {IMAGE: list(prompt.image_grid_thw), VIDEO: list(prompt.video_grid_thw)}
    seconds = prompt.second_per_grid_ts.tolist()
    media: list[Medium] = []
    done = 0
    while done < len(where):
        kind = int(prompt.mm_token_type_ids[where[done]])
        grid = grids[kind].pop(0)
        tokens = int(grid.prod()) // merge**2
        own = where[done : done + tokens]
        if len(own) < tokens:
            raise ValueError(f"grid {grid.tolist()} needs {tokens} tokens, {len(own)} are left")
        start, end = int(own[0]), int(own[-1]) + 1
        interval = None
        if kind == VIDEO:
            interval = seconds.pop(0)
            if times_by_position(config):
                interval = fitted_seconds(_times(prompt, own, grid, merge), interval, config)
        part = features[done : done + tokens].detach().contiguous()
        media.append(
            Medium(
                KINDS[kind],
                start,
                end - start,
                prompt.is_vision[start:end],
                grid,
                interval,
                part,
                _digest(part, grid, interval, version),
            )
        )
        done += tokens
    _check_positions(prompt, media, config)
    return media


def times_by_position(config: Any) -> bool:
    """Whether a clip's seconds enter its positions rather than its text."""
    return hasattr(config.vision_config, "tokens_per_second")


def fitted_seconds(times: Sequence[int], seconds: float, config: Any) -> float:
    """Float64 seconds by which vLLM's rule gives these times, `seconds` itself where it does.

    Args:
        times: the position of each temporal patch, from 0.
        seconds: the clip's own, as float32 holds them.

    Raises:
        ValueError: where no number does.
    """
    rate = float(config.vision_config.tokens_per_second)
    if vllm_times(len(times), seconds, rate) == list(times):
        return seconds
    # floor(i * x) == times[i] holds for x in [lowest, highest).
    pairs = [(i, t) for i, t in enumerate(times) if i]
    lowest = max((t / i for i, t in pairs), default=0.0)
    highest = min(((t + 1) / i for i, t in pairs), default=math.inf)
    if lowest < highest:
        # Inside, not at an end: the engine multiplies by `rate` again, with its own rounding.
        fitted = (lowest + min(highest, lowest + 1.0)) / 2 / rate
        if vllm_times(len(times), fitted, rate) == list(times):
            return fitted
    raise ValueError(
        f"no seconds between frames give vLLM the times {list(times)} of a clip of "
        f"{seconds:.6g} s a grid: use rollout.engine=own, or another frame rate"
    )


def vllm_times(count: int, seconds: float, rate: float) -> list[int]:
    """Times of `count` temporal patches as vLLM counts them, in float64."""
    factor = seconds * rate
    return list(range(count)) if factor == 1.0 else [int(i * factor) for i in range(count)]


def vllm_positions(prompt: Prompt, media: Sequence[Medium], config: Any) -> Tensor:
    """Positions (3, P) int64 of the prompt as vLLM counts them."""
    rate = float(getattr(config.vision_config, "tokens_per_second", 1.0))
    # An image is one patch in time, whatever its seconds.
    times = [vllm_times(int(medium.grid[0]), medium.seconds or 0.0, rate) for medium in media]
    return positions_by_times(prompt, media, times, config)


def positions_by_times(
    prompt: Prompt, media: Sequence[Medium], times: Sequence[Sequence[int]], config: Any
) -> Tensor:
    """Positions (3, P) int64 of the prompt whose clips and images have these times, from 0, of
    their temporal patches. A family that writes times as text has no use for them."""
    merge = config.vision_config.spatial_merge_size
    positions = torch.empty(3, len(prompt), dtype=torch.int64)
    index, place = 0, 0  # next token, next position
    for medium, own in zip(media, times, strict=True):
        h, w = (medium.grid[1:] // merge).tolist()
        blocks: list[tuple[int, Sequence[int]]] = [(medium.start, own)]
        if not times_by_position(config):  # one block a temporal patch, with text between them
            starts = (medium.start + medium.is_embed.nonzero()[:: h * w, 0]).tolist()
            blocks = [(start, [0]) for start in starts]
        for start, of_block in blocks:
            positions[:, index:start] = torch.arange(place, place + start - index)
            place += start - index
            end = start + len(of_block) * h * w
            block = positions[:, start:end].view(3, len(of_block), h, w)
            block[0] = torch.tensor(of_block)[:, None, None]
            block[1] = torch.arange(h)[None, :, None]
            block[2] = torch.arange(w)[None, None, :]
            block += place
            place, index = int(block.max()) + 1, end
    positions[:, index:] = torch.arange(place, place + len(prompt) - index)
    return positions


def _times(prompt: Prompt, tokens: Tensor, grid: Tensor, merge: int) -> list[int]:
    """The position on the time axis of each temporal patch of a clip, from 0."""
    each = int(grid[1]) * int(grid[2]) // merge**2
    times = prompt.positions[0, tokens[::each]]
    return (times - times[0]).tolist()


def _check_positions(prompt: Prompt, media: Sequence[Medium], config: Any) -> None:
    theirs = vllm_positions(prompt, media, config)
    if not torch.equal(theirs, prompt.positions):
        token = int((theirs != prompt.positions).any(0).nonzero()[0, 0])
        raise ValueError(
            f"vLLM would place token {token} of {len(prompt)} at "
            f"{theirs[:, token].tolist()}, the prompt has it at "
            f"{prompt.positions[:, token].tolist()}: leave mrope at trained, or use engine own"
        )


def _digest(features: Tensor, grid: Tensor, seconds: float | None, version: int) -> str:
    """A clip's name in the engine's caches. vLLM's own leaves the seconds out, and the same
    features with other seconds would find each other's keys and values."""
    said = hashlib.sha256()
    said.update(repr((version, grid.tolist(), seconds, str(features.dtype))).encode())
    said.update(features.cpu().view(torch.uint8).numpy().data)
    return said.hexdigest()
