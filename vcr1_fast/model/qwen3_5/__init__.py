"""Qwen3.5, the dense models: everything that knows the architecture.

Three of four layers are Gated DeltaNet layers, which keep a state instead of keys and values; the
fourth has attention with heads of 256 and a gate on its output.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vcr1_fast.model.family import LANGUAGE_MODEL_TARGETS, Family, LayerSizes, ModelSizes
from vcr1_fast.model.last_layer import skip_unused_rows
from vcr1_fast.model.qwen3_5.delta_rule import fla_is_installed, rule_bytes
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
    heads, linear = text.linear_num_value_heads, text.layer_types.count("linear_attention")
    values, key_values = heads * text.linear_value_head_dim, heads * text.linear_key_head_dim
    channels = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
    # Tensors kept in half of their number, as `LayerSizes.queries` counts them. Attention: the
    # norms of queries and keys as in other models with norms, the gate and its product. Gated
    # DeltaNet: the convolution's input, output and activation, queries and keys of all heads, and
    # the gated norm, half of it in float32.
    attention = 2.5 * queries + 1.5 * keys + queries
    delta_net = (3 * channels + 2 * key_values + 9 * values) / 2
    mean = ((text.num_hidden_layers - linear) * (attention + keys) + linear * delta_net) / (
        text.num_hidden_layers
    )
    return ModelSizes(
        text=LayerSizes(
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            queries=mean - keys,
            keys=keys,
            mlp=text.intermediate_size,
        ),
        vision=encoder_sizes(config.vision_config),
        vocabulary=text.vocab_size,
        # float32, whatever the model's dtype; the convolution's inputs at most that.
        state_bytes=4.0
        * linear
        * (key_values * text.linear_value_head_dim + channels * (text.linear_conv_kernel_dim - 1)),
        layer_bytes=rule_bytes(heads, text.linear_key_head_dim, text.linear_value_head_dim),
    )


def _report() -> Sequence[tuple[str, str]]:
    kernels = "FLA's kernels in half precision" if fla_is_installed() else "torch's operators"
    return [
        ("Qwen3.5 clips as text", video_text_row(Processor.source)),
        ("Qwen3.5 delta rule on CUDA", f"{kernels} (package flash-linear-attention)"),
    ]


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
    report=_report,
)
