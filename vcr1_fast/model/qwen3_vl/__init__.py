"""Qwen3-VL, the dense models: everything that knows the architecture."""

from typing import Any

from vcr1_fast.model.family import LANGUAGE_MODEL_TARGETS, Family, LayerSizes, ModelSizes
from vcr1_fast.model.qwen3_vl.processor import Processor
from vcr1_fast.model.qwen3_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.qwen3_vl.vision import encode, feature_levels, vision_inputs
from vcr1_fast.model.timed_text.preprocessor import LAYOUT
from vcr1_fast.model.timed_text.processor import video_text_row
from vcr1_fast.model.timed_text.vision import encoder_sizes, prepare_vision_encoder

__all__ = ["FAMILY"]


def _model_class() -> type[Any]:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration


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
        vision=encoder_sizes(vision, len(vision.deepstack_visual_indexes)),
        vocabulary=text.vocab_size,
    )


FAMILY = Family(
    model_types=("qwen3_vl",),
    model_class=_model_class,
    layout=LAYOUT,
    load_processor=Processor.from_pretrained,
    prepare_vision=prepare_vision_encoder,
    encode=encode,
    feature_levels=feature_levels,
    vision_inputs=vision_inputs,
    # DeepStack adds features after a layer, to rows of vision tokens: after the last layer those
    # rows are unused, as `Family.prepare_language_model` takes for granted.
    # Of the vision encoder's MLPs and projections.
    lora_targets=(*LANGUAGE_MODEL_TARGETS, "linear_fc1", "linear_fc2"),
    projection_prefixes=("merger.", "deepstack_merger_list."),
    sizes=_sizes,
    tiny_config=TinyConfig,
    write_tiny=write_tiny,
    report=lambda: [("Qwen3-VL clips as text", video_text_row(Processor.source))],
)
