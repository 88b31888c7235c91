"""A second model family for tests, written as a contributor would: one folder with `FAMILY`.

A tiny Qwen2.5-VL under another model type, with patches of 16 and other mean and deviation. Its
features are twice as wide as embeddings (levels 2): the second half is split off at use.
"""

import importlib
import json
from contextlib import contextmanager
from pathlib import Path

from vcr1_fast import model as package
from vcr1_fast.model import family

SOURCE = '''
"""A renamed Qwen2.5-VL with patches of 16."""

from dataclasses import replace
from functools import cache

import torch

from vcr1_fast.model import qwen2_5_vl
from vcr1_fast.model.qwen2_5_vl.preprocessor import ImageProcessorConfig, VideoProcessorConfig
from vcr1_fast.model.qwen2_5_vl.processor import Processor
from vcr1_fast.ops.video_patches import PatchLayout

LAYOUT = PatchLayout(patch=16, merge=2, temporal=2, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


@cache
def model_class():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    class FakeConfig(Qwen2_5_VLConfig):
        model_type = "fake_vl"

    class FakeModel(Qwen2_5_VLForConditionalGeneration):
        config_class = FakeConfig

    return FakeModel


def load_processor(directory, **conventions):
    return Processor.from_pretrained(
        directory,
        **conventions,
        image=ImageProcessorConfig(layout=LAYOUT),
        video=VideoProcessorConfig(layout=LAYOUT),
    )


def encode(visual, pixels, grids):
    return [torch.cat([f, -f], dim=1) for f in qwen2_5_vl.encode(visual, pixels, grids)]


def vision_inputs(levels, slots):
    first, second = levels
    return (first - second) / 2, {}


FAMILY = replace(
    qwen2_5_vl.FAMILY,
    model_types=("fake_vl",),
    model_class=model_class,
    layout=LAYOUT,
    load_processor=load_processor,
    encode=encode,
    feature_levels=lambda config: 2,
    vision_inputs=vision_inputs,
)
'''


@contextmanager
def installed(folder: Path):
    """The family in a new folder of models, found as the package's own folders are."""
    (folder / "fake_vl").mkdir(parents=True)
    (folder / "fake_vl" / "__init__.py").write_text(SOURCE)
    package.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield family.family_named("fake_vl")
    finally:
        package.__path__.remove(str(folder))
        family._REGISTERED.pop("fake_vl", None)
        importlib.sys.modules.pop(f"{package.__name__}.fake_vl", None)


def write_checkpoint(fake: family.Family, path: Path, texts: list[str], **sizes) -> None:
    """A random checkpoint of the family."""
    fake.write_tiny(path, texts=texts, config=fake.tiny_config(patch=16, window=128, **sizes))
    # Written again by the family's own class: transformers names weights by model type.
    written = family.family_named("qwen2_5_vl").model_class().from_pretrained(path)
    settings = {**written.config.to_dict(), "model_type": "fake_vl"}
    model = fake.model_class()(fake.model_class().config_class.from_dict(settings))
    model.load_state_dict(written.state_dict())
    model.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "fake_vl"
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings |= {"image_mean": list(fake.layout.mean), "image_std": list(fake.layout.std)}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
