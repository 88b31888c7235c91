"""Write the table of memory in docs/models.md: `python docs/write_models.py`, a minute.

The numbers are those of `vcr1 plan` (train/plan.py, train/planner.py) for models of the released
sizes, built without weights.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from vcr1_fast.config.loader import load_config
from vcr1_fast.train.config import ModelConfig, TrainConfig
from vcr1_fast.train.dry_run import skeleton
from vcr1_fast.train.plan import Needs, size
from vcr1_fast.train.planner import Footprint

PAGE = Path(__file__).parent / "models.md"
PROMPT, LENGTH, GROUP = 3600, 200, 8


def _text(width: int, layers: int, heads: int, keys: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": mlp,
        **more,
    }


def _qwen2_5(*sizes: int, tied: bool = False, vocabulary: int = 152_064) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": _text(*sizes, vocab_size=vocabulary),
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": sizes[0],
        },
        "tie_word_embeddings": tied,
    }


def _vision(small: bool, width: int, **more: Any) -> dict[str, Any]:
    sizes = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096} if small else {}
    return {**sizes, "out_hidden_size": width, **more}


def _qwen3(*sizes: int, small: bool = False, tied: bool = False) -> dict[str, Any]:
    taps = [5, 11, 17] if small else [8, 16, 24]
    return {
        "model_type": "qwen3_vl",
        "text_config": _text(*sizes, head_dim=128, vocab_size=151_936),
        "vision_config": _vision(small, sizes[0], deepstack_visual_indexes=taps),
        "tie_word_embeddings": tied,
    }


def _qwen3_5(
    *sizes: int, values: int, vision: dict[str, Any], tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5",
        "text_config": _text(*sizes, linear_num_value_heads=values),
        "vision_config": {**vision, "out_hidden_size": sizes[0]},
        "tie_word_embeddings": tied,
    }


_SMALLEST = {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
_SMALL = _vision(True, 0)
MODELS = {
    "Qwen2.5-VL 3B": _qwen2_5(2048, 36, 16, 2, 11_008, tied=True, vocabulary=151_936),
    "Qwen2.5-VL 7B": _qwen2_5(3584, 28, 28, 4, 18_944),
    "Qwen2.5-VL 32B": _qwen2_5(5120, 64, 40, 8, 27_648),
    "Qwen2.5-VL 72B": _qwen2_5(8192, 80, 64, 8, 29_568),
    "Qwen3-VL 2B": _qwen3(2048, 28, 16, 8, 6144, small=True, tied=True),
    "Qwen3-VL 4B": _qwen3(2560, 36, 32, 8, 9728, small=True, tied=True),
    "Qwen3-VL 8B": _qwen3(4096, 36, 32, 8, 12_288),
    "Qwen3-VL 32B": _qwen3(5120, 64, 64, 8, 25_600),
    "Qwen3.5 0.8B": _qwen3_5(1024, 24, 8, 2, 3584, values=16, vision=_SMALLEST, tied=True),
    "Qwen3.5 2B": _qwen3_5(2048, 24, 8, 2, 6144, values=16, vision=_SMALL, tied=True),
    "Qwen3.5 4B": _qwen3_5(2560, 32, 16, 4, 9216, values=32, vision=_SMALL, tied=True),
    "Qwen3.5 9B": _qwen3_5(4096, 32, 16, 4, 12_288, values=32, vision={}),
    "Qwen3.5 27B": _qwen3_5(5120, 64, 24, 4, 17_408, values=48, vision={}),
}
_COLUMNS = (
    "model | parameters | weights | training, all | training, LoRA | a group's pass | rollout"
)


def row(name: str, config: dict[str, Any]) -> str:
    """A model's line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        run = load_config(TrainConfig, None, ["model.path=x", "data.train=x", "run.output=x"])
        shared = {"path": folder, "dtype": "bfloat16", "gradient_checkpointing": True}
        whole = skeleton(Path(folder), ModelConfig(**shared, freeze_vision=True))
        adapted = skeleton(Path(folder), ModelConfig(**shared, freeze_vision=True, lora_rank=16))
        needs, foot = Needs.of(whole, run), Footprint.of(whole)
        cells = [
            name,
            f"{needs.parameters / 1e9:.2f} B",
            size(needs.weights),
            size(needs.training),
            size(Needs.of(adapted, run).training),
            size(foot.bytes(PROMPT + GROUP * LENGTH, GROUP * LENGTH, 0)),
            size(foot.rollout_bytes([PROMPT], GROUP, LENGTH, truncated=False)),
        ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole table."""
    rule = "|---" * (_COLUMNS.count("|") + 1) + "|"
    return "\n".join([f"| {_COLUMNS} |", rule, *(row(*item) for item in MODELS.items())])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- table:memory -->\n", "\n<!-- /table -->"
    pattern = re.escape(start) + ".*?" + re.escape(end)
    page, count = re.subn(pattern, lambda _: start + table() + end, page, flags=re.DOTALL)
    assert count == 1, f"{PAGE} has {count} places for the table"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
