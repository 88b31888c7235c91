"""vLLM in this process against our own rollout; run by `make test-engines`."""

import os

import pytest
import torch
from torch.nn.functional import cross_entropy

from vcr1_fast.data.records import load_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.data.video import ClipReader
from vcr1_fast.demo.settings import FRAMES, WARM_START
from vcr1_fast.model.checkpoint import load
from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.tasks import TASKS

pytestmark = pytest.mark.vllm
GREEDY = SamplingConfig(temperature=0, max_new_tokens=112)
BOUND = 1e-4


@pytest.fixture(scope="module")
def vllm():
    if "VCR1_ENGINES" not in os.environ:
        pytest.skip("vLLM runs in an environment of its own: make test-engines")
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    assert len(seen) == 3
