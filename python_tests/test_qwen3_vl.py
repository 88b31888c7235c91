"""Qwen3-VL: DeepStack, and what `vcr1 doctor` says of it."""

import dataclasses
import json

import family_case as case
import pytest
from transformers.models.qwen3_vl import processing_qwen3_vl

from vcr1_fast.doctor import models as doctor_rows
from vcr1_fast.model import checkpoint
from vcr1_fast.model.family import family_named
from vcr1_fast.model.files import CheckpointError

FAMILY = family_named("qwen3_vl")


@pytest.mark.parametrize("layers", [1, 2])
def test_a_language_model_not_deeper_than_deepstack(layers, tmp_path, monkeypatch):
    path = case.write(tmp_path, "qwen3_vl", layers=layers)
    model, processor = case.load_exact(monkeypatch, path, "qwen3_vl")
    groups = case.groups(processor, case.shapes("qwen3_vl")["one group"])
    stock = case.stock(model)
    ours, expected = case.shared(model, groups), case.alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    mine, other = case.gradients(model, ours), case.gradients(stock, expected)
    # A level that no row can reach has no gradient there, and zeros here.
    unread = {name: mine.pop(name) for name in set(mine) - set(other)}
    assert all("deepstack_merger_list" in n and not g.any() for n, g in unread.items())
    for name in [n for n in other if not other[n].any()]:
        assert not mine.pop(name).any()
        other.pop(name)
    case.assert_same(mine, other, 1e-7)


def test_the_comparison_notices_deepstack(tmp_path, monkeypatch):
    path = case.write(tmp_path, "qwen3_vl")
    model, processor = case.load_exact(monkeypatch, path, "qwen3_vl")
    groups = case.groups(processor, case.shapes("qwen3_vl")["one group"])

    def without_deepstack(levels, slots):
        return levels[0], {}

    def swapped(levels, slots):
        return levels[0], {
            "visual_pos_masks": slots[None],
            "deepstack_visual_embeds": levels[:0:-1],
        }

    for inputs in (without_deepstack, swapped):
        with monkeypatch.context() as patch:
            changed = dataclasses.replace(FAMILY, vision_inputs=inputs)
            patch.setattr("vcr1_fast.model.forward.family_of", lambda _, f=changed: f)
            assert case.difference(model, groups) > 1e-3


def test_vision_layers_outside_the_encoder_are_refused():
    with pytest.raises(ValueError, match=r"deepstack \[3\] outside 0..2"):
        FAMILY.tiny_config(deepstack=(0, 3))


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    settings = {"model_type": "qwen3_vl_moe"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"'qwen3_vl_moe', known are .*qwen3_vl"):
        checkpoint.load(tmp_path)


def test_doctor_says_how_clips_are_written():
    for name in ("Qwen3-VL", "Qwen3.5"):
        (row,) = [value for key, value in doctor_rows() if key == f"{name} clips as text"]
        assert "trained (default) writes no start/end pair" in row
        outer = hasattr(processing_qwen3_vl.Qwen3VLProcessor, "replace_video_token")
        assert ("writes them with one" in row) is outer
