"""Engines without vLLM: the own one, what others are given, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import write_inputs

from vcr1_fast.data.video import Clip
from vcr1_fast.engines.config import EngineConfig
from vcr1_fast.engines.inputs import fitted_seconds, media_of, vllm_positions
from vcr1_fast.engines.open import open_sampler
from vcr1_fast.engines.sampler import OwnSampler
from vcr1_fast.engines.vllm import check_release, check_tokens
from vcr1_fast.model.checkpoint import load, policy_weights
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions
from vcr1_fast.model.rollout import Rollout, SamplingConfig, Segment, rollout
from vcr1_fast.train.config import ModelConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.setup import add_adapters


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    names = ("qwen2_5_vl", "qwen3_vl")
    return {name: load(write_inputs(folder / name, name)[0]) for name in names}


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def loaded(families, request):
    return families[request.param]


@pytest.fixture
def qwen2_5(families):
    return families["qwen2_5_vl"]


def clip(seconds, frames=8, size=56, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    return Clip(pixels, np.arange(frames) * seconds / frames, frames / seconds, seconds, "clip")


def image(size=56, seed=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return Clip(pixels, np.zeros(1), None, None, "image")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def media(prompt, model, version=0, features=None):
    with torch.no_grad():
        (found,) = prompt_features(model, [prompt])
    return media_of(prompt, found if features is None else features, model.config, version)


def test_the_own_engine_is_the_rollout(loaded):
    model, processor = loaded
    prompts = [processor.prompt("What is this?", [clip(2.0)]), processor.prompt("Hello?")]
    sampling = SamplingConfig(max_new_tokens=6)
    with open_sampler(EngineConfig(), "unused", model, processor) as sampler:
        sampler.sync(iter(()), 7)
        got = sampler.rollout(prompts, 3, sampling, seeded())
    expected = rollout(model, processor, prompts, 3, sampling, seeded())
    assert got.texts == expected.texts and sampler.version == 7
    assert isinstance(sampler, OwnSampler) and sampler.describe() == "own"


def test_positions_that_the_engine_counts_are_the_prompts(loaded):
    model, processor = loaded
    for shown in ([clip(2.0)], [clip(3.3), image(), clip(20.8, frames=16)], [image(112)], []):
        prompt = processor.prompt("What is this?", shown)
        found = media(prompt, model)
        assert [one.kind for one in found] == ["video" if c.fps else "image" for c in shown]
        assert torch.equal(vllm_positions(prompt, found, model.config), prompt.positions)
        assert sum(len(one.features) for one in found) == int(prompt.is_vision.sum())
        for one in found:
            places = prompt.is_vision[one.start : one.start + one.length]
            assert torch.equal(places, one.is_embed) and int(places.sum()) == len(one.features)


def test_seconds_are_fitted_to_float32_times(qwen2_5):
    """numpy's float64 product, as vLLM takes it, gives the times of the float32 positions; the few
    that no seconds give are refused."""
    config = qwen2_5[0].config
    rate = config.vision_config.tokens_per_second
    mended, refused = 0, 0
    for grids in (4, 8, 16, 64):
        for tenths in range(5, 3000, 13):
            seconds = float(np.float32(2 / (2 * grids / (tenths / 10))))
            times = (torch.arange(grids, dtype=torch.float32) * seconds * rate).long().tolist()
            plain = (np.arange(grids) * (seconds * rate)).astype(np.int64).tolist()
            try:
                fitted = fitted_seconds(times, seconds, config)
            except ValueError:
                refused += 1
                assert plain != times
                continue
            assert (np.arange(grids) * (fitted * rate)).astype(np.int64).tolist() == times
            mended += plain != times
            assert plain != times or fitted == seconds
    assert mended > 20 and refused < 5


def test_positions_that_the_engine_cannot_have_are_refused(qwen2_5):
    model, processor = qwen2_5
    prompt = processor.prompt("What is this?", [clip(9.0)])
    ids = SpecialIds.from_config(model.config)
    other = mrope_positions(
        prompt.input_ids,
        prompt.video_grid_thw,
        prompt.second_per_grid_ts,
        None,
        ids,
        mrope="installed",
    )
    assert not torch.equal(other, prompt.positions)
    with pytest.raises(ValueError, match="leave mrope at trained"):
        media(replace(prompt, positions=other), model)
    with pytest.raises(ValueError, match="vision tokens but"):
        media(prompt, model, features=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="vision tokens but 0 features"):
        media_of(prompt, None, model.config, 0)


def test_a_clip_has_another_key_for_all_that_the_engine_computes_from(loaded):
    model, processor = loaded
    prompt = processor.prompt("What is this?", [clip(2.0)])
    (one,) = media(prompt, model)
    assert media(prompt, model)[0].key == one.key
    slower = processor.prompt("What is this?", [clip(8.0)])
    with torch.no_grad():
        (features,) = prompt_features(model, [prompt])
    keys = {
        one.key,
        media(slower, model, features=features)[0].key,
        media(prompt, model, version=1)[0].key,
        media(prompt, model, features=features + 1e-6)[0].key,
        media(prompt, model, features=features.double())[0].key,
    }
    assert len(keys) == 5


def test_other_tokens_and_other_releases_are_refused():
    check_tokens([1, 2, 3], [1, 2, 3])
    check_tokens(None, [1])
    with pytest.raises(ValueError, match="differ from token 1 on"):
        check_tokens([1, 9, 3], [1, 2, 3])
    with pytest.raises(
        ValueError, match="read 2 of a prompt, the trainer has 3; they differ from token 2 on"
    ):
        check_tokens([1, 2], [1, 2, 3])
    check_release("0.32.4")
    for version in ("0.3", "0.33.0", "0.320.1"):
        with pytest.raises(ValueError, match=version):
            check_release(version)


def test_weights_of_a_policy_are_its_parameters_with_adapters_merged(loaded):
    model, _ = loaded
    plain = dict(policy_weights(model))
    assert plain.keys() == dict(model.named_parameters()).keys()
    before = {name: tensor.clone() for name, tensor in plain.items()}
    adapted = add_adapters(model, ModelConfig(path="unused", lora_rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=seeded())
    got = {name: tensor.clone() for name, tensor in policy_weights(adapted)}
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert got.keys() == merged.keys()
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
        changed += not torch.equal(got[name], before[name])
    assert changed > 2
    with torch.no_grad():  # the module's model is shared by the tests
        for name, tensor in model.named_parameters():
            tensor.copy_(before[name])


def test_a_completion_of_several_turns_is_kept_and_not_trained(loaded):
    model, processor = loaded
    prompt = processor.prompt("What is this?")
    one = rollout(model, processor, [prompt], 2, SamplingConfig(max_new_tokens=3), seeded())
    assert [len(one.segments(0, i)) for i in range(2)] == [1, 1]
    assert torch.equal(one.segments(0, 1)[0].tokens, one.tokens[0][1])
    turns = [[(Segment(t[:1]), Segment(t[1:], sampled=False)) for t in one.tokens[0]]]
    several = Rollout(**vars(one) | {"turns": turns})
    assert [s.sampled for s in several.part(0).segments(0, 1)] == [True, False]
    sample = Sample(None, prompt, None)
    assert PolicyGroup.from_rollout(sample, one.part(0)).lengths == [len(t) for t in one.tokens[0]]
    with pytest.raises(ValueError, match="more than one turn"):
        PolicyGroup.from_rollout(sample, several.part(0))
