"""Rollouts against transformers' generate, its warpers, and the training forward."""

import contextlib
import dataclasses
import gc
import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vcr1_fast.model import checkpoint
from vcr1_fast.model import graphs as graphs_module
from vcr1_fast.model import rollout as rollout_module
from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.sampling import check_possible, sample, truncate
from vcr1_fast.model.wrapping import checkpoint_activations

CONFIG = TinyConfig(
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    vision_hidden=16,
    vocab_limit=260,
    initializer_range=0.3,
)


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=["When? 1.5 to 3.5"], seed=1, config=CONFIG)
    return path


@pytest.fixture
def loaded(directory):
    return checkpoint.load(directory)


@pytest.fixture
def exact(directory):
    return checkpoint.load(directory, dtype=torch.float64)


def _prompts(processor):
    rng = np.random.default_rng(0)

    def clip(frames, height, width):
        fps = None if frames == 1 else 2.0
        return Clip(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), fps)

    return [
        processor.prompt("When does it happen?", [clip(12, 28, 56)]),
        processor.prompt("a"),
        processor.prompt("Two clips.", [clip(4, 56, 28), clip(7, 28, 56)]),
        processor.prompt("An image.", [clip(1, 84, 56)]),
        processor.prompt("All.", [clip(1, 28, 56), clip(3, 56, 28), clip(1, 56, 56)]),
    ]


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _often_stop(model, processor, bias):
    """Give the head a bias so that completions end at various lengths."""
    head = model.lm_head
    values = torch.zeros(head.out_features, dtype=head.weight.dtype)
    values[processor.stop_id] = bias
    head.bias = torch.nn.Parameter(values)


def _flat(nested):
    return [item for group in nested for item in group]


@pytest.mark.parametrize("bias", [0.0, 10.0])
def test_greedy_agrees_with_generate(exact, bias):
    model, processor = exact
    _often_stop(model, processor, bias)
    # `generate` counts positions as the installed transformers does.
    prompts = _prompts(dataclasses.replace(processor, mrope="installed"))
    sampling = SamplingConfig(temperature=0, max_new_tokens=24)
    ours = rollout(model, processor, prompts, 1, sampling)
    banned = processor.banned_ids(model.config.text_config.vocab_size).tolist()
    lengths = set()
    for prompt, (completion,) in zip(prompts, ours.tokens, strict=True):
        inputs = {}
        if prompt.pixel_values_videos is not None:
            inputs = {
                "pixel_values_videos": prompt.pixel_values_videos,
                "video_grid_thw": prompt.video_grid_thw,
                "second_per_grid_ts": prompt.second_per_grid_ts,
            }
        if prompt.pixel_values is not None:
            inputs["pixel_values"] = prompt.pixel_values
            inputs["image_grid_thw"] = prompt.image_grid_thw
        if inputs:
            inputs["mm_token_type_ids"] = prompt.mm_token_type_ids[None]
        theirs = model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=banned,
            eos_token_id=processor.stop_id,
            pad_token_id=0,
            **inputs,
        )[0, len(prompt) :]
        assert torch.equal(completion, theirs)
        lengths.add(len(theirs))
    if bias:
        assert min(lengths) < 24


@pytest.mark.parametrize("mrope", ["trained", "installed"])
def test_log_probs_are_those_of_the_training_forward(exact, mrope):
    model, processor = exact
    _often_stop(model, processor, 2.5)
    prompts = _prompts(dataclasses.replace(processor, mrope=mrope))
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=40)
    got = rollout(model, processor, prompts, 5, sampling, _seeded())
    lengths = [len(c) for c in _flat(got.tokens)]
    assert len(set(lengths)) > 4 and max(lengths) > 32  # rows left, and the buffer grew
    groups = [Group(p, c) for p, c in zip(prompts, got.tokens, strict=True)]
    with torch.no_grad():
        hidden, labels, _ = completion_hidden(model, groups)
        logits = F.linear(hidden, *lm_head(model)) / 0.7
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(torch.cat(_flat(got.full_logps)), expected, rtol=0, atol=1e-7)
    logits[:, processor.banned_ids(logits.shape[1])] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(torch.cat(_flat(got.logps)), expected, rtol=0, atol=1e-7)


def test_returned_features_serve_the_training_forward(exact):
    model, processor = exact
    prompts = _prompts(processor)
    got = rollout(model, processor, prompts, 2, SamplingConfig(max_new_tokens=3), _seeded())
    assert got.vision[1] is None
    args = list(zip(prompts, got.tokens, got.vision, strict=True))
    with torch.no_grad():
        given = completion_hidden(model, [Group(*a) for a in args])[0]
        encoded = completion_hidden(model, [Group(*a[:2]) for a in args])[0]
    assert torch.equal(given, encoded)


def test_same_generator_same_rollout(loaded):
    model, processor = loaded
    _often_stop(model, processor, 5.0)
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=20)
    a = rollout(model, processor, prompts, 4, sampling, _seeded(3))
    b = rollout(model, processor, prompts, 4, sampling, _seeded(3))
    c = rollout(model, processor, prompts, 4, sampling, _seeded(4))
    for name in ("tokens", "logps", "full_logps"):
        x, y = _flat(getattr(a, name)), _flat(getattr(b, name))
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert a.texts == b.texts != c.texts
    assert len(set(_flat(a.texts))) > 6  # completions of a group differ


def test_leaving_the_batch_changes_nothing(exact, monkeypatch):
    model, processor = exact
    _often_stop(model, processor, 6.0)
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=30)
    moved = []
    original = rollout_module.SharedPrefix.select
    monkeypatch.setattr(
        rollout_module.SharedPrefix,
        "select",
        lambda self, prompts, rows: (moved.append(len(rows)), original(self, prompts, rows))[1],
    )
    with_leaving = rollout(model, processor, prompts, 6, sampling, _seeded())
    assert len(moved) > 1 and moved == sorted(moved, reverse=True)
    monkeypatch.setattr(rollout_module, "_COMPACT_AT", 2.0)
    without = rollout(model, processor, prompts, 6, sampling, _seeded())
    for x, y in zip(_flat(with_leaving.tokens), _flat(without.tokens), strict=True):
        assert torch.equal(x, y)
    assert with_leaving.finished == without.finished


def _same(ours, theirs):
    assert ours.finished == theirs.finished
    for name in ("tokens", "logps", "full_logps"):
        for x, y in zip(_flat(getattr(ours, name)), _flat(getattr(theirs, name)), strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-9), name


@pytest.mark.parametrize("bias", [2.5, 6.0])
def test_static_shapes_draw_the_same(exact, bias):
    """Over several sizes of the buffer (the first holds 32), or with rows that leave."""
    model, processor = exact
    _often_stop(model, processor, bias)
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=80)
    dynamic = rollout(model, processor, prompts, 6, sampling, _seeded())
    shapes = []
    original = rollout_module.TokenStep.__call__

    def watching(self, *inputs):
        own = self.memory._own[0][0]
        shapes.append((len(self.memory.bias), len(own), own.shape[2]))
        return original(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module.TokenStep, "__call__", watching)
        static = dataclasses.replace(sampling, decoding="static")
        _same(rollout(model, processor, prompts, 6, static, _seeded()), dynamic)
    longest = max(map(len, _flat(dynamic.tokens)))
    assert len(shapes) == longest - 1
    prompts_left, rows_left, capacity = map(set, zip(*shapes, strict=True))
    # 6 completions a prompt go to 3, 2, 1; 5 prompts to 3, 2, 1.
    assert len(prompts) == 5
    assert rows_left <= {p * g for p in (5, 3, 2, 1) for g in (6, 3, 2, 1)}
    assert prompts_left <= {5, 3, 2, 1}
    if bias == 2.5:
        assert capacity == {32, 64, 128} and len(rows_left) > 1
    else:
        assert len(rows_left) > 2 and len(prompts_left) > 1
    # Ended rows leave: at least half of what is run is still needed on average.
    alive = [sum(len(c) > step + 1 for c in _flat(dynamic.tokens)) for step in range(longest - 1)]
    assert sum(alive) > 0.4 * sum(rows for _, rows, _ in shapes)


class _FakeGraph:
    """Records a step as CUDA does: a replay reads and writes the very tensors of the recording, and
    no Python runs that could read anything else."""

    recorded: ClassVar[list] = []
    replays = 0

    def __init__(self):
        self.recorded.append(self)

    def capture_begin(self, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")

    def capture_end(self):
        step = _RecordedStep.last
        # The memory as it is now: the rollout goes on to other buffers.
        memory = dict(step.memory.__dict__)
        for name in ("prefix", "states", "_own"):
            memory[name] = {i: type(x)(x) for i, x in memory[name].items()}
        self.tape = step, memory, step.inputs, step.outputs

    def replay(self):
        type(self).replays += 1
        step, memory, inputs, outputs = self.tape
        now = step.memory.__dict__
        step.memory.__dict__ = dict(memory)
        for held, new in zip(outputs, rollout_module.TokenStep.run(step, *inputs), strict=True):
            held.copy_(new)
        step.memory.__dict__ = now


class _RecordedStep(rollout_module.TokenStep):
    last = None
    run = rollout_module.TokenStep.__call__

    def __call__(self, *inputs):
        self.inputs, self.outputs = inputs, self.run(*inputs)
        _RecordedStep.last = self
        return self.outputs


class _Stream(contextlib.nullcontext):
    def wait_stream(self, other):
        assert isinstance(other, _Stream)


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """Rollouts with "static" shapes record graphs; returns what they are recorded as."""

    def refuse(*_):
        raise AssertionError("a recording must not stop the process for this")

    _FakeGraph.recorded.clear()
    _FakeGraph.replays = 0
    monkeypatch.setattr(_RecordedStep, "run", rollout_module.TokenStep.__call__)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _FakeGraph)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    for module, name in ((gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(rollout_module, "TokenStep", _RecordedStep)
    monkeypatch.setattr(rollout_module, "resolve_decoding", lambda *_: "graphs")
    monkeypatch.setattr(
        rollout_module, "token_step", lambda step, *_: rollout_module.GraphedStep(step)
    )
    yield _FakeGraph.recorded
    graphs_module.forget_recordings()


def test_graphs_need_a_gpu(exact):
    model, processor = exact
    with pytest.raises(ValueError, match="'graphs' needs a CUDA device, the model is on cpu"):
        rollout(model, processor, _prompts(processor), 2, SamplingConfig(decoding="graphs"))


def test_graphs_are_recorded_for_each_shape_and_serve_later_rollouts(exact, request):
    """The layer above static shapes, with a stand-in for what torch.cuda records."""
    model, processor = exact
    _often_stop(model, processor, 4.0)
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=40)
    other = [processor.prompt("Other words."), *prompts[1:]]  # the same shapes, padded
    seeds = (0, 0, 1)
    dynamic = [
        rollout(model, processor, p, 6, sampling, _seeded(seed))
        for p, seed in zip((prompts, prompts, other), seeds, strict=True)
    ]
    recorded = request.getfixturevalue("graphs_on_the_cpu")
    graphed = [rollout(model, processor, prompts, 6, sampling, _seeded())]
    first = len(recorded)
    longest = max(map(len, _flat(dynamic[0].tokens)))
    assert 2 <= first < longest / 3
    graphed.append(rollout(model, processor, prompts, 6, sampling, _seeded()))
    assert len(recorded) == first  # nothing new
    graphed.append(rollout(model, processor, other, 6, sampling, _seeded(1)))
    assert len(recorded) < 2 * first  # rows left at other times, in other numbers
    assert _FakeGraph.replays == sum(max(map(len, _flat(d.tokens))) - 1 for d in dynamic)
    for ours, theirs in zip(graphed, dynamic, strict=True):
        _same(ours, theirs)


def test_recordings_hold_for_one_state_of_the_model_and_one_way_to_sample(exact, graphs_on_the_cpu):
    model, processor = exact
    prompts, recorded = _prompts(processor)[1:2], graphs_on_the_cpu
    sampling = SamplingConfig(max_new_tokens=3)
    kept = graphs_module.recordings_of(model)

    def count(sampling=sampling):
        before = len(recorded)
        rollout(model, processor, prompts, 2, sampling, _seeded())
        return len(recorded) - before

    assert (count(), count(), len(kept)) == (1, 0, 1)
    # An optimiser's step changes values in place, which a graph reads again.
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert count() == 0
    assert count(dataclasses.replace(sampling, temperature=0.5)) == 1
    assert count(dataclasses.replace(sampling, max_new_tokens=4)) == 0
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert (count(), len(kept)) == (1, 1)
    graphs_module.forget_recordings()
    assert (len(kept), count()) == (0, 1)
    for i in range(40):
        kept.add(i, None)
    assert len(kept) == 16 and kept.find(39 - 15) is None and 24 in kept._by_key


def test_a_step_draws_no_random_numbers(exact):
    """A graph that did would repeat them, or need the generator's state."""
    model, processor = exact
    prompts = _prompts(processor)[1:2]
    states = []
    original = rollout_module.TokenStep.__call__

    def watching(self, *inputs):
        before = torch.get_rng_state()
        out = original(self, *inputs)
        states.append(torch.equal(before, torch.get_rng_state()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module.TokenStep, "__call__", watching)
        rollout(model, processor, prompts, 2, SamplingConfig(max_new_tokens=4, top_p=0.9))
    assert len(states) == 3 and all(states)


def test_graphs_are_recorded_and_replayed_on_the_models_device(monkeypatch):
    """The current device is 0 and the model on 1: streams and graphs are the current device's."""
    current, seen = ["cuda:0"], []

    class Input:
        device, shape, dtype = "cuda:1", (1,), torch.int64

        def clone(self):
            return self

        def copy_(self, other):
            seen.append(("copy", current[-1]))

    class OnCurrent(contextlib.nullcontext):
        def __init__(self, *args, **options):
            super().__init__()
            seen.append((type(self).__name__, current[-1]))

        def wait_stream(self, other):
            pass

        def capture_begin(self, **options):
            seen.append(("capture", current[-1]))

        capture_end = capture_begin

        def replay(self):
            seen.append(("replay", current[-1]))

    @contextlib.contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, type(name, (OnCurrent,), {}))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    step = lambda x: x  # noqa: E731 - with an attribute
    step.memory = SimpleNamespace(version=0, states={}, prompts=1, tensors=list)
    step.model, step.banned, step.sampling = (
        torch.nn.Linear(1, 1),
        torch.tensor([3]),
        SamplingConfig(),
    )
    rollout_module.GraphedStep(step)(Input())
    assert {what for what, _ in seen} == {
        "CUDAGraph", "Stream", "current_stream", "graph_pool_handle", "capture", "copy", "replay"
    }  # fmt: skip
    assert {where for _, where in seen} == {"cuda:1"}
    assert current == ["cuda:0"]


def test_the_default_is_static_on_cuda_alone():
    for device, expected in (("cuda", "static"), ("cpu", "dynamic"), ("mps", "dynamic")):
        assert rollout_module.resolve_decoding("auto", torch.device(device)) == expected
        assert rollout_module.resolve_decoding("static", torch.device(device)) == "static"


# Upper 1e-4 quantiles of chi-square, by degrees of freedom (Wilson and Hilferty's cube, which is
# within 0.5 % of them from 3 on).
def _chi_square_limit(freedom, z=3.719):
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 6, 1.0), (1.0, 0, 0.7), (1.3, 12, 0.8)],
)
def test_completions_are_distributed_as_those_of_generate(loaded, temperature, top_k, top_p):
    """Chi-square of homogeneity over the first two tokens, sampled 4000 times by either."""
    model, processor = loaded
    count = 4000
    prompt = _prompts(processor)[1]
    banned = processor.banned_ids(len(model.lm_head.weight)).tolist()
    sampling = SamplingConfig(temperature, top_p, top_k, max_new_tokens=2)
    ours = rollout(model, processor, [prompt], count, sampling, _seeded(7)).tokens[0]
    torch.manual_seed(8)
    theirs = model.generate(
        input_ids=prompt.input_ids[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=True,
        num_return_sequences=count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=2,
        suppress_tokens=banned,
        eos_token_id=processor.stop_id,
        pad_token_id=processor.stop_id,
    )[:, len(prompt) :]
    # After a stop in the first place generate pads with it.
    sampled = [tuple(row.tolist() if len(row) == 2 else [int(row[0])] * 2) for row in ours]
    counts = Counter(sampled), Counter(map(tuple, theirs.tolist()))
    assert len(theirs) == count == len(sampled)
    cells, rest = [], [0, 0]
    for key in counts[0] | counts[1]:
        pair = [c[key] for c in counts]
        if sum(pair) >= 20:
            cells.append(pair)
        else:
            rest = [a + b for a, b in zip(rest, pair, strict=True)]
    cells += [rest] if sum(rest) >= 20 else []
    assert len(cells) > 10
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    assert statistic < _chi_square_limit(len(cells) - 1)
    # The test has power: a twentieth of the samples more in one cell is outside.
    moved = [[a, b] for a, b in cells]
    moved[0][0] += count // 20
    assert sum((a - b) ** 2 / (a + b) for a, b in moved) > _chi_square_limit(len(cells) - 1)


def test_ends_are_marked(loaded):
    model, processor = loaded
    _often_stop(model, processor, 5.0)
    got = rollout(
        model, processor, _prompts(processor), 6, SamplingConfig(max_new_tokens=8), _seeded()
    )
    assert set(_flat(got.finished)) == {True, False}
    for tokens, finished, logps in zip(
        _flat(got.tokens), _flat(got.finished), _flat(got.logps), strict=True
    ):
        assert len(logps) == len(tokens)
        assert int((tokens == processor.stop_id).sum()) == finished
        assert tokens[-1] == processor.stop_id if finished else len(tokens) == 8


def test_stop_strings_end_a_completion(loaded):
    model, processor = loaded
    prompts = _prompts(processor)[1:2]
    free = rollout(model, processor, prompts, 4, SamplingConfig(max_new_tokens=12), _seeded())
    stop = free.texts[0][0][3:5]
    sampling = SamplingConfig(max_new_tokens=12, stop=(stop,))
    got = rollout(model, processor, prompts, 4, sampling, _seeded())
    assert got.finished[0][0] and len(got.tokens[0][0]) < 12
    for before, after, tokens in zip(free.texts[0], got.texts[0], got.tokens[0], strict=True):
        assert (stop in before) == (stop in after)
        assert stop not in processor.decode(tokens[:-1])


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_stop_strings_are_those_of_the_whole_text_and_cost_no_copy_a_row(
    loaded, decoding, monkeypatch
):
    """Stops of one to eight bytes, within letters of several bytes too, against the whole text."""
    model, processor = loaded
    prompts, steps = _prompts(processor)[1:3], 24
    sampling = SamplingConfig(max_new_tokens=steps, decoding=decoding)
    free = rollout(model, processor, prompts, 6, sampling, _seeded())
    texts = _flat(free.texts)
    stops = tuple(
        texts[i][at : at + n] for i, at, n in ((0, 5, 2), (4, 9, 3), (7, 3, 1), (9, 8, 8))
    )
    stops = tuple(stop for stop in stops if stop)
    assert len(stops) >= 3
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (copies.append(1), original(x))[1])
    got = rollout(
        model, processor, prompts, 6, dataclasses.replace(sampling, stop=stops), _seeded()
    )
    # One a step, and two for the result.
    assert len(copies) == max(map(len, _flat(got.tokens))) + 2
    for before, after in zip(_flat(free.tokens), _flat(got.tokens), strict=True):
        length = next(
            (
                n
                for n in range(1, len(before) + 1)
                if any(stop in processor.decode(before[:n]) for stop in stops)
            ),
            len(before),
        )
        assert torch.equal(after, before[:length])
    assert len({len(x) for x in _flat(got.tokens)}) > 2


def test_a_stop_string_of_tokens_of_one_byte_each(loaded):
    _, processor = loaded
    letters = processor.tokenizer.convert_tokens_to_ids(list("zabcdefgh"))
    assert processor.decode(letters) == "zabcdefgh"
    run = SimpleNamespace(processor=processor, sampling=SamplingConfig(stop=("q", "abcdefgh")))
    stops = [rollout_module._Run._stops(run, letters[:n]) for n in range(1, len(letters) + 1)]
    assert stops == [False] * 8 + [True]


def test_control_tokens_are_never_drawn(loaded):
    model, processor = loaded
    banned = processor.banned_ids(len(model.lm_head.weight))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with torch.no_grad():
        model.lm_head.bias[banned] = 100.0
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=10)
        got = rollout(model, processor, _prompts(processor), 3, sampling, _seeded())
        assert not torch.isin(torch.cat(_flat(got.tokens)), banned).any()
        assert max(x.max() for x in _flat(got.full_logps)) < -50


def test_the_model_is_left_as_it_was(loaded):
    model, processor = loaded
    model.train()
    checkpoint_activations(model)
    rollout(model, processor, _prompts(processor), 2, SamplingConfig(max_new_tokens=2), _seeded())
    assert model.training
    with pytest.raises(ValueError, match="0 prompts"):
        rollout(model, processor, [], 2, SamplingConfig(max_new_tokens=2))
    assert model.training
    with pytest.raises(ValueError, match="group size of 0"):
        rollout(model, processor, _prompts(processor), 0, SamplingConfig(max_new_tokens=2))


def test_half_precision_stays_close_to_the_training_forward(directory):
    model, processor = checkpoint.load(directory, dtype="bfloat16")
    prompts = _prompts(processor)
    sampling = SamplingConfig(max_new_tokens=12)
    got = rollout(model, processor, prompts, 3, sampling, _seeded())
    groups = [Group(p, c) for p, c in zip(prompts, got.tokens, strict=True)]
    with torch.no_grad():
        hidden, labels, _ = completion_hidden(model, groups)
        logits = F.linear(hidden, *lm_head(model)).float()
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    gap = torch.cat(_flat(got.full_logps)) - expected
    assert got.logps[0][0].dtype == torch.float32
    assert gap.abs().mean() < 0.15


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
def test_adapters_take_part(exact):
    from peft import LoraConfig, get_peft_model

    model, processor = exact
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=8)
    before = rollout(model, processor, prompts, 2, sampling, _seeded())
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"]))
    same = rollout(adapted, processor, prompts, 2, sampling, _seeded())
    assert same.texts == before.texts
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert rollout(adapted, processor, prompts, 2, sampling, _seeded()).texts != before.texts


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 7, 0.5), (1.0, 1, 1.0)],
)
def test_draws_follow_the_distribution_of_transformers(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 12, dtype=torch.float64) * 2
    banned = torch.tensor([2, 9])
    expected = logits.index_fill(1, banned, -torch.inf)
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        expected = warper(None, expected)
    expected = expected.softmax(-1)[0]
    # Evenly spread numbers give each token its probability's share of them, to one in each.
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = logits.expand(count, -1).contiguous()
    tokens, logps, full, possible = sample(rows, uniforms, banned, config)
    assert possible.all()
    share = torch.bincount(tokens, minlength=12).double() / count
    assert torch.allclose(share, expected, rtol=0, atol=2 / count)
    assert torch.allclose(logps, expected.log()[tokens], rtol=0, atol=1e-12)
    plain = (logits[0] / temperature).log_softmax(-1)
    assert torch.allclose(full, plain[tokens], rtol=0, atol=1e-12)


def test_ends_of_the_unit_interval_give_possible_tokens():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 1] = logits[:, 4] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logps, *_ = sample(logits, uniforms, torch.tensor([0, 5]), SamplingConfig())
    assert tokens.tolist() == [1, 4]
    assert torch.allclose(logps.exp(), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_without_a_distribution_are_reported_of(temperature, value):
    logits = torch.zeros(3, 6)
    logits[1] = value
    uniforms = torch.full((3,), 0.5, dtype=torch.float64)
    sampled = sample(logits, uniforms, torch.tensor([0]), SamplingConfig(temperature=temperature))
    assert sampled.tokens.max() < 6  # an index past the end would end the process on a GPU
    with pytest.raises(ValueError, match=r"nan or infinite in rows \[1\] of 3"):
        check_possible(sampled.possible)


def test_log_probs_under_what_was_sampled_from_and_under_the_whole_vocabulary():
    """By hand: probabilities 0.5, 0.3, 0.2; the first token is banned, top-p then leaves one."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    banned, uniforms = torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64)
    got = sample(logits, uniforms, banned, SamplingConfig())
    assert got.tokens.tolist() == [1]
    assert float(got.logps) == pytest.approx(math.log(0.3 / 0.5), abs=1e-6)
    assert float(got.full_logps) == pytest.approx(math.log(0.3), abs=1e-6)
    got = sample(logits, uniforms, banned, SamplingConfig(top_p=0.5))
    assert float(got.logps) == pytest.approx(0.0, abs=1e-6)
    assert float(got.full_logps) == pytest.approx(math.log(0.3), abs=1e-6)
    got = sample(logits, uniforms, banned, SamplingConfig(temperature=0.0))
    assert float(got.full_logps) == pytest.approx(math.log(0.3), abs=1e-6)


def test_truncation_keeps_ties_of_the_last_place_and_the_first_token():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert torch.isfinite(truncate(scores, 2, 1.0)).tolist() == [[False, True, True, True]]
    assert torch.isfinite(truncate(scores, 0, 1e-9)).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("stop", "text"),
        ("stop", ("",)),
        ("decoding", "quick"),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SamplingConfig(), **{field: value})


def test_prompts_draw_the_same_whatever_others_are_there(exact):
    model, processor = exact
    _often_stop(model, processor, 3.0)
    prompts, sampling = _prompts(processor), SamplingConfig(max_new_tokens=12)
    together = rollout(model, processor, prompts, 3, sampling, _seeded())
    generator = _seeded()
    apart = [rollout(model, processor, [p], 3, sampling, generator) for p in prompts]
    assert _flat(one.texts for one in apart) == together.texts
    assert len(set(_flat(together.texts))) > 10
