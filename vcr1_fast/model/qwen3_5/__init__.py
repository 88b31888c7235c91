"""Qwen3.5, the dense models: everything that knows the architecture.

Three of four layers are Gated DeltaNet layers, which keep a state instead of keys and values; the
fourth has attention with heads of 256 and a gate on its output.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vcr1_fast.model.family import LANGUAGE_MODEL_TARGETS, Family, LayerSizes, ModelSizes
from vcr1_fast.model.last_layer import skip_unused_rows
from vcr1_fast.model.qwen3_5.processor import Processor
from vcr1_fast.model.qwen3_5.tiny import TinyConfig, write_tiny
from vcr1_fast.model.timed_text.preprocessor import LAYOUT
from vcr1_fast.model.timed_text.processor import video_text_row
from vcr1_fast.model.timed_text.vision import (
    encoder_sizes,
    prepare_vision_encoder,
    split_by_clip,
)

__all__ = ["FAMILY"]


def _model_class() -> type[Any]:
    from transformers import Qwen3_5ForConditionalGeneration

    return Qwen3_5ForConditionalGeneration


def _encode(visual: Any, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    out = visual(pixel_values, grid_thw=grid_thw, return_dict=True)
    return split_by_clip(visual, out.pooler_output, grid_thw)


def _kv_layers(config: Any) -> list[int]:
    """The layers with attention."""
    unknown = set(config.layer_types) - {"full_attention", "linear_attention"}
    if unknown or "full_attention" not in config.layer_types:
        raise ValueError(
            "expected layers of full_attention and linear_attention, at least one of the former, "
            f"got {sorted(set(config.layer_types))}"
        )
    return [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]


def _prepare_language_model(language_model: Any) -> None:
    from vcr1_fast.model.qwen3_5.delta_net import use_group_delta_net

    use_group_delta_net(language_model)
    if language_model.config.layer_types[-1] == "full_attention":
        skip_unused_rows(language_model.layers[-1])


def _sizes(config: Any) -> ModelSizes:
    text = config.text_config
    queries, keys = (
        text.head_dim * heads for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    return ModelSizes(
        text=LayerSizes(
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            queries=queries + 1.5 * (queries + keys),
            keys=keys,
            mlp=text.intermediate_size,
        ),
        vision=encoder_sizes(config.vision_config),
        vocabulary=text.vocab_size,
    )


FAMILY = Family(
    model_types=("qwen3_5",),
    model_class=_model_class,
    layout=LAYOUT,
    load_processor=Processor.from_pretrained,
    prepare_vision=prepare_vision_encoder,
    encode=_encode,
    kv_layers=_kv_layers,
    prepare_language_model=_prepare_language_model,
    lora_targets=(
        *LANGUAGE_MODEL_TARGETS,
        # of the Gated DeltaNet layers; the two projections to one number a head stay as they are
        "in_proj_qkv",
        "in_proj_z",
        "out_proj",
        # of the vision encoder's MLPs and projection
        "linear_fc1",
        "linear_fc2",
    ),
    sizes=_sizes,
    tiny_config=TinyConfig,
    write_tiny=write_tiny,
    report=lambda: [("Qwen3.5 clips as text", video_text_row(Processor.source))],
)
