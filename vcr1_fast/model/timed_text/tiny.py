"""The part of a random model that families with times as text have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vcr1_fast.model.preprocessor import IMAGE_FILE, VIDEO_FILE
from vcr1_fast.model.timed_text.preprocessor import LAYOUT
from vcr1_fast.model.timed_text.processor import Processor
from vcr1_fast.model.tiny import chat_template, train_tokenizer, write_random


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the random model.

    `head_dim` of the language model need not be hidden_size / heads. `mrope_section` counts the
    frequencies of (time, height, width) in the rotated half of a head; None divides them evenly,
    time first. `position_grid`: side of the learned table of positions. Pixel bounds are those of
    a clip. `vocab_limit` bounds the text vocabulary before the special tokens are added.
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
        if sum(self.sections) * 2 != self.rotated:
            raise ValueError(
                f"mrope_section {self.sections} must sum to half of the {self.rotated} numbers of "
                "a head that are rotated"
            )

    @property
    def rotated(self) -> int:
        """Numbers of a head that positions rotate."""
        return self.head_dim

    @property
    def sections(self) -> tuple[int, int, int]:
        if self.mrope_section is not None:
            time, height, width = self.mrope_section
            return time, height, width
        half = self.rotated // 2
        # Interleaved as t h w t h w ...: no axis may have more than its turns, time the rest.
        height = width = half // 3
        return half - height - width, height, width

    def text_settings(self, vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
        """Configuration of the language model; a family adds its part."""
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": round(self.hidden_size * self.mlp_ratio),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": 1e-6,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.sections),
                "mrope_interleaved": True,
            },
        }

    def vision_settings(self) -> dict[str, Any]:
        """Configuration of the vision encoder; a family adds its part."""
        return {
            "depth": self.vision_depth,
            "hidden_size": self.vision_hidden,
            "intermediate_size": round(self.vision_hidden * self.vision_mlp_ratio),
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden_size,
            "num_position_embeddings": self.position_grid**2,
            "patch_size": LAYOUT.patch,
            "initializer_range": self.initializer_range,
        }

    def model_settings(self, model_class: type[Any], ids: dict[str, int]) -> dict[str, Any]:
        """Configuration of the whole model, apart from its two parts."""
        return {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": self.tie_embeddings,
            "architectures": [model_class.__name__],
        }


def write_tiny(
    path: str | Path,
    *,
    texts: Iterable[str],
    seed: int,
    config: TinyConfig,
    model_class: type[Any],
    processor: type[Processor],
    thinks: bool = False,
) -> None:
    """Write a random model to the directory `path` (made if absent).

    Args:
        path: target directory; files of the same names are replaced.
        texts: what the tokenizer is trained on: prompts and answers.
        seed: seed of the weights. The caller's random state is left untouched.
        config: sizes.
        model_class: of transformers.
        processor: of the family: names and defaults of its settings files.
        thinks: whether the chat template opens the reasoning, see `chat_template`.

    Raises:
        ValueError: when the sizes do not fit together (see `TinyConfig`).
    """
    bounds: dict[str, Any] = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    # The times of clips are part of every prompt.
    texts = [*texts, *(f"<{tenths / 10} seconds>" for tenths in range(100))]
    write_random(
        path,
        tokenizer=train_tokenizer(texts, config.vocab_limit),
        model_class=model_class,
        model_config=partial(_model_config, config, model_class),
        settings={
            VIDEO_FILE: processor.video_settings(**bounds).as_json(),
            IMAGE_FILE: processor.image_settings(**bounds).as_json(),
        },
        max_positions=config.max_positions,
        seed=seed,
        template=chat_template(system=config.system, thinks=thinks),
    )


def _model_config(
    config: TinyConfig, model_class: type[Any], vocab_size: int, ids: dict[str, int]
) -> Any:
    return model_class.config_class(
        text_config=config.text_settings(vocab_size, ids),
        vision_config=config.vision_settings(),
        **config.model_settings(model_class, ids),
    )
