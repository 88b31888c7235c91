"""The vision encoder without windows: prepared for packed temporal patches, and measured.

It attends within a temporal patch, all of it, and takes positions from rows and columns alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.family import LayerSizes
from vcr1_fast.model.vision import use_packed_attention, use_patch_projection


def prepare_vision_encoder(visual: Any) -> None:
    """Let the encoder use `packed_attention` and `PatchProjection`."""
    use_packed_attention(visual)
    use_patch_projection(visual.patch_embed)


def split_by_clip(visual: Any, features: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    """Features (tokens, values) of all clips, clip by clip; grid_thw (n, 3)."""
    counts = grid_thw.prod(dim=1) // visual.spatial_merge_size**2
    return torch.split(features, counts.tolist())


def encoder_sizes(vision: Any, projections: int = 0) -> LayerSizes:
    """Sizes of an encoder with this configuration, for the memory planner; `projections` to the
    language model besides the last one."""
    return LayerSizes(
        # Such a projection keeps about what a layer keeps.
        depth=vision.depth + projections,
        width=vision.hidden_size,
        queries=vision.hidden_size,
        keys=vision.hidden_size,
        # Without a gate the MLP keeps its input's projection and the activation: half of the
        # four tensors that the estimate counts.
        mlp=vision.intermediate_size // 2,
    )
