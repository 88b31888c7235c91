"""A group whose prompt runs once and its completions in parts, against the packed step: loss and
every gradient, for both families, full and by adapters, trained and frozen encoder, kept and
recomputed activations."""

import gc
import itertools
import random
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from vcr1_fast.model import checkpoint, forward, packing, prompt_state
from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.family import family_named
from vcr1_fast.model.forward import completion_hidden, prompt_pass
from vcr1_fast.model.vision import freeze_vision
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train import reference
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.loop import forward_backward
from vcr1_fast.train.planner import Footprint, MicroBatch, Planner

LOSS = GRPOLossConfig(loss_type="grpo", beta=0.05, entropy_coef=0.01)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
SIZES = {
    "qwen2_5_vl": {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "vision_hidden": 16},
    "qwen3_vl": {
        "hidden_size": 32,
        "layers": 4,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "vision_hidden": 16,
        "vision_heads": 1,
        "position_grid": 5,
        "initializer_range": 0.3,
    },
    "qwen3_5": {"hidden_size": 32, "layers": 4, "vision_hidden": 16, "vision_heads": 1},
}
# Completions of a group, and where it is cut.
CUTS = {
    "one suffix": ([9, 1, 7, 4], (0, 4)),
    "two": ([9, 1, 7, 4], (0, 2, 4)),
    "three, ragged": ([9, 1, 7, 4, 3], (0, 3, 4, 5)),
    "one each": ([5, 3, 8], (0, 1, 2, 3)),
    "single tokens": ([1, 1, 1], (0, 2, 3)),
    "a suffix of single tokens": ([6, 2, 1, 1], (0, 2, 4)),
}


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None
    times: np.ndarray | None = None


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Qwen3.5's norms without their casts to float32. Its delta rule takes completions as batches,
    in chunks of other sizes than the pack has: sums in another order, whose last bit a rounding to
    float32 would make 1e-7. The other families compute a row the same way whatever is beside it."""

    def norm(self, x):
        return self._norm(x) * (1.0 + self.weight)

    def gated(self, x, gate):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale * torch.nn.functional.silu(gate)

    monkeypatch.setattr(modeling_qwen3_5.Qwen3_5RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen3_5.Qwen3_5RMSNormGated, "forward", gated)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    family, path = family_named(request.param), tmp_path_factory.mktemp(request.param)
    config = family.tiny_config(vocab_limit=300, **SIZES[request.param])
    family.write_tiny(path, texts=["When is it visible? From 1.5 to 3.5 seconds."], config=config)
    return path


@pytest.fixture
def loaded(directory):
    return policy(directory)


def with_adapters(model):
    """Adapters in the language model and in the vision encoder of either family."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "o_proj", "down_proj", "linear_fc1", "in_proj_qkv"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    for name, parameter in adapted.to(model.dtype).named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def policy(directory, *, dtype=torch.float64, adapters=False, frozen=False, recomputed=False):
    model, processor = checkpoint.load(directory, dtype=dtype)
    if adapters:
        model = with_adapters(model)
    if frozen:
        freeze_vision(model)
    if recomputed:
        checkpoint_activations(model)
    return model.train(), processor


def group_of(processor, lengths, seed=0, frames=4):
    """A clip and an image, and completions with their advantages and reference log-probs."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    media = [
        Clip(noise.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8), fps)
        for n, fps in ((frames, 2.0), (1, None))
    ]
    completions = [torch.tensor([rng.randrange(256) for _ in range(n)]) for n in lengths]
    group = packing.Group(processor.prompt("When is it visible?", media), completions)
    count = sum(lengths)
    return PolicyGroup(
        group,
        torch.tensor([rng.uniform(-2, 2) for _ in lengths]),
        torch.tensor([rng.uniform(-7, -4) for _ in range(count)]),
        torch.tensor([rng.uniform(-7, -4) for _ in range(count)]),
    )


def step(model, group, schedule="packed", edges=(), *, on_policy=True, clear=True):
    """(loss, gradients, metrics) of the group's part of a step, by a schedule of the planner."""
    if clear:
        model.zero_grad(set_to_none=True)
    run = SimpleNamespace(
        model=model,
        config=SimpleNamespace(rollout=SimpleNamespace(temperature=0.8)),
        check_overdue=lambda: None,
    )
    settings = step_loss_config(LOSS, len(group.lengths), sum(group.lengths))
    batch = MicroBatch([group], schedule, edges)
    metrics = forward_backward(run, batch, settings, on_policy=on_policy)
    loss = sum(one["loss"].double() for one in metrics)
    named = model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}, metrics


def difference(ours, packed):
    """The largest error of the loss and of a gradient, relative to the gradient's largest value."""
    assert ours[1].keys() == packed[1].keys()
    errors = [float(abs(ours[0] - packed[0]))]
    for name, gradient in packed[1].items():
        scale = float(gradient.abs().max())
        errors.append(float((ours[1][name] - gradient).abs().max()) / (scale or 1.0))
    return max(errors)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["encoder", "frozen"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_every_kind_of_training_has_the_packed_steps_gradients(
    directory, adapters, frozen, recomputed
):
    model, processor = policy(directory, adapters=adapters, frozen=frozen, recomputed=recomputed)
    lengths, edges = CUTS["three, ragged"]
    group = group_of(processor, lengths)
    packed = step(model, group)
    assert any("visual" in name for name in packed[1]) == (not frozen)
    assert all("lora_" in name for name in packed[1]) == adapters
    for schedule in ("split", "twice"):
        assert difference(step(model, group, schedule, edges), packed) < 1e-9


@pytest.mark.parametrize("backend", ["fused", "merged", "varlen", "masked"])
def test_every_cut_has_the_packed_steps_gradients(loaded, backend):
    model, processor = loaded
    prepare_attention(model, backend)
    for lengths, edges in CUTS.values():
        group = group_of(processor, lengths)
        packed = step(model, group)
        assert difference(step(model, group, "split", edges), packed) < 1e-9
    assert difference(step(model, group, "twice", edges), packed) < 1e-9


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_the_later_updates_of_a_step_have_them_too(loaded):
    """Old log-probs of the sampler, a clipped ratio."""
    model, processor = loaded
    group = group_of(processor, [6, 2, 9])
    packed = step(model, group, on_policy=False)
    assert packed[2][0]["ratio_max"] != 1.0
    for schedule in ("split", "twice"):
        ours = step(model, group, schedule, (0, 1, 3), on_policy=False)
        assert difference(ours, packed) < 1e-9


def test_given_features_receive_the_gradient(loaded):
    """Of the rollout's vision pass: a leaf, into which every suffix and the prompt send theirs."""
    model, processor = loaded
    group = group_of(processor, [6, 2, 9])
    (features,) = forward.prompt_features(model, [group.group.prompt])
    grads = []
    for schedule, edges in (("packed", ()), ("split", (0, 1, 3)), ("twice", (0, 1, 3))):
        leaf = features.detach().requires_grad_()
        step(model, group.with_vision(leaf), schedule, edges)
        grads.append(leaf.grad)
    assert float(grads[0].abs().max()) > 0
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_the_prompt_runs_once_or_twice_and_its_tokens_are_counted(loaded, monkeypatch):
    model, processor = loaded
    group = group_of(processor, [6, 2, 9])
    passes = []
    right = forward.language_model_forward

    def counted(model, embeddings, *args, **kwargs):
        passes.append(embeddings.shape[1])
        return right(model, embeddings, *args, **kwargs)

    monkeypatch.setattr(forward, "language_model_forward", counted)
    prompt, own = group.prompt_tokens, [6 - 1, 2 - 1 + 9 - 1]
    for schedule, expected, count in (("split", [prompt], 1), ("twice", [prompt, prompt], 2)):
        passes.clear()
        metrics = step(model, group, schedule, (0, 1, 3))[2]
        assert passes == [prompt, *own, *expected[1:]]
        assert sum(int(one["num_run_tokens"]) for one in metrics) == count * prompt + 17
        assert sum(int(one["num_microbatches"]) for one in metrics) == 2


@pytest.mark.parametrize("leave_out", ["keys", "values", "hidden", "a layer"])
def test_the_comparison_notices_a_gradient_that_is_left_out(loaded, monkeypatch, leave_out):
    model, processor = loaded
    group = group_of(processor, [6, 2, 9])
    packed = step(model, group)
    right = prompt_state.PromptState.take_gradients

    def without(self):
        gradients = right(self)
        dropped = {
            "hidden": [0],
            "keys": range(1, len(gradients), 2),
            "values": range(2, len(gradients), 2),
            "a layer": [3, 4],
        }[leave_out]
        return [None if i in dropped else one for i, one in enumerate(gradients)]

    monkeypatch.setattr(prompt_state.PromptState, "take_gradients", without)
    assert difference(step(model, group, "split", (0, 2, 3)), packed) > 1e-3


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_the_comparison_notices_a_suffix_that_sees_another_completion(loaded, monkeypatch):
    model, processor = loaded
    group = group_of(processor, [6, 5, 9, 4])
    packed = step(model, group)
    assert difference(step(model, group, "split", (0, 2, 4)), packed) < 1e-9
    one = packing.Span

    def joined(start, prompt, lengths, device):
        return one(start, prompt, (sum(lengths),) if lengths else (), device)

    for backend in ("fused", "merged", "masked"):
        prepare_attention(model, backend)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "Span", joined)
            assert difference(step(model, group, "split", (0, 2, 4)), packed) > 1e-5
    with monkeypatch.context() as patch:  # positions that restart in a suffix
        patch.setattr(packing, "next_position", lambda positions: 0)
        assert difference(step(model, group, "split", (0, 2, 4)), packed) > 1e-5
    prepare_attention(model, "fused")

    def one_row_short(self):
        return [(row, end, 0, to - 1) for row, end, _, to in parts.fget(self)]

    parts = prompt_state.Suffix.parts
    with monkeypatch.context() as patch:
        patch.setattr(prompt_state.Suffix, "parts", property(one_row_short))
        assert difference(step(model, group, "split", (0, 2, 4)), packed) > 1e-5


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_completions_do_not_change_one_another(loaded):
    """A completion's hidden states have the same bits whatever else is in its suffix."""
    model, processor = loaded
    group = group_of(processor, [6, 5, 9])
    with torch.no_grad():
        state = prompt_pass(model, group.group)
        both, *_ = completion_hidden(model, [group.group.part(0, 2)], state)
        other = replace(group.group, completions=[group.group.completions[0], torch.arange(5)])
        changed, *_ = completion_hidden(model, [other], state)
    assert torch.equal(both[:6], changed[:6])
    assert not torch.equal(both[7:], changed[7:])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused(loaded):
    """It runs layers without gradient: that of keys and values would be silently lost."""
    model, processor = loaded
    group = group_of(processor, [6, 2])
    enable = getattr(model, "activation_checkpointing_enable", None)  # as transformers renamed it
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})
    model.enable_input_require_grads()
    for schedule in ("split", "twice"):
        with pytest.raises(ValueError, match="layer 0 runs under reentrant"):
            step(model, group, schedule, (0, 1, 2))
    with torch.no_grad():
        prompt_pass(model, group.group)  # the reference model has no gradient to lose


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_a_layer_that_records_nothing_is_refused(loaded, monkeypatch):
    """A hybrid model's layer without keys would run completions as if there were no prompt."""
    model, processor = loaded
    right = prompt_state.PromptRecorder.record

    def partly(self, layer, *tensors):
        if layer != 1:
            right(self, layer, *tensors)

    monkeypatch.setattr(prompt_state.PromptRecorder, "record", partly)
    with pytest.raises(ValueError, match=r"\d of \d layers record"):
        prompt_pass(model, group_of(processor, [3]).group)


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_several_groups_on_one_prompt_are_refused(loaded):
    model, processor = loaded
    groups = [group_of(processor, [3], seed).group for seed in range(2)]
    with torch.no_grad():
        state = prompt_pass(model, groups[0])
        with pytest.raises(ValueError, match="one group"):
            completion_hidden(model, groups, state)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_nothing_stays_in_memory(directory, recomputed):
    """Neither after the backward pass nor after one that failed: the recorder, which the closures
    of a recomputation hold, must not hold the tensors' graph."""
    model, processor = policy(directory, recomputed=recomputed)
    group = group_of(processor, [6, 2, 9])
    kept: list[weakref.ref] = []
    right = forward.PromptState

    def noted(recorded, hidden, **options):
        state = right(recorded, hidden, **options)
        tensors = [x for layer in (*recorded.values(), *state.layers.values()) for x in layer]
        kept.extend(weakref.ref(x) for x in [hidden, *tensors])
        return state

    def alive():
        return sum(one() is not None for one in kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "PromptState", noted)
        step(model, group, "split", (0, 2, 3))
        gc.collect()
        assert kept and alive() == 0

        def failing(self, gradients):
            raise RuntimeError("no more")

        patch.setattr(right, "backward", failing)
        with pytest.raises(RuntimeError, match="no more"):
            step(model, group, "split", (0, 2, 3))
        gc.collect()
        assert alive() == 0


def test_half_precision_gradients_are_summed_in_float32():
    """Of 64 terms in bfloat16 the last would change little or nothing."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(64, 50, generator=generator).to(torch.bfloat16).abs() + 0.5
    exact = terms.double().sum(0)
    sums = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        made = torch.zeros(50, dtype=dtype, requires_grad=True)
        state = prompt_state.PromptState({0: (made * 2,)}, made[:1] * 1, keep_graph=True)
        for term in terms:
            (state.layers[0][0] * term.to(dtype)).sum().backward()
        hidden, sums[dtype] = gradients = state.take_gradients()
        assert hidden is None
        state.backward(gradients)
        assert made.grad.dtype == dtype
        torch.testing.assert_close(made.grad, (2 * exact).to(dtype), rtol=1e-2, atol=0)
    for dtype, found in sums.items():
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="1 gradients for 2 tensors"):
        prompt_state.PromptState({0: (made * 2,)}, made[:1] * 1, keep_graph=True).backward([None])


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
def test_the_references_log_probs_in_suffixes_are_those_of_the_pack(loaded):
    model, processor = loaded
    group = group_of(processor, [6, 2, 9])
    with torch.no_grad():
        (packed,) = reference._logps(model, MicroBatch([group]), 0.8)
        for schedule in ("split", "twice"):
            parts = reference._logps(model, MicroBatch([group], schedule, (0, 1, 3)), 0.8)
            assert [len(one) for one in parts] == [6, 11]
            assert (torch.cat(parts) - packed).abs().max() < 1e-9


def peak_bytes(fn):
    """Most bytes that torch's allocator had given out during the call, above those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("directory", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("frozen", [False, True], ids=["encoder", "frozen"])
def test_the_prediction_follows_the_memory_of_each_schedule(directory, frozen):
    """By what the allocator gives out. The prediction adds what the head and a layer's backward
    pass take, which are not there at once: it lies above, by as much for every schedule."""
    model, processor = policy(directory, dtype="float32", frozen=frozen)
    group = group_of(processor, [40] * 12, frames=24)
    if frozen:
        (features,) = forward.prompt_features(model, [group.group.prompt])
        group = group.with_vision(features)
    foot = Footprint.of(model)
    planner = Planner(model, None, 10**9, memory=1.0)
    ratios = {}
    for schedule, edges in {"packed": (), "split": (0, 4, 8, 12), "twice": (0, 4, 8, 12)}.items():
        step(model, group, schedule, edges)  # the gradients of the parameters stay
        batch = MicroBatch([group], schedule, edges)
        measured = peak_bytes(lambda s=schedule, e=edges: step(model, group, s, e, clear=False))
        ratios[schedule] = measured / planner.predict(batch)
    assert all(0.6 < ratio < 1.05 for ratio in ratios.values()), ratios
    assert max(ratios.values()) < 1.15 * min(ratios.values()), ratios
    assert foot.per_cached_gradient == foot.per_cached  # of float32
