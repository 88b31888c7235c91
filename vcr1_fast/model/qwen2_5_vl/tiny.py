"""Write a small random Qwen2.5-VL, tokenizer included, in the standard Hugging Face layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vcr1_fast.model.preprocessor import IMAGE_FILE
from vcr1_fast.model.tiny import SPECIAL_TOKENS, TAGS, chat_template, train_tokenizer, write_random

__all__ = ["SPECIAL_TOKENS", "TAGS", "TinyConfig", "train_tokenizer", "write_tiny"]


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the random model; `window` (of the vision encoder's attention) is in pixels.

    `mrope_section` splits half a head over (time, height, width); None uses Qwen's 2:3:3.
    `vocab_limit` bounds the text vocabulary before the special tokens are added.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_ratio: float = 3.0
    vocab_limit: int = 4096
    mrope_section: tuple[int, int, int] | None = None
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_mlp_ratio: float = 3.0
    vision_full_attention: tuple[int, ...] = (1,)
    window: int = 112
    patch: int = 14
    tokens_per_second: int = 2
    initializer_range: float = 0.05
    max_positions: int = 32_768
    min_pixels: int = 28 * 28
    max_pixels: int = 768 * 28 * 28
    system: str = ""

    def __post_init__(self) -> None:
        for width, heads, what, multiple in (
            (self.hidden_size, self.heads, "hidden_size / heads", 2),
            (self.vision_hidden, self.vision_heads, "vision_hidden / vision_heads", 4),
        ):
            if width % heads or (width // heads) % multiple:
                raise ValueError(f"{what} must be a multiple of {multiple}, got {width} / {heads}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if sum(self.sections) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {self.sections} must sum to half of the head size {self.head_dim}"
            )
        outside = [i for i in self.vision_full_attention if not 0 <= i < self.vision_depth]
        if outside:
            raise ValueError(f"vision_full_attention {outside} outside 0..{self.vision_depth - 1}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def sections(self) -> tuple[int, int, int]:
        if self.mrope_section is not None:
            time, height, width = self.mrope_section
            return time, height, width
        half = self.head_dim // 2
        time = max(half // 4, 1)
        height = (half - time) // 2
        return (time, height, half - time - height)


def write_tiny(
    path: str | Path, *, texts: Iterable[str], seed: int = 0, config: TinyConfig | None = None
) -> None:
    """Write a random Qwen2.5-VL to the directory `path` (made if absent).

    Args:
        path: target directory; files of the same names are replaced.
        texts: training texts of the tokenizer: prompts and answers.
        seed: seed of the weights. The caller's random state is left untouched.
        config: sizes; the default has about one million parameters.

    Raises:
        ValueError: when the sizes do not fit together (see `TinyConfig`).
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = config or TinyConfig()
    write_random(
        path,
        tokenizer=train_tokenizer(texts, config.vocab_limit),
        model_class=Qwen2_5_VLForConditionalGeneration,
        model_config=partial(_model_config, config),
        settings={IMAGE_FILE: _preprocessor_config(config)},
        max_positions=config.max_positions,
        seed=seed,
        template=chat_template(system=config.system),
    )


def _model_config(config: TinyConfig, vocab_size: int, ids: dict[str, int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": round(config.hidden_size * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.sections),
        },
    }
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden,
        "intermediate_size": round(config.vision_hidden * config.vision_mlp_ratio),
        "num_heads": config.vision_heads,
        "out_hidden_size": config.hidden_size,
        "fullatt_block_indexes": list(config.vision_full_attention),
        "window_size": config.window,
        "patch_size": config.patch,
        "tokens_per_second": config.tokens_per_second,
        "initializer_range": config.initializer_range,
    }
    # A parent's keyword, which the class's own annotations do not list.
    shared: dict[str, Any] = {"initializer_range": config.initializer_range}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=config.tie_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **shared,
    )


def _preprocessor_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "patch_size": config.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
