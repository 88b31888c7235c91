"""Write a small random Qwen3-VL, tokenizer included, in the standard Hugging Face layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vcr1_fast.model.preprocessor import IMAGE_FILE, VIDEO_FILE
from vcr1_fast.model.qwen3_vl.preprocessor import (
    LAYOUT,
    ImageProcessorConfig,
    VideoProcessorConfig,
)
from vcr1_fast.model.tiny import train_tokenizer, write_random


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the random model.

    `head_dim` of the language model need not be hidden_size / heads. `mrope_section` counts the
    frequencies of (time, height, width) in half a head; None divides them evenly, time first.
    `deepstack` names the vision layers whose output enters the language model's first layers.
    `position_grid`: side of the learned table of positions. Pixel bounds are those of a clip.
    `vocab_limit` bounds the text vocabulary before the special tokens are added.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp_ratio: float = 3.0
    vocab_limit: int = 4096
    mrope_section: tuple[int, int, int] | None = None
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    vision_depth: int = 3
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_mlp_ratio: float = 3.0
    deepstack: tuple[int, ...] = (0, 1)
    position_grid: int = 8
    initializer_range: float = 0.05
    max_positions: int = 32_768
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    system: str = ""

    def __post_init__(self) -> None:
        for width, name, multiple in (
            (self.head_dim, "head_dim", 2),
            (self.vision_hidden / self.vision_heads, "vision_hidden / vision_heads", 4),
        ):
            if width % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, got {width:g}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if sum(self.sections) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {self.sections} must sum to half of the head size {self.head_dim}"
            )
        outside = [i for i in self.deepstack if not 0 <= i < self.vision_depth]
        if outside:
            raise ValueError(f"deepstack {outside} outside 0..{self.vision_depth - 1}")

    @property
    def sections(self) -> tuple[int, int, int]:
        if self.mrope_section is not None:
            time, height, width = self.mrope_section
            return time, height, width
        half = self.head_dim // 2
        # Interleaved as t h w t h w ...: no axis may have more than its turns, time the rest.
        height = width = half // 3
        return half - height - width, height, width


def write_tiny(
    path: str | Path, *, texts: Iterable[str], seed: int = 0, config: TinyConfig | None = None
) -> None:
    """Write a random Qwen3-VL to the directory `path` (made if absent).

    Args:
        path: target directory; files of the same names are replaced.
        texts: what the tokenizer is trained on: prompts and answers.
        seed: seed of the weights. The caller's random state is left untouched.
        config: sizes; the default has about one million parameters.

    Raises:
        ValueError: when the sizes do not fit together (see `TinyConfig`).
    """
    from transformers import Qwen3VLForConditionalGeneration

    config = config or TinyConfig()
    bounds: dict[str, Any] = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    # The times of clips are part of every prompt.
    texts = [*texts, *(f"<{tenths / 10} seconds>" for tenths in range(100))]
    write_random(
        path,
        tokenizer=train_tokenizer(texts, config.vocab_limit),
        model_class=Qwen3VLForConditionalGeneration,
        model_config=partial(_model_config, config),
        settings={
            VIDEO_FILE: VideoProcessorConfig(**bounds).as_json(),
            IMAGE_FILE: ImageProcessorConfig(**bounds).as_json(),
        },
        max_positions=config.max_positions,
        seed=seed,
        system=config.system,
    )


def _model_config(config: TinyConfig, vocab_size: int, ids: dict[str, int]) -> Any:
    from transformers import Qwen3VLConfig

    text = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": round(config.hidden_size * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.sections),
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden,
        "intermediate_size": round(config.vision_hidden * config.vision_mlp_ratio),
        "num_heads": config.vision_heads,
        "out_hidden_size": config.hidden_size,
        "num_position_embeddings": config.position_grid**2,
        "deepstack_visual_indexes": list(config.deepstack),
        "patch_size": LAYOUT.patch,
        "initializer_range": config.initializer_range,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=config.tie_embeddings,
        architectures=["Qwen3VLForConditionalGeneration"],
    )
