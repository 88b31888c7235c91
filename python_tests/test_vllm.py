"""vLLM in this process against our own rollout; run by `make test-engines`."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from vcr1_fast.data.records import load_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.data.video import Clip, ClipReader
from vcr1_fast.demo.settings import FRAMES, WARM_START
from vcr1_fast.engines import inputs
from vcr1_fast.engines.parity import Forward, ParityError, check_parity, normalised
from vcr1_fast.model.checkpoint import load, policy_weights
from vcr1_fast.model.forward import completion_hidden, lm_head, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import ModelConfig
from vcr1_fast.train.setup import add_adapters

pytestmark = pytest.mark.vllm
GREEDY = SamplingConfig(temperature=0, max_new_tokens=112)
BOUND = 1e-4


@pytest.fixture(scope="module")
def vllm():
    if "VCR1_ENGINES" not in os.environ:
        pytest.skip("vLLM runs in a separate environment: make test-engines")
    # Not importorskip: without vLLM the target must fail.
    from vcr1_fast.engines import vllm

    return vllm


@pytest.fixture(scope="module")
def loaded(vllm):
    model, processor = load(WARM_START)
    return model, processor.with_frames(FRAMES)


@pytest.fixture(scope="module")
def prompts(loaded, tmp_path_factory):
    """107 prompts on 16 clips."""
    _, processor = loaded
    folder = tmp_path_factory.mktemp("clips")
    written = write_dataset(folder, SynthConfig(train=8, val=0, test=8, workers=0))
    records = [r for split in ("train", "test") for r in load_records(written[split])]
    with ClipReader(backend="pyav", timeout=60, workers=0, fit=processor.fit()) as reader:
        clips = list(reader.read([clip_request(record, FRAMES) for record in records]))
    return [
        processor.prompt(TASKS[record.task].prompt(record, True), [clip])
        for record, clip in zip(records, clips, strict=True)
    ]


@pytest.fixture(scope="module")
def engine(vllm, loaded):
    settings = vllm.VllmSettings(str(WARM_START), memory_gib=0.25, context=2048)
    with vllm.LocalVllm(*loaded, settings) as engine:
        yield engine


@pytest.fixture
def synced(engine, loaded):
    """The engine with the model's weights as they are now."""
    engine.sync(loaded[0].named_parameters(), (engine.version or 0) + 1)
    return engine


def same_answers(engine, loaded, prompts):
    own = rollout(*loaded, prompts, 1, GREEDY)
    got = engine.rollout(prompts, 1, GREEDY, None, own.vision)
    assert [t[0].tolist() for t in got.tokens] == [t[0].tolist() for t in own.tokens]
    assert got.texts == own.texts and got.finished == own.finished
    gaps = [(a[0] - b[0]).abs().max() for a, b in zip(got.full_logps, own.full_logps, strict=True)]
    assert max(gaps) < BOUND
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got.logps, own.logps, strict=True))


def test_greedy_completions_are_ours_token_for_token(synced, loaded, prompts):
    assert len(prompts) > 100
    same_answers(synced, loaded, prompts)


def test_weights_after_optimiser_steps_arrive(engine, loaded, prompts):
    model, processor = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = set()
    for step in range(3):
        engine.sync(model.named_parameters(), 100 + step)
        own = rollout(model, processor, prompts[:32], 1, GREEDY)
        same_answers(engine, loaded, prompts[:32])
        seen.add(str(own.texts))
        hidden, labels, _ = completion_hidden(
            model, [Group(p, t) for p, t in zip(prompts[:32], own.tokens, strict=True)]
        )
        # Away from what it said, so that the answers change.
        (-cross_entropy(hidden @ lm_head(model)[0].T, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    put_back(model, before)
    assert len(seen) == 3


def put_back(model, before):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def test_several_clips_and_images_share_a_prompt(synced, loaded):
    model, processor = loaded
    pixels = np.random.default_rng(0).integers(0, 256, (16, 56, 56, 3), dtype=np.uint8)

    def clip(seconds, frames):
        times = np.arange(frames) * seconds / frames
        return Clip(pixels[:frames], times, frames / seconds, seconds, "clip")

    image = Clip(pixels[:1], np.zeros(1), None, None, "image")
    shown = ([clip(20.8, 16)], [clip(20.8, 16), image, clip(3.0, 8)], [image, image], [])
    asked = [processor.prompt("What does it show?", media) for media in shown]
    # On a time boundary: float32 and float64 products part.
    rate = model.config.vision_config.tokens_per_second
    seconds = asked[0].second_per_grid_ts.tolist()[0]
    own = (torch.arange(8, dtype=torch.float32) * seconds * rate).long().tolist()
    assert inputs.vllm_times(8, seconds, rate) != own
    same_answers(synced, loaded, asked)


def test_adapters_arrive_merged(engine, loaded, prompts):
    model, processor = loaded
    plain = rollout(model, processor, prompts[:16], 1, GREEDY)
    adapted = add_adapters(model, ModelConfig(path="unused", lora_rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    try:
        engine.sync(policy_weights(adapted), 200)
        assert rollout(adapted, processor, prompts[:16], 1, GREEDY).texts != plain.texts
        same_answers(engine, (adapted, processor), prompts[:16])
    finally:
        assert adapted.unload() is model


def test_sampled_tokens_have_the_policys_distribution(engine, loaded, prompts):
    """Chi-square of the first token against the trainer's probabilities, in two policies."""
    model, processor = loaded
    norm = model.model.language_model.norm.weight
    before = norm.detach().clone()
    banned = processor.banned_ids(len(lm_head(model)[0]))
    for flatter in (0.2, 0.15):
        with torch.no_grad():
            norm.copy_(before * flatter)  # the checkpoint is sure of its first token
            hidden, _, _ = completion_hidden(model, [Group(prompts[0], [torch.tensor([0])])])
            logits = (hidden @ lm_head(model)[0].T).double()[0]
        p = logits.index_fill(0, banned, -torch.inf).softmax(0)
        engine.sync(model.named_parameters(), int(1000 * flatter))
        draws, generator = 3000, torch.Generator().manual_seed(5)
        got = engine.rollout(prompts[:1], draws, SamplingConfig(max_new_tokens=1), generator)
        first = torch.cat(got.tokens[0])
        worst = (torch.cat(got.full_logps[0]) - logits.log_softmax(0)[first]).abs().max()
        assert worst < BOUND and not torch.isin(first, banned).any()
        counts = torch.bincount(first, minlength=len(p)).double()
        often = p * draws >= 5
        seen = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([p[often], p[~often].sum()[None]]) * draws
        degrees = int(often.sum())
        assert degrees > 5
        chi2 = float(((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum())
        assert chi2 < degrees + 4 * (2 * degrees) ** 0.5
    with torch.no_grad():
        norm.copy_(before)


def test_groups_repeat_and_stop_texts_end_them(synced, loaded, prompts):
    free = SamplingConfig(max_new_tokens=24)
    a, b = (
        synced.rollout(prompts[:4], 3, free, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert a.texts == b.texts and [len(group) for group in a.tokens] == [3] * 4
    alone = torch.Generator().manual_seed(3)
    assert synced.rollout(prompts[:1], 3, free, alone).texts == a.texts[:1]
    assert synced.rollout(prompts[1:2], 3, free, alone).texts == a.texts[1:2]
    stop = a.texts[0][0].split()[0][:3]
    greedy = replace(GREEDY, stop=(stop,))
    own = rollout(*loaded, prompts[:8], 1, greedy)
    got = synced.rollout(prompts[:8], 2, greedy, None, own.vision)
    assert [t[1].tolist() for t in got.tokens] == [t[0].tolist() for t in own.tokens]
    assert got.finished == [one * 2 for one in own.finished]


def test_what_it_cannot_serve_is_refused(synced, prompts):
    for temperature in (0.005, 0.7):
        with pytest.raises(ValueError, match=f"temperature {temperature} of an engine opened"):
            synced.rollout(prompts[:1], 1, SamplingConfig(temperature=temperature), None)


def guard(engine, loaded, prompts):
    model, processor = loaded
    return check_parity(
        engine,
        Forward(model, processor, SamplingConfig(max_new_tokens=8)),
        prompts[:2],
        sync=lambda version: engine.sync(policy_weights(model), version),
    )


def test_the_guard_passes_a_sound_engine(synced, loaded, prompts):
    assert guard(synced, loaded, prompts).max < BOUND


def one_second(media):
    return [replace(medium, seconds=1.0, key=medium.key + "1") for medium in media]


def test_a_wrong_second_stops_the_run(vllm, synced, loaded, prompts, monkeypatch):
    true = inputs.media_of
    monkeypatch.setattr(vllm, "media_of", lambda *a: one_second(true(*a)))
    with pytest.raises(ParityError, match="positions: one second"):
        guard(synced, loaded, prompts)


def test_float64_times_stop_the_run(vllm, synced, loaded, prompts, monkeypatch):
    def unfitted(prompt, features, config, version):
        seconds = prompt.second_per_grid_ts.tolist()
        media = inputs.media_of(prompt, features, config, version)
        return [replace(one, seconds=seconds[0], key=one.key + "u") for one in media]

    monkeypatch.setattr(vllm, "media_of", unfitted)
    with pytest.raises(ParityError, match="times multiplied in float64"):
        guard(synced, loaded, prompts)


def test_a_double_normalisation_stops_the_run(vllm, synced, loaded, prompts, monkeypatch):
    model, processor = loaded

    def twice(prompt, features, config, version):
        if features is not None:
            again = normalised(prompt.pixel_values_videos, processor)
            seen = replace(prompt, pixel_values_videos=again)
            features = prompt_features(model, [seen])[0]
        return inputs.media_of(prompt, features, config, version)

    monkeypatch.setattr(vllm, "media_of", twice)
    with pytest.raises(ParityError, match="normalised twice"):
        guard(synced, loaded, prompts)


def test_a_stale_cache_stops_the_run(synced, loaded, prompts, monkeypatch):
    monkeypatch.setattr(synced.llm, "reset_prefix_cache", lambda: None)
    with pytest.raises(ParityError, match=r"changed weights.* weights: a prompt without clips"):
        guard(synced, loaded, prompts)
    monkeypatch.undo()
    synced.sync(loaded[0].named_parameters(), 300)
    guard(synced, loaded, prompts)


def test_a_missing_name_is_refused_and_nothing_is_answered(engine, loaded, prompts):
    named = dict(loaded[0].named_parameters())
    named.pop("model.language_model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ValueError, match=r"weights: 1 were not given.*layers.1.mlp.down_proj"):
        engine.sync(named.items(), 400)
    with pytest.raises(ValueError, match="sync the weights"):
        engine.rollout(prompts[:1], 1, GREEDY, None)
    with pytest.raises(ValueError, match="nonsense"):
        engine.sync([("model.nonsense.weight", torch.zeros(2))], 401)
    engine.sync(loaded[0].named_parameters(), 402)
    same_answers(engine, loaded, prompts[:8])
