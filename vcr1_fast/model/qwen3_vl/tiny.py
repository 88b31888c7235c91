"""Write a small random Qwen3-VL, tokenizer included, in the standard Hugging Face layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.model.qwen3_vl.processor import Processor
from vcr1_fast.model.timed_text import tiny


@dataclass(frozen=True)
class TinyConfig(tiny.TinyConfig):
    """Sizes of the random model. `deepstack` names the vision layers whose output enters the
    language model's first layers."""

    deepstack: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        outside = [i for i in self.deepstack if not 0 <= i < self.vision_depth]
        if outside:
            raise ValueError(f"deepstack {outside} outside 0..{self.vision_depth - 1}")

    def vision_settings(self) -> dict[str, Any]:
        return super().vision_settings() | {"deepstack_visual_indexes": list(self.deepstack)}


def write_tiny(
    path: str | Path, *, texts: Iterable[str], seed: int = 0, config: TinyConfig | None = None
) -> None:
    """Write a random Qwen3-VL to `path`: see `timed_text.tiny.write_tiny`; the default sizes have
    about one million parameters."""
    from transformers import Qwen3VLForConditionalGeneration

    tiny.write_tiny(
        path,
        texts=texts,
        seed=seed,
        config=config or TinyConfig(),
        model_class=Qwen3VLForConditionalGeneration,
        processor=Processor,
    )
