"""Qwen3-VL, the dense models: everything that knows the architecture."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from vcr1_fast.model.family import Family, LayerSizes, ModelSizes
from vcr1_fast.model.last_layer import skip_unused_rows
from vcr1_fast.model.qwen3_vl.preprocessor import LAYOUT
from vcr1_fast.model.qwen3_vl.processor import Processor, installed_keeps_outer_pair
from vcr1_fast.model.qwen3_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.qwen3_vl.vision import (
    encode,
    feature_levels,
    prepare_vision_encoder,
    vision_inputs,
)

__all__ = ["FAMILY"]


def _model_class() -> type[Any]:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration


def _prepare_language_model(language_model: Any) -> None:
    # DeepStack adds features after a layer, to rows of vision tokens: after the last layer those
    # rows are unused.
    skip_unused_rows(language_model.layers[-1])


def _sizes(config: Any) -> ModelSizes:
    text, vision = config.text_config, config.vision_config
    queries, keys = (
        text.head_dim * heads for heads in (text.num_attention_heads, text.num_key_value_heads)
    )
    return ModelSizes(
        text=LayerSizes(
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            # Queries and keys are normalised: their norms keep input, float32 copy and output, 1.5
            # times the queries' and attention outputs that the estimate counts.
            queries=queries + 1.5 * (queries + keys),
            keys=keys,
            mlp=text.intermediate_size,
        ),
        vision=LayerSizes(
            # A projection of DeepStack keeps about what a layer keeps.
            depth=vision.depth + len(vision.deepstack_visual_indexes),
            width=vision.hidden_size,
            queries=vision.hidden_size,
            keys=vision.hidden_size,
            # Without a gate the MLP keeps its input's projection and the activation: half of the
            # four tensors that the estimate counts.
            mlp=vision.intermediate_size // 2,
        ),
        vocabulary=text.vocab_size,
    )


def _report() -> Sequence[tuple[str, str]]:
    outer = "with" if installed_keeps_outer_pair() else "without"
    return [
        (
            "Qwen3-VL clips as text",
            "video_text=trained (default) writes no start/end pair around all temporal patches; "
            f"installed (transformers {metadata.version('transformers')}) writes them {outer} one",
        )
    ]


FAMILY = Family(
    model_types=("qwen3_vl",),
    model_class=_model_class,
    layout=LAYOUT,
    load_processor=Processor.from_pretrained,
    vision_encoder=lambda model: model.model.visual,
    prepare_vision=prepare_vision_encoder,
    encode=encode,
    feature_levels=feature_levels,
    vision_inputs=vision_inputs,
    language_model=lambda model: model.model.language_model,
    kv_layers=lambda config: range(config.num_hidden_layers),
    prepare_language_model=_prepare_language_model,
    lora_targets=(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        # of the vision encoder's MLPs and projections
        "linear_fc1",
        "linear_fc2",
    ),
    vision_pattern=r".*\bvisual\b.*",
    projection_prefixes=("merger.", "deepstack_merger_list."),
    sizes=_sizes,
    tiny_config=TinyConfig,
    write_tiny=write_tiny,
    report=_report,
)
