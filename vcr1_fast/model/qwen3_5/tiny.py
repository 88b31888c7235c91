"""Write a small random Qwen3.5, tokenizer included, in the standard Hugging Face layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.model.qwen3_5.processor import Processor
from vcr1_fast.model.timed_text import tiny


@dataclass(frozen=True)
class TinyConfig(tiny.TinyConfig):
    """Sizes of the random model.

    Every `full_attention_interval`-th layer has attention, the others are Gated DeltaNet layers
    with `linear_*` heads. Positions rotate `rotary_factor` of a head.
    """

    full_attention_interval: int = 4
    rotary_factor: float = 0.5
    linear_key_heads: int = 2
    linear_value_heads: int = 4
    linear_key_dim: int = 32
    linear_value_dim: int = 32
    linear_kernel: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < self.full_attention_interval:
            raise ValueError(
                f"layers ({self.layers}) must be at least full_attention_interval "
                f"({self.full_attention_interval}): a model needs a layer with attention"
            )
        if self.linear_value_heads % self.linear_key_heads:
            raise ValueError(
                f"linear_value_heads ({self.linear_value_heads}) must be a multiple of "
                f"linear_key_heads ({self.linear_key_heads})"
            )

    @property
    def rotated(self) -> int:
        return int(self.head_dim * self.rotary_factor)

    def text_settings(self, vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
        settings = super().text_settings(vocab_size, ids)
        settings["rope_parameters"]["partial_rotary_factor"] = self.rotary_factor
        return settings | {
            "full_attention_interval": self.full_attention_interval,
            "linear_num_key_heads": self.linear_key_heads,
            "linear_num_value_heads": self.linear_value_heads,
            "linear_key_head_dim": self.linear_key_dim,
            "linear_value_head_dim": self.linear_value_dim,
            "linear_conv_kernel_dim": self.linear_kernel,
        }


def write_tiny(
    path: str | Path, *, texts: Iterable[str], seed: int = 0, config: TinyConfig | None = None
) -> None:
    """Write a random Qwen3.5 to `path`: see `timed_text.tiny.write_tiny`; the default sizes have
    about one million parameters. Its chat template opens the reasoning, as the released ones do."""
    from transformers import Qwen3_5ForConditionalGeneration

    tiny.write_tiny(
        path,
        texts=texts,
        seed=seed,
        config=config or TinyConfig(),
        model_class=Qwen3_5ForConditionalGeneration,
        processor=Processor,
        thinks=True,
    )
