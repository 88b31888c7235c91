"""DeepStack: the vision encoder of Qwen3-VL gives features to several layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.model.timed_text.vision import split_by_clip


def encode(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    """Features (tokens, levels * H) of each clip: the encoder's output, then those of DeepStack,
    side by side; pixel_values (N, values), grid_thw (n, 3), on its device."""
    # The encoder itself, not `get_video_features`, whose DeepStack features are split by clip in
    # some releases of transformers and whole in others.
    out = visual(pixel_values, grid_thw=grid_thw, return_dict=True)
    features = torch.cat([out.pooler_output, *out.deepstack_features], dim=1)
    return split_by_clip(visual, features, grid_thw)


def feature_levels(config: Any) -> int:
    """The encoder's output and one level for each layer that DeepStack taps."""
    return 1 + len(config.vision_config.deepstack_visual_indexes)


def vision_inputs(levels: Sequence[Tensor], slots: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The first level are the embeddings; the language model adds level i to what its layer i - 1
    makes of these tokens. A decoding step has no vision tokens and passes neither argument."""
    first, *deep = levels
    return first, {"visual_pos_masks": slots[None], "deepstack_visual_embeds": deep}
