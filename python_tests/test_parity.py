"""The parity guard against engines with planted faults, each on a copy of the policy."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.engines import parity
from vcr1_fast.engines.inputs import media_of, positions_by_times
from vcr1_fast.engines.parity import Forward, Gap, ParityError, check_parity
from vcr1_fast.engines.sampler import Sampler
from vcr1_fast.model.checkpoint import policy_weights
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.train import rollouts, setup
from vcr1_fast.train.loop import train

SAMPLING = SamplingConfig(max_new_tokens=6)


class Copy(Sampler):
    """An engine with separate weights; `see` is its view of (prompt, features), `load` what it
    makes of a sync."""

    name = "copy"

    def __init__(self, model, processor, see=None, load=None):
        self.model, self.processor = copy.deepcopy(model), processor
        self.see, self.load = see, load or Copy.load_all
        self.version = 0

    def load_all(self, weights):
        with torch.no_grad():
            for name, tensor in weights.items():
                self.model.get_parameter(name).copy_(tensor)

    def sync(self, weights, version):
        self.load(self, dict(weights))
        self.version = version

    def rollout(self, prompts, group_size, sampling, seed, features=None):
        features = features or [None] * len(prompts)
        if self.see is not None:
            seen = [
                (p, f) if f is None else self.see(self, p, f)
                for p, f in zip(prompts, features, strict=True)
            ]
            prompts, features = zip(*seen, strict=True)
        return rollout(
            self.model, self.processor, prompts, group_size, sampling, seed, vision=features
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def case(inputs, tmp_path_factory):
    """model, processor, two prompts of the run."""
    settings = configure(*inputs, tmp_path_factory.mktemp("run"), "data.frames.num_frames=16")
    with setup.open_run(settings, reference=False) as run:
        samples = next(iter(run.batches()))
        return run.model.eval(), run.processor, [sample.prompt for sample in samples[:2]]


def check(case, engine, sampling=SAMPLING):
    model, processor, prompts = case
    return check_parity(
        engine,
        Forward(model, processor, sampling),
        prompts,
        sync=lambda version: engine.sync(policy_weights(model), version),
    )


def with_times(model, prompt, features, times):
    """The prompt whose clip's temporal patches have other times."""
    media = media_of(prompt, features, model.config, 0)
    return replace(prompt, positions=positions_by_times(prompt, media, [times], model.config))


def plain_positions(engine, prompt, features):
    return replace(prompt, positions=torch.arange(len(prompt)).expand(3, -1)), features


def seconds_lost(engine, prompt, features):
    rate = engine.model.config.vision_config.tokens_per_second
    times = [int(i * rate) for i in range(int(prompt.video_grid_thw[0, 0]))]
    return with_times(engine.model, prompt, features, times), features


def float64_times(engine, prompt, features):
    factor = (
        prompt.second_per_grid_ts[0].item() * engine.model.config.vision_config.tokens_per_second
    )
    times = [int(i * factor) for i in range(int(prompt.video_grid_thw[0, 0]))]
    return with_times(engine.model, prompt, features, times), features


def normalised_twice(engine, prompt, features):
    layout = engine.processor.video.layout
    pixels = prompt.pixel_values_videos.clone()
    each = pixels.shape[1] // 3
    for channel in range(3):
        part = pixels[:, channel * each : (channel + 1) * each]
        part.sub_(layout.mean[channel]).div_(layout.std[channel])
    seen = replace(prompt, pixel_values_videos=pixels)
    return prompt, prompt_features(engine.model, [seen])[0]


def no_features(engine, prompt, features):
    return prompt, torch.zeros_like(features)


def noisy_features(engine, prompt, features):
    return prompt, features + torch.randn_like(features)


def test_a_sound_engine_agrees_and_the_weights_are_put_back(case):
    model, processor, prompts = case
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    seen = []

    def see(engine, prompt, features):
        seen.append((prompt.second_per_grid_ts, prompt.positions))
        return prompt, features

    engine = Copy(model, processor, see)
    for sampling in (SAMPLING, SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=6)):
        gap = check(case, engine, sampling)
        assert 0 < gap.max < 1e-5 and gap.tokens > 10 and abs(gap.kl) < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert engine.version == 0
    # One of the prompts lay on a time boundary, at the positions of the family's own rule.
    own = {float(prompt.second_per_grid_ts[0]) for prompt in prompts}
    edge, positions = next((s, p) for s, p in seen if float(s[0]) not in own)
    ids = SpecialIds.from_config(model.config)
    same = [p for p in prompts if p.positions.shape == positions.shape]
    rule = [mrope_positions(p.input_ids, p.video_grid_thw, edge, None, ids) for p in same]
    assert any(torch.equal(one, positions) for one in rule)


class Processed(Copy):
    """Reports the log-probs of the truncated distribution alone, as vLLM does where T is not 1."""

    def rollout(self, *arguments):
        got = super().rollout(*arguments)
        return replace(got, full_logps=[[t * torch.nan for t in one] for one in got.logps])


def test_log_probs_of_a_truncated_distribution_are_compared_as_such(case):
    model, processor, _ = case
    truncated = SamplingConfig(temperature=0.7, top_p=0.5, top_k=9, max_new_tokens=6)
    assert check(case, Processed(model, processor), truncated).max < 1e-5
    with pytest.raises(ParityError, match="positions: text positions"):
        check(case, Processed(model, processor, plain_positions), truncated)


@pytest.mark.parametrize(
    "fault, said",
    [
        (plain_positions, "positions: text positions"),
        (seconds_lost, "positions: one second"),
        (float64_times, "positions: times multiplied in float64"),
        (normalised_twice, "vision: patches are normalised twice"),
        (no_features, "vision: no features"),
        (noisy_features, "positions or vision features: .* no known cause"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_engine_sees_wrongly_is_named(case, fault, said):
    model, processor, _ = case
    with pytest.raises(ParityError, match=said):
        check(case, Copy(model, processor, fault))


def ignore(engine, weights):
    pass


def without_one(engine, weights):
    weights.pop("model.language_model.layers.0.input_layernorm.weight")
    Copy.load_all(engine, weights)


def without_head(engine, weights):
    weights.pop("model.language_model.embed_tokens.weight")
    Copy.load_all(engine, weights)


@pytest.mark.parametrize("load_weights", [ignore, without_one, without_head])
def test_weights_that_do_not_arrive_are_named(case, load_weights):
    model, processor, _ = case
    with pytest.raises(ParityError, match=r"after a sync of changed weights.* weights: a prompt"):
        check(case, Copy(model, processor, load=load_weights))
    # Without a sync there is nothing to see: the weights were the policy's all along.
    forward = Forward(model, processor, SAMPLING)
    check_parity(Copy(model, processor, load=load_weights), forward, case[2])


def test_weights_that_never_were_the_policys_are_named(case):
    model, processor, _ = case
    engine = Copy(model, processor)
    with torch.no_grad():
        engine.model.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(ParityError, match=r"policy: on prompt 0 .* weights: a prompt"):
        check(case, engine)


def test_the_gap_is_that_of_the_definition():
    theirs, ours = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    gap = Gap.of(theirs, ours)
    assert (gap.tokens, gap.mean, gap.max) == (2, 0.75, 1.0)
    k3 = [torch.tensor(d).double().exp().item() - 1 - d for d in (-0.5, 1.0)]
    assert gap.kl == pytest.approx(sum(k3) / 2)
    assert Gap.of(torch.tensor([torch.nan]), torch.zeros(1)).max == torch.inf


def test_a_run_stops_at_its_start_and_names_the_fault(inputs, tmp_path, monkeypatch, capfd):
    settings = configure(*inputs, tmp_path / "good", "rollout.parity_every=1", "loss.beta=0")
    train(settings)
    said = capfd.readouterr().err
    assert said.count("own agrees with the policy, mean") == 2

    def faulty(settings, path, model, processor, **_):
        return Copy(model, processor, plain_positions)

    monkeypatch.setattr(setup, "open_sampler", faulty)
    settings = configure(*inputs, tmp_path / "bad", "rollout.parity_every=1", "loss.beta=0")
    with pytest.raises(ParityError, match=r"copy does not sample from the policy.*positions"):
        train(settings)
    assert not list((tmp_path / "bad" / "checkpoints").glob("step-*"))


def test_log_probs_that_an_engine_leaves_out_are_the_policys(inputs, tmp_path, monkeypatch):
    settings = configure(*inputs, tmp_path / "run", "rollout.temperature=0.7", "loss.beta=0")
    with setup.open_run(settings, reference=False) as run:
        samples = next(iter(run.batches()))
        seeds = range(len(samples))
        got = rollouts.sample_group(run, samples, [None] * len(samples), 3, seeds)
        blank = [replace(one, full_logps=[[t * torch.nan for t in one.logps[0]]]) for one in got]
        filled = rollouts.with_full_logps(run, samples, blank)
        assert rollouts.with_full_logps(run, samples, got) is got
    for one, again in zip(got, filled, strict=True):
        for ours, theirs in zip(one.full_logps[0], again.full_logps[0], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_bounds_follow_the_weights_type(case):
    model, processor, prompts = case
    half = copy.deepcopy(model).bfloat16()
    engine = Copy(half, processor)
    forward = Forward(half, processor, SAMPLING)
    assert check_parity(engine, forward, prompts[:1]).max < parity.REDUCED_LIMIT
    with pytest.raises(ParityError, match="bound 1e-09"):
        check_parity(engine, forward, prompts[:1], limit=1e-9)
