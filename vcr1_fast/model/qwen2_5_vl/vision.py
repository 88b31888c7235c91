"""The vision encoder of Qwen2.5-VL: prepared for packed windows, and called."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.vision import use_packed_attention, use_patch_projection


def prepare_vision_encoder(visual: Any) -> None:
    """Let the encoder use `packed_attention` and `PatchProjection`."""
    use_packed_attention(visual)
    use_patch_projection(visual.patch_embed)


def encode(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    """Features (tokens, H) of each clip; pixel_values (N, values), grid_thw (n, 3), on its device.

    One row a vision token: `spatial_merge_size` squared patches.
    """
    hidden = visual(pixel_values, grid_thw=grid_thw).pooler_output
    counts = grid_thw.prod(dim=1) // visual.spatial_merge_size**2
    return torch.split(hidden, counts.tolist())
