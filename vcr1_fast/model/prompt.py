"""A tokenised prompt: its tokens, their positions, and the patches of its videos and images."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

IMAGE, VIDEO = 1, 2
"""Values of `mm_token_type_ids` for vision tokens, as in transformers; 0 is text."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt with its videos and images. P tokens, n videos, m images.

    All on the CPU, but for patches that were made on the model's device (`model/staging.py`).

    input_ids (P,) int64; mm_token_type_ids (P,) int64: 0 text, 1 image, 2 video;
    positions (3, P) int64: of time, height and width, by the family's rule;
    pixel_values_videos (patches, values of a patch) or None; video_grid_thw (n, 3) int64, in
    patches; second_per_grid_ts (n,) float32, seconds from one temporal patch to the next;
    pixel_values (patches, values of a patch) or None and image_grid_thw (m, 3): of the images;
    text: the rendered chat template, before the vision tokens are repeated.
    """

    input_ids: Tensor
    mm_token_type_ids: Tensor
    positions: Tensor
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor
    second_per_grid_ts: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor
    text: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def opened(self) -> str:
        """The beginning of the assistant's turn that the chat template has written: `<think>` and
        the white space behind it, or nothing. A completion goes on from there."""
        return opened_reasoning(self.text)

    @property
    def is_vision(self) -> Tensor:
        """(P,) bool: which tokens stand for vision features."""
        return self.mm_token_type_ids > 0

    @property
    def patches(self) -> int:
        """Patches of all videos and images."""
        given = (self.pixel_values_videos, self.pixel_values)
        return sum(len(pixels) for pixels in given if pixels is not None)

    def media(self) -> list[tuple[Tensor, Tensor]]:
        """(patches (N_i, values), grid (3,)) of each video and image, in prompt order.

        A clip may be several runs of vision tokens (one for each temporal patch, with its time as
        text between them): a clip ends when its tokens are used up, not where a run ends.
        """
        queues = {
            IMAGE: _split(self.pixel_values, self.image_grid_thw),
            VIDEO: _split(self.pixel_values_videos, self.video_grid_thw),
        }
        kinds = self.mm_token_type_ids[self.is_vision].tolist()
        if not kinds:
            return []
        # Patches that make one vision token; the same for clips and images of a family.
        merged = self.patches // len(kinds)
        found, token = [], 0
        while token < len(kinds):
            found.append(next(queues[kinds[token]]))
            token += len(found[-1][0]) // merged
        return found


def opened_reasoning(rendered: str) -> str:
    """`<think>` and white space at the end of a rendered prompt; empty where it ends otherwise, as
    behind an empty block of reasoning."""
    start = rendered.rfind("<think>")
    return rendered[start:] if start >= 0 and rendered[start:].strip() == "<think>" else ""


def next_position(positions: Tensor) -> int:
    """Position, on all axes, of the first token after a prompt with positions (3, P): the largest
    one plus 1."""
    return int(positions.max()) + 1


def _split(pixels: Tensor | None, grids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    parts = () if pixels is None else pixels.split(grids.prod(dim=1).tolist())
    return zip(parts, grids, strict=True)
