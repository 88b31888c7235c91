"""A tiny checkpoint, a few clips, and a configuration that trains the one on the others."""

from pathlib import Path

from vcr1_fast.config.loader import load_config
from vcr1_fast.data.records import load_records
from vcr1_fast.data.scenes import SceneConfig
from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.model.family import family_named
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig

MODEL = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "vision_hidden": 16,
    "vision_heads": 1,
    "vocab_limit": 600,
    "initializer_range": 0.2,
}
SETTINGS = (
    "model.dtype=float32",
    "run.device=cpu",
    "run.trackers=[]",
    "data.decode_workers=0",
    "data.frames.num_frames=4",
    "data.frames.min_pixels=784",
    "data.frames.max_pixels=3136",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "optim.prompts_per_step=4",
    "optim.tokens_per_microbatch=512",
    "optim.lr=1e-3",
    "optim.steps=2",
)


def write_inputs(folder: Path, family: str = "qwen2_5_vl", **sizes) -> tuple[Path, Path]:
    """(checkpoint, records): a random model whose tokenizer knows the records' texts. `sizes`:
    further ones of the family's tiny model."""
    scene = SceneConfig(min_seconds=2.0, max_seconds=3.0, sizes=((56, 56),), visitors=(1, 1))
    config = SynthConfig(train=3, val=0, test=0, scene=scene, workers=0)
    path = write_dataset(folder / "data", config)["train"]
    records = load_records(path)
    texts = [TASKS[r.task].prompt(r, False) + TASKS[r.task].target(r) for r in records]
    kind = family_named(family)
    kind.write_tiny(folder / "model", texts=texts, config=kind.tiny_config(**{**MODEL, **sizes}))
    return folder / "model", path


def configure(model: Path, records: Path, output: Path, *overrides: str) -> TrainConfig:
    """A run of two steps of four prompts, on the CPU, and what `overrides` change in it."""
    paths = (f"model.path={model}", f"data.train={records}", f"run.output={output}")
    return load_config(TrainConfig, None, [*paths, *SETTINGS, *overrides])
