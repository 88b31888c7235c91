"""A tokenised prompt: its tokens, and the patches of its videos and images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE, VIDEO = 1, 2
"""How transformers tells vision tokens in `mm_token_type_ids`; 0 is text."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt with its videos and images, on the CPU. P tokens, n videos, m images.

    input_ids (P,) int64; mm_token_type_ids (P,) int64: 0 text, 1 image, 2 video;
    pixel_values_videos (patches, 1176) or None; video_grid_thw (n, 3) int64, in patches;
    second_per_grid_ts (n,) float32, seconds from one temporal patch to the next;
    pixel_values (patches, 1176) or None and image_grid_thw (m, 3), likewise of the images;
    text: the rendered chat template, before the vision tokens are repeated.
    """

    input_ids: Tensor
    mm_token_type_ids: Tensor
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor
    second_per_grid_ts: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor
    text: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def patches(self) -> int:
        """Patches of all videos and images."""
        given = (self.pixel_values_videos, self.pixel_values)
        return sum(len(pixels) for pixels in given if pixels is not None)

    def media(self) -> list[tuple[Tensor, Tensor]]:
        """(patches (N_i, 1176), grid (3,)) of each video and image, in the order of the prompt."""
        kinds = self.mm_token_type_ids
        starts = kinds[torch.diff(kinds, prepend=kinds.new_zeros(1)) != 0]
        queues = {
            kind: _split(pixels, grids)
            for kind, pixels, grids in (
                (IMAGE, self.pixel_values, self.image_grid_thw),
                (VIDEO, self.pixel_values_videos, self.video_grid_thw),
            )
        }
        return [next(queues[kind]) for kind in starts.tolist() if kind]


def _split(pixels: Tensor | None, grids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    parts = () if pixels is None else pixels.split(grids.prod(dim=1).tolist())
    return zip(parts, grids, strict=True)
