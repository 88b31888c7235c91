"""Qwen2.5-VL: everything that knows the architecture."""

from typing import Any

from vcr1_fast.model.family import Family, LayerSizes, ModelSizes
from vcr1_fast.model.qwen2_5_vl.preprocessor import LAYOUT
from vcr1_fast.model.qwen2_5_vl.processor import Processor
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.qwen2_5_vl.vision import encode, prepare_vision_encoder

__all__ = ["FAMILY"]


def _model_class() -> type[Any]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def _kv_layers(config: Any) -> range:
    """Every layer keeps keys and values; a sliding window would cut the shared prompt."""
    if any(kind != "full_attention" for kind in config.layer_types):
        raise ValueError(f"sliding-window layers are not supported: {set(config.layer_types)}")
    return range(config.num_hidden_layers)


def _sizes(config: Any) -> ModelSizes:
    text, vision = config.text_config, config.vision_config
    head = text.hidden_size // text.num_attention_heads
    return ModelSizes(
        text=LayerSizes(
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            queries=text.hidden_size,
            keys=head * text.num_key_value_heads,
            mlp=text.intermediate_size,
        ),
        vision=LayerSizes(
            depth=vision.depth,
            width=vision.hidden_size,
            queries=vision.hidden_size,
            # All heads have keys, and a window's queries, keys and values are also gathered from
            # the others: 1.5 H more.
            keys=2.5 * vision.hidden_size,
            mlp=vision.intermediate_size,
        ),
        vocabulary=text.vocab_size,
    )


FAMILY = Family(
    model_types=("qwen2_5_vl",),
    model_class=_model_class,
    layout=LAYOUT,
    load_processor=Processor.from_pretrained,
    prepare_vision=prepare_vision_encoder,
    encode=encode,
    kv_layers=_kv_layers,
    sizes=_sizes,
    tiny_config=TinyConfig,
    write_tiny=write_tiny,
)
