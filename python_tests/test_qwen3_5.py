"""Qwen3.5: the delta rule, states that a group shares and rows keep, and reasoning that the chat
template opens."""

import contextlib
import dataclasses
import sys
import types

import family_case as case
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from vcr1_fast.data.records import Record
from vcr1_fast.model import attention, decode
from vcr1_fast.model import rollout as rollout_module
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.decode import SharedPrefix
from vcr1_fast.model.family import family_named
from vcr1_fast.model.packing import Group, Span
from vcr1_fast.model.qwen3_5 import delta_net, delta_rule
from vcr1_fast.model.qwen3_5.delta_rule import chunked, one_token
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.sft import right_answer

FAMILY = family_named("qwen3_5")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return case.write(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5")


@pytest.fixture
def loaded(directory, monkeypatch):
    return case.load_exact(monkeypatch, directory, "qwen3_5")


# --- the rule -------------------------------------------------------------------------------------


def _inputs(length, rows=2, heads=3, key=6, value=5, decay=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, keys = normal(rows, length, heads, key), normal(rows, length, heads, key)
    values, state = normal(rows, length, heads, value), normal(rows, heads, key, value)
    g = -decay * torch.rand(rows, length, heads, generator=generator, dtype=torch.float64)
    beta = normal(rows, length, heads).sigmoid()
    return [x.to(dtype) for x in (query, keys, values, g, beta, state)]


def _by_definition(query, key, value, decay, beta, state):
    """The rule as written in `delta_rule.py`, a token and a head at a time."""
    rows, length, heads, dim = query.shape
    out = torch.zeros_like(value)
    last = torch.zeros_like(state)
    for row in range(rows):
        for head in range(heads):
            s = state[row, head]
            for t in range(length):
                k, q = key[row, t, head], query[row, t, head]
                k, q = k / (k @ k + 1e-6).sqrt(), q / (q @ q + 1e-6).sqrt()
                s = s * decay[row, t, head].exp()
                s = s + beta[row, t, head] * torch.outer(k, value[row, t, head] - s.T @ k)
                out[row, t, head] = s.T @ q / dim**0.5
            last[row, head] = s
    return out, last


@pytest.mark.parametrize("length", [1, 31, 33, 65, 130])
def test_chunks_compute_what_tokens_one_by_one_do(length):
    arguments = _inputs(length)
    out, state = chunked(*arguments)
    expected, last = _by_definition(*arguments)
    assert (out - expected).abs().max() < 1e-12
    assert (state - last).abs().max() < 1e-12
    # A token at a time, from the state before it.
    *inputs, state = arguments
    state, outputs = state.clone(), []
    for t in range(length):
        outputs.append(one_token(*(x[:, t : t + 1] for x in inputs), state))
    assert (torch.cat(outputs, dim=1) - expected).abs().max() < 1e-12
    assert (state - last).abs().max() < 1e-12


@pytest.mark.parametrize("decay", [0.01, 1.0, 30.0, 250.0])
@pytest.mark.parametrize(
    ("length", "from_zero"), [(1, False), (40, True), (64, False), (129, True)]
)
def test_the_rule_is_transformers(length, decay, from_zero):
    """Values and gradients, float32 there: against the error that float32 itself makes."""
    given_state = None if from_zero else _inputs(length, decay=decay)[-1]
    arguments = _inputs(length, decay=decay)[:-1]
    results = []
    for dtype, rule in (
        (torch.float64, delta_rule.delta_rule),
        (torch.float32, delta_rule.delta_rule),
        (torch.float32, None),
    ):
        leaves = [x.clone().to(dtype).requires_grad_() for x in arguments]
        state = None if given_state is None else given_state.clone().to(dtype).requires_grad_()
        if rule is not None:
            out, last = rule(*leaves, state)
        else:
            q, k, v, g, beta = leaves
            out, last = modeling_qwen3_5.torch_chunk_gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
        (out.square().sum() + last.sum()).backward()
        found = [out, last, *(x.grad for x in leaves), *([] if state is None else [state.grad])]
        assert all(bool(x.isfinite().all()) for x in found)
        results.append([x.detach().double() for x in found])
    exact, ours, theirs = results
    for true, mine, other in zip(exact, ours, theirs, strict=True):
        scale = float(true.abs().max()) + 1e-6
        error = float((other - true).abs().max())
        # Sums of terms of size 1 cancel in a decay's gradient.
        assert float((mine - true).abs().max()) < 4 * error + 1e-5 * scale + 1e-6


def test_padding_behind_a_sequence_leaves_the_state():
    arguments = _inputs(50)
    _, expected = chunked(*(x[:, :37] for x in arguments[:-1]), arguments[-1])
    for x in arguments[:-1]:
        x[:, 37:] = 0
    _, state = chunked(*arguments)
    assert (state - expected).abs().max() < 1e-14


def test_autocast_does_not_reach_the_rule():
    arguments = _inputs(70, dtype=torch.float32)
    expected, state = delta_rule.delta_rule(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got, after = delta_rule.delta_rule(*arguments)
        here = arguments[-1].clone()
        step = one_token(*(x[:, :1] for x in arguments[:-1]), here)
        assert step.dtype == here.dtype == torch.float32
    assert torch.equal(got, expected) and torch.equal(after, state)
    assert (step - expected[:, :1]).abs().max() < 1e-5


def test_the_backward_pass_computes_the_rule_a_second_time():
    sizes = {}
    for name, rule in (("kept", chunked), ("recomputed", delta_rule.delta_rule)):
        leaves = [x.requires_grad_() for x in _inputs(128, heads=2, key=32, value=32)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=saved: s.append(x) or x, lambda x: x
        ):
            out, _ = rule(*leaves)
        out.sum().backward()
        sizes[name] = {x.untyped_storage().data_ptr(): x.nbytes for x in saved}
        sizes[name] = sum(sizes[name].values())
    given = sum(x.nbytes for x in leaves)
    assert sizes["recomputed"] <= given < sizes["kept"] / 4
    # The planner's count: float32 where this is float64, and gradients besides.
    counted = delta_rule.rule_bytes(2, 32, 32) * 2 * 128
    assert sizes["kept"] < counted < 2.5 * sizes["kept"]


def test_the_installed_kernels_are_called_by_their_names(monkeypatch):
    """FLA's interface: query, key and value by position, the others by name."""
    arguments = _inputs(40)
    expected = chunked(*arguments)

    def chunk_gated_delta_rule(
        q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    ):  # fmt: skip
        assert output_final_state and use_qk_l2norm_in_kernel
        assert scale is None and cu_seqlens is None
        return chunked(q, k, v, g, beta, initial_state)

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert not delta_rule._fla_takes(arguments[2])  # the CPU has its own
    monkeypatch.setattr(delta_rule, "_fla_takes", lambda value: True)
    for got, wanted in zip(delta_rule.delta_rule(*arguments), expected, strict=True):
        assert torch.equal(got, wanted)


# --- groups ---------------------------------------------------------------------------------------


def _text_groups(processor, lengths, seed=0):
    """Groups of bare prompts: [(tokens of the prompt, lengths of completions)]."""
    generator = torch.Generator().manual_seed(seed)
    base = processor.prompt("x")

    def tokens(count):
        return torch.randint(0, 256, (count,), generator=generator)

    return [
        Group(
            dataclasses.replace(
                base,
                input_ids=tokens(size),
                mm_token_type_ids=torch.zeros(size, dtype=torch.int64),
                positions=torch.arange(size).expand(3, -1),
            ),
            [tokens(n) for n in own],
        )
        for size, own in lengths
    ]


PACKS = {
    "prompts shorter than the convolution": [(1, [4, 3]), (2, [1, 2]), (3, [5])],
    "chunks exactly": [(64, [33, 2]), (128, [65])],
    "a chunk and one": [(65, [66, 1, 7])],
    "completions of one token": [(20, [1, 1]), (31, [1])],
    "one completion": [(70, [34])],
    "lengths far apart": [(300, [2, 190]), (5, [3]), (170, [1, 90]), (7, [4])],
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_packs_of_any_lengths(loaded, pack):
    model, processor = loaded
    groups, stock = _text_groups(processor, pack), case.stock(model)
    ours, expected = case.shared(model, groups), case.alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    case.assert_same(case.gradients(model, ours), case.gradients(stock, expected), 1e-7)


def test_a_long_sequence_does_not_pad_short_ones():
    lengths = [300, 4000, 5, 310, 9000, 1, 4100]
    batches = delta_net._alike(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.6 * sum(lengths) + 7 * delta_net._SHORT
    assert len(batches) == 4


@pytest.mark.parametrize("last", ["linear_attention", "full_attention"])
@pytest.mark.parametrize("backend", ["fused", "merged", "varlen"])
def test_heads_of_256_and_either_kind_of_last_layer(backend, last, tmp_path, monkeypatch):
    layers = 2 if last == "full_attention" else 3
    sizes = {"head_dim": 256, "rotary_factor": 0.25, "layers": layers}
    path = case.write(tmp_path, "qwen3_5", **sizes)
    model, processor = case.load_exact(monkeypatch, path, "qwen3_5")
    assert model.config.text_config.layer_types[-1] == last
    attention.prepare_attention(model, backend)
    groups, stock = _text_groups(processor, [(9, [4, 2, 6])]), case.stock(model)
    ours, expected = case.shared(model, groups), case.alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    case.assert_same(case.gradients(model, ours), case.gradients(stock, expected), 1e-7)


def test_the_comparison_notices_states_that_are_lost_or_leak(loaded, monkeypatch):
    model, processor = loaded
    groups = _text_groups(processor, [(20, [9, 9, 9]), (13, [5, 9])])
    rule = delta_net.GroupDeltaNet._rule

    def changed(change):
        def run(self, x, decay, beta, before, state):
            if state is not None:
                before, state = change(before, state)
            return rule(self, x, decay, beta, before, state)

        return run

    changes = {
        "no state": lambda before, state: (before, torch.zeros_like(state)),
        "no inputs of the convolution": lambda before, state: (torch.zeros_like(before), state),
        "another completion's group": lambda before, state: (before, state.roll(1, 0)),
        "another's last inputs": lambda before, state: (before.roll(1, 0), state),
    }
    assert case.difference(model, groups) < 1e-9
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(delta_net.GroupDeltaNet, "_rule", changed(change))
            assert case.difference(model, groups) > 1e-3, name

    def leaking(self, x, decay, beta, before, state):
        """Completions one after another in one sequence, as a layer that knows no groups."""
        if state is None:
            return rule(self, x, decay, beta, before, state)
        rows, length = x.shape[:2]
        flat = [part.reshape(1, rows * length, -1) for part in (x, decay, beta)]
        out, last = rule(self, *flat, before[:1], state[:1])
        return out.view(rows, length, *out.shape[2:]), last.expand(rows, *last.shape[1:])

    with monkeypatch.context() as patch:
        patch.setattr(delta_net.GroupDeltaNet, "_rule", leaking)
        assert case.difference(model, groups[:1]) > 1e-3


def test_a_detached_state_is_noticed_in_the_gradients(loaded, monkeypatch):
    """The prompt must get the sum of its completions' gradients."""
    model, processor = loaded
    groups, stock = _text_groups(processor, [(20, [9, 4])]), case.stock(model)
    expected = case.gradients(stock, case.alone(stock, groups))
    rule = delta_net.GroupDeltaNet._rule

    def detached(self, x, decay, beta, before, state):
        return rule(self, x, decay, beta, before, None if state is None else state.detach())

    monkeypatch.setattr(delta_net.GroupDeltaNet, "_rule", detached)
    ours = case.gradients(model, case.shared(model, groups))
    with pytest.raises(AssertionError):
        case.assert_same(ours, expected, 1e-7)


def test_completions_may_run_behind_their_prompts_pass(loaded):
    """On what a pass over the prompt has recorded, as `model/prompt_state.py` does it: outputs and
    gradients of the pass over the whole pack."""
    model, _ = loaded
    net = model.model.language_model.layers[0].linear_attn
    hidden = torch.randn(1, 9 + 12, 32, dtype=torch.float64)
    span = Span(0, 9, (5, 1, 6), hidden.device)
    weights = torch.randn(1, 21, 32, dtype=torch.float64)
    whole = hidden.clone().requires_grad_()
    expected = net(whole, spans=(span,))
    (expected * weights).sum().backward()
    recorded = {}
    parts = hidden.clone().requires_grad_()
    prompt = net(
        parts[:, :9],
        spans=(Span(0, 9, (), hidden.device),),
        recorder=types.SimpleNamespace(record=lambda layer, *x: recorded.update({layer: x})),
    )
    assert list(recorded) == [0]
    suffix = types.SimpleNamespace(state=types.SimpleNamespace(layers=recorded), span=span)
    got = torch.cat([prompt, net(parts[:, 9:], suffix=suffix)], dim=1)
    (got * weights).sum().backward()
    assert (got - expected).abs().max() < 1e-12
    assert (parts.grad - whole.grad).abs().max() < 1e-12


def test_an_activation_other_than_the_released_one_is_refused(loaded):
    model, _ = loaded
    net = model.model.language_model.layers[0].linear_attn
    net.__class__ = modeling_qwen3_5.Qwen3_5GatedDeltaNet
    net.activation = "gelu"
    with pytest.raises(ValueError, match="a Gated DeltaNet layer has the activation 'gelu'"):
        prepare_attention(model)


def test_layers_of_another_kind_are_refused(loaded):
    model, _ = loaded
    config = model.model.language_model.config
    for kinds in (["linear_attention"] * 5, ["full_attention", "sliding_attention"]):
        config.layer_types = kinds
        with pytest.raises(ValueError, match="expected layers of full_attention"):
            FAMILY.kv_layers(config)


# --- states in a rollout --------------------------------------------------------------------------


@pytest.fixture
def memories(monkeypatch):
    """The memories of the rollouts that follow."""
    made = []

    class Kept(SharedPrefix):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(rollout_module, "SharedPrefix", Kept)
    return made


def _often_stop(model, processor, bias):
    with torch.no_grad():
        head = model.lm_head
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight), dtype=head.weight.dtype))
        head.bias[processor.stop_id] = bias


def test_the_planner_counts_keys_and_states(loaded, memories):
    model, processor = loaded
    groups = _text_groups(processor, [(20, [1]), (7, [1])])
    rollout(model, processor, [g.prompt for g in groups], 3, SamplingConfig(max_new_tokens=4))
    (memory,) = memories
    assert sorted(memory.prefix) == [1, 3] and sorted(memory.states) == [0, 2, 4]
    states = [x for state in memory.states.values() for x in state]
    assert {len(x) for x in states} <= {6, 4, 3, 2, 1}
    foot = Footprint.of(model)
    per_row = sum(x[0].nbytes for x in states)
    assert per_row == 2 * foot.per_state  # counted for float32, as every released model has it
    keys = sum(x[0, :, 0].nbytes for pair in memory.prefix.values() for x in pair)
    assert keys == foot.per_cached
    without = dataclasses.replace(foot, per_state=0.0)
    more = foot.rollout_bytes([20, 7], 3, 4, truncated=False)
    assert more - without.rollout_bytes([20, 7], 3, 4, truncated=False) == 8 * foot.per_state


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_rows_that_leave_take_their_states_along(loaded, memories, decoding):
    model, processor = loaded
    _often_stop(model, processor, 6.0)
    groups = _text_groups(processor, [(20, [1]), (7, [1]), (30, [1])])
    sampling = SamplingConfig(max_new_tokens=24, decoding=decoding)
    prompts = [g.prompt for g in groups]
    got = rollout(model, processor, prompts, 4, sampling, torch.Generator().manual_seed(3))
    (memory,) = memories
    lengths = sorted(len(c) for group in got.tokens for c in group)
    assert lengths[0] + 4 < lengths[-1]
    assert memory.version > 0 and len(memory.states[0][0]) < 12  # rows have left
    sampled = torch.cat([one for group in got.full_logps for one in group])
    again = [Group(p, tokens) for p, tokens in zip(prompts, got.tokens, strict=True)]
    with torch.no_grad():
        assert (case.shared(model, again) - sampled).abs().max() < 1e-9


def test_the_comparison_notices_states_of_other_rows(loaded, monkeypatch):
    model, processor = loaded
    groups = _text_groups(processor, [(20, [1])])
    prompts = [g.prompt for g in groups]
    each = decode.SharedPrefix._each_state

    def shifted(self, change):
        each(self, change)
        self.states = {i: tuple(x.roll(1, 0) for x in s) for i, s in self.states.items()}

    _often_stop(model, processor, 6.0)
    monkeypatch.setattr(decode.SharedPrefix, "_each_state", shifted)
    sampling = SamplingConfig(max_new_tokens=24)
    got = rollout(model, processor, prompts, 6, sampling, torch.Generator().manual_seed(3))
    sampled = torch.cat([one for group in got.full_logps for one in group])
    again = [Group(p, tokens) for p, tokens in zip(prompts, got.tokens, strict=True)]
    with torch.no_grad():
        assert (case.shared(model, again) - sampled).abs().max() > 1e-3


def test_recording_a_graph_does_not_advance_the_states(loaded, monkeypatch):
    """A step is run once before it is recorded; recording itself runs nothing."""
    model, processor = loaded
    _often_stop(model, processor, 2.0)
    prompts = [g.prompt for g in _text_groups(processor, [(20, [1]), (7, [1])])]
    sampling = SamplingConfig(max_new_tokens=12, decoding="static")
    static = rollout(model, processor, prompts, 4, sampling, torch.Generator().manual_seed(1))
    current, recorded = [], []

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            recorded.append(self)
            graphed = current[-1]
            states = [x for state in graphed.step.memory.states.values() for x in state]
            self.before = [(x, x.clone()) for x in states]

        def capture_end(self):
            for state, x in self.before:
                state.copy_(x)
            graphed = current[-1]
            self.tape = [graphed.step, graphed.step.given, graphed.step.last]

        def replay(self):
            step, inputs, outputs = self.tape
            for held, new in zip(outputs, step(*inputs), strict=True):
                held.copy_(new)

    class Step(rollout_module.TokenStep):
        def __call__(self, *inputs):
            self.given, self.last = inputs, super().__call__(*inputs)
            return self.last

    class Graphed(rollout_module.GraphedStep):
        def __call__(self, *inputs):
            current.append(self)
            return super().__call__(*inputs)

    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda stream: stream),
        ("device", contextlib.nullcontext),
        ("graph_pool_handle", object),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(rollout_module, "TokenStep", Step)
    monkeypatch.setattr(rollout_module, "token_step", lambda step, *_: Graphed(step))
    graphs = rollout(model, processor, prompts, 4, sampling, torch.Generator().manual_seed(1))
    assert recorded
    for mine, other in zip(graphs.tokens, static.tokens, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    for mine, other in zip(graphs.full_logps, static.full_logps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_the_prediction_is_near_what_autograd_keeps(directory):
    from vcr1_fast.model import checkpoint

    model, processor = checkpoint.load(directory)
    groups = _text_groups(processor, [(150, [40, 30])])
    saved = {}

    def keep(x):
        if not any(x.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in own):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    own = list(model.parameters())
    foot = Footprint.of(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = case.shared(model, groups)
    kept = sum(saved.values()) - 3 * out.shape[0] * model.config.text_config.vocab_size * 4
    tokens = 150 + 39 + 29
    predicted = foot.bytes(tokens, 0, 0) - foot.fixed
    assert kept < predicted < 3 * kept
    checkpoint_activations(model)
    assert Footprint.of(model).per_token < foot.per_token


# --- reasoning that the chat template opens -------------------------------------------------------

RECORD = Record(
    id="a",
    task="temporal_grounding",
    video="a.mp4",
    prompt={"event": "the red circle"},
    answer=[1.5, 3.5],
    metadata={"reasoning": "It is there from 1.5."},
)
ANSWER = "<answer>1.5 to 3.5</answer>"


def test_prompts_open_the_reasoning_or_close_it(loaded):
    _, processor = loaded
    opened, closed = (processor.prompt("When?", think=think) for think in (True, False))
    assert opened.text.endswith("<|im_start|>assistant\n<think>\n")
    assert closed.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (opened.opened, closed.opened) == ("<think>\n", "")
    assert processor.prompt("When?").text == opened.text  # the template's default
    asked = processor.prompt("Is <think> a tag?", think=False)
    assert asked.opened == ""


def test_a_template_that_cannot_do_what_is_asked_is_refused(loaded):
    _, processor = loaded
    always = dataclasses.replace(processor, chat_template="{{ 'a<think>\\n' }}")
    assert always.prompt("x", think=True).opened == "<think>\n"
    with pytest.raises(ValueError, match="opens <think> whatever enable_thinking says"):
        always.prompt("x", think=False)
    never = dataclasses.replace(processor, chat_template="{{ 'a<think>\\n\\n</think>\\n\\n' }}")
    assert never.prompt("x", think=False).opened == ""
    with pytest.raises(ValueError, match="closes <think> whatever enable_thinking says"):
        never.prompt("x", think=True)


@pytest.mark.parametrize("think", [True, False])
def test_a_target_goes_on_where_the_prompt_ends(loaded, think):
    """Prompt and target together hold one block of reasoning, and earn the whole format reward."""
    _, processor = loaded
    prompt = processor.prompt(TASKS["temporal_grounding"].prompt(RECORD, think), think=think)
    target = right_answer(RECORD, think, prompt.opened)
    turn = (prompt.text + target).rpartition("<|im_start|>assistant\n")[2]
    assert turn.count("<think>") == turn.count("</think>") == 1
    assert processor.decode(processor.completion(target)) == target
    score = TASKS["temporal_grounding"].score(prompt.opened + target, RECORD, 10.0, think=think)
    assert score["format"] == 1.0
    # A template that opens nothing: the target writes the tags itself.
    assert right_answer(RECORD, think) == (
        f"<think>It is there from 1.5.</think>{ANSWER}" if think else ANSWER
    )


@pytest.mark.parametrize(
    ("completion", "think", "right"),
    [
        (f"so\n</think>\n\n{ANSWER}", True, 1.0),
        (f"<think>so</think>{ANSWER}", True, 0.0),  # opened a second time
        (ANSWER, True, 0.0),  # the reasoning never ends
        (f"\n</think>{ANSWER}", True, 0.0),  # no reasoning
        (ANSWER, False, 1.0),
        (f"<think>so</think>{ANSWER}", False, 0.0),
        (f"so</think>{ANSWER}", False, 0.0),
    ],
)
def test_the_format_reward_knows_what_the_prompt_opened(loaded, completion, think, right):
    _, processor = loaded
    opened = processor.prompt("When?", think=think).opened
    score = TASKS["temporal_grounding"].score(opened + completion, RECORD, 10.0, think=think)
    assert score["format"] == right


def test_texts_of_a_rollout_are_whole_turns(loaded):
    model, processor = loaded
    sampling = SamplingConfig(max_new_tokens=3)
    for think, opened in ((True, "<think>\n"), (False, "")):
        prompt = processor.prompt("When?", think=think)
        got = rollout(model, processor, [prompt], 2, sampling, torch.Generator().manual_seed(0))
        for text, tokens in zip(got.texts[0], got.tokens[0], strict=True):
            assert text == opened + processor.decode(tokens)
