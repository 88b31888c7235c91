"""verl's functions and policy losses on our ops, against its formulae in plain torch."""

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from peer_stubs import everything, install, stub
from torch.utils.checkpoint import checkpoint

from vcr1_fast.integrations.patching import UnknownContract
from vcr1_fast.integrations.verl import (
    FusedLinearForPPO,
    LinearCrossEntropy,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    linear_cross_entropy,
    logprobs_from_logits,
    patch_verl,
)
from vcr1_fast.integrations.verl_losses import POLICY_LOSSES, averaging

B, T, V, H = 5, 11, 33, 16
MASK = torch.arange(T) < torch.tensor([11, 5, 1, 0, 7])[:, None]
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GLOBAL = {
    "dp_size": 2,
    "batch_num_tokens": 40,
    "global_batch_size": 10,
    "loss_scale_factor": 17,
}


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def make_config(info):
    return Config(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0, tau_pos=1.0,
        tau_neg=1.05, global_batch_info=info,
    )  # fmt: skip


def make_tensors(spread, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, generator=generator)

    logps = -normal().abs()
    tensors = [logps + spread * normal(), logps, normal(), normal().abs()]
    return [torch.where(MASK, x, math.nan) for x in tensors]  # padding is never read


def token_losses(name, old, logp, advantages):
    """(loss of each token, whether it is clipped, whether by the dual clip), in autograd."""
    x = logp - old
    nobody = torch.zeros_like(MASK)
    if name == "vcr1_gspo":
        seq = (x * MASK).sum(-1, True) / MASK.sum(-1, True).clamp(min=1)
        r = (logp - logp.detach() + seq.detach()).clamp(max=10).exp()
    else:
        r = x.clamp(-20, 20).exp()
    free, clipped = -advantages * r, -advantages * r.clamp(0.8, 1.28)
    if name == "vcr1_sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)
        return -4 / tau * torch.sigmoid(tau * (r - 1)) * advantages, nobody, nobody
    if name == "vcr1_cispo":
        bounded = r.clamp(0.8, 1.28)
        return -bounded.detach() * advantages * logp, r != bounded, nobody
    loss = torch.maximum(free, clipped)
    dual = nobody
    if name == "vcr1_vanilla":
        ceiling = -3.0 * advantages
        dual = (loss > ceiling) & (advantages < 0)
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return loss, clipped > free, dual


def aggregate(mode, loss, info):
    counts = MASK.sum(-1)
    tokens = info.get("batch_num_tokens", int(counts.sum()))
    sequences = info.get("global_batch_size", int((counts > 0).sum()))
    sums = loss.sum(-1)
    total = {
        "token-mean": sums.sum() / tokens,
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.sum() / sequences,
        "seq-mean-token-sum-norm": sums.sum() / sequences / info.get("loss_scale_factor", T),
        "seq-mean-token-mean": (sums / counts.clamp(min=1)).sum() / sequences,
    }[mode]
    return total * info.get("dp_size", 1)


@pytest.mark.parametrize("spread", (0.3, 4.0))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("info", ({}, GLOBAL), ids=("local", "global"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_policy_losses_are_verls_formulae(name, mode, info, weighted, spread):
    old, logp, advantages, weights = make_tensors(spread)
    exact = [torch.where(MASK, x, 0.0).double() for x in (old, logp, advantages, weights)]
    leaf = exact[1].requires_grad_()
    loss, clipped, dual = token_losses(name, exact[0], leaf, exact[2])
    loss = loss * exact[3] if weighted else loss
    average = "seq-mean-token-mean" if name == "vcr1_sapo" else mode
    expected = aggregate(average, torch.where(MASK, loss, 0.0), info)
    expected.backward()
    given = logp.clone().requires_grad_()
    got, metrics = POLICY_LOSSES[name](
        old_log_prob=old, log_prob=given, advantages=advantages, response_mask=MASK,
        loss_agg_mode=mode, config=make_config(info),
        rollout_is_weights=weights if weighted else None,
    )  # fmt: skip
    (got * 1.0).backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    moved = (exact[0] - exact[1])[MASK]
    moved = moved if name == "vcr1_gspo" else moved.clamp(-20, 20)
    assert metrics == {
        "actor/pg_clipfrac": pytest.approx(float(clipped[MASK].double().mean()), abs=1e-6),
        "actor/ppo_kl": pytest.approx(float(moved.detach().mean()), rel=1e-4, abs=1e-6),
        "actor/pg_clipfrac_lower": pytest.approx(float(dual[MASK].double().mean()), abs=1e-6),
    }
    assert all(type(value) is float for value in metrics.values())


def test_a_loss_may_be_changed_in_place_as_verl_does():
    old, logp, advantages, _ = make_tensors(0.3)
    given = logp.clone().requires_grad_()
    loss, _ = POLICY_LOSSES["vcr1_vanilla"](
        old, given, advantages, MASK, "token-mean", make_config({})
    )
    loss -= 0.5 * torch.where(MASK, given, 0.0).sum()
    loss.backward()
    assert given.grad[MASK].isfinite().all()


@pytest.mark.parametrize(
    ("mode", "info", "message"),
    [
        ("token-mean", {"dp_size": 2}, "batch_num_tokens"),
        ("seq-mean-token-sum", {"dp_size": 2}, "global_batch_size"),
        ("mean", {}, "Invalid loss_agg_mode: mean"),
    ],
)
def test_averages_that_cannot_be_made(mode, info, message):
    with pytest.raises(ValueError, match=message):
        averaging(mode, T, info)


def test_a_dual_clip_inside_the_range_is_refused():
    config = make_config({})
    config.clip_ratio_c = 1.1
    with pytest.raises(ValueError, match=r"dual clip 1\.1"):
        POLICY_LOSSES["vcr1_vanilla"](*make_tensors(0.3)[:3], MASK, "token-mean", config)


def make_logits(dtype=torch.float32, rows=(3, 7)):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*rows, V, generator=generator).to(dtype)
    return logits, torch.randint(0, V, rows, generator=generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_logprobs_and_entropies_with_their_dtypes_and_gradients(dtype):
    logits, labels = make_logits(dtype)
    exact = logits.to(torch.float64, copy=True).requires_grad_()
    logp = exact.log_softmax(-1)
    expected = logp.gather(-1, labels[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coarse = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    )
    for inplace in (False, True):
        given = logits.clone().requires_grad_()
        got = logprobs_from_logits(given, labels.reshape(-1), inplace)
        assert got.dtype == wide and got.shape == labels.shape
        close = 1e-14 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)
        got.sum().backward()
        exact.grad = None
        expected.sum().backward(retain_graph=True)
        torch.testing.assert_close(given.grad.double(), exact.grad, **coarse)
        assert (given.grad.data_ptr() == given.data_ptr()) == inplace
    for function, out in (
        (entropy_from_logits, dtype),
        (entropy_from_logits_with_chunking, torch.float32),
    ):
        given = logits.reshape(-1, V).clone().requires_grad_()
        got = function(given)
        assert got.dtype == out
        torch.testing.assert_close(got.double(), entropy.reshape(-1), **coarse)
        got.sum().backward()
        exact.grad = None
        entropy.sum().backward(retain_graph=True)
        torch.testing.assert_close(given.grad.double(), exact.grad.reshape(-1, V), **coarse)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("rows", ((6,), (2, 5)))
def test_fused_heads(rows, temperature):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (
        torch.randn(*rows, H, generator=generator),
        torch.randn(V, H, generator=generator),
    )
    labels = torch.randint(0, V, rows, generator=generator)
    upstream = torch.randn(2, *rows, generator=generator)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logp = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)
    expected = logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    (upstream[0] * expected[0] + upstream[1] * expected[1]).sum().backward()
    flat = [x.reshape(-1) for x in expected]
    for form in ("module", "function", "class"):
        given = [x.clone().requires_grad_() for x in (hidden, weight)]
        if form == "module":
            out = FusedLinearForPPO(impl_backend="liger")(*given, labels.int(), temperature)
            assert out[0].shape == labels.shape
        else:
            function = linear_cross_entropy if form == "function" else LinearCrossEntropy.apply
            out = function(*given, labels, temperature, "none")
            assert out[0].shape == (labels.numel(),)
        for got, want in zip(out, flat, strict=True):
            torch.testing.assert_close(got.reshape(-1).double(), want, rtol=1e-4, atol=1e-5)
        sum(
            (u.reshape(-1) * o.reshape(-1)).sum() for u, o in zip(upstream, out, strict=True)
        ).backward()
        for got, want in zip(given, leaves, strict=True):
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
    for reduction in ("sum", "mean"):
        one, _ = linear_cross_entropy(hidden, weight, labels, temperature, reduction)
        torch.testing.assert_close(
            one.double(), getattr(flat[0], reduction)(), rtol=1e-4, atol=1e-5
        )
    half = FusedLinearForPPO()(hidden.bfloat16(), weight.bfloat16(), labels)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.bfloat16


def test_what_a_fused_head_refuses():
    hidden, weight, labels = torch.randn(2, H), torch.randn(V, H), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "max")
    with pytest.raises(ValueError, match="2 processes"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "none", SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match="impl_backend"):
        FusedLinearForPPO(impl_backend="triton")


# torch's tracer makes a Function object while it inspects one, and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_checkpointed_and_under_autocast():
    """verl compiles the entropy, checkpoints it, and runs the engine under autocast."""
    logits, labels = make_logits(rows=(9,))
    expected = logits.clone().requires_grad_()
    entropy_from_logits(expected).sum().backward()
    compiled = torch.compile(entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    given = logits.clone().requires_grad_()
    compiled(given).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)
    given.grad = None
    checkpoint(entropy_from_logits, given, use_reentrant=False).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert logprobs_from_logits(logits, labels).dtype == torch.float32
        out = FusedLinearForPPO()(torch.randn(4, H), torch.randn(V, H), torch.zeros(4).long())
    assert out[0].dtype == torch.float32


def modules():
    functions = {
        "logprobs_from_logits": stub("f", "logits", "labels", "inplace_backward"),
        "entropy_from_logits": stub("f", "logits"),
        "entropy_from_logits_with_chunking": stub("f", "logits", "chunk_size"),
    }
    arguments = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
    head = {
        "LinearCrossEntropy": type("L", (), {"forward": stub("f", "ctx", *arguments)}),
        "linear_cross_entropy": stub("f", "args", "kwargs"),
    }
    module = stub("f", "self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    losses = {
        "POLICY_LOSS_REGISTRY": {"vanilla": stub("f")},
        "compute_policy_loss_vanilla": stub(
            "f", "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode",
            "config", "rollout_is_weights",
        ),
    }  # fmt: skip
    engine = {"logprobs_from_logits": functions["logprobs_from_logits"]}
    return {
        "verl.utils.torch_functional": functions,
        "verl.workers.engine.fsdp.transformer_impl": engine,
        "verl.models.mcore.model_forward_fused": {
            "linear_cross_entropy": head["linear_cross_entropy"]
        },
        "verl.utils.experimental.torch_functional": {
            "FusedLinearForPPO": type("F", (), {"forward": module})
        },
        "verl.utils.kernel.linear_cross_entropy": head,
        "verl.trainer.ppo.core_algos": losses,
    }


def test_the_patch_reaches_copies_registers_losses_and_is_undone(monkeypatch):
    made = install(monkeypatch, "verl", "0.9.1", modules())
    before = everything(made)
    with patch_verl():
        engine = made["verl.workers.engine.fsdp.transformer_impl"]
        assert engine.logprobs_from_logits is logprobs_from_logits
        fused = made["verl.models.mcore.model_forward_fused"]
        assert fused.linear_cross_entropy is linear_cross_entropy
        registry = made["verl.trainer.ppo.core_algos"].POLICY_LOSS_REGISTRY
        assert set(registry) == {"vanilla", *POLICY_LOSSES}
    assert everything(made) == before


def test_the_plugin_patches_when_it_is_imported(monkeypatch):
    made = install(monkeypatch, "verl", "0.9.1", modules())
    before = everything(made)
    plugin = "vcr1_fast.integrations.verl_plugin"
    monkeypatch.delitem(sys.modules, plugin, raising=False)
    try:
        importlib.import_module(plugin)
        assert patch_verl.applied == tuple(patch_verl.parts)
    finally:
        patch_verl.undo()
        sys.modules.pop(plugin, None)
    assert everything(made) == before


@pytest.mark.parametrize("version", ("0.7.1", "0.9.2", "0.10.0.dev1", "0.3.3.dev0"))
def test_other_releases_are_refused(monkeypatch, version):
    install(monkeypatch, "verl", version, modules())
    with pytest.raises(UnknownContract, match=rf"verl {version}.*0\.9\.1"):
        patch_verl()


def test_another_signature_is_refused_and_nothing_changes(monkeypatch):
    changed = modules()
    changed["verl.utils.torch_functional"]["entropy_from_logits"] = stub("f", "logits", "mask")
    made = install(monkeypatch, "verl", "0.9.1", changed)
    before = everything(made)
    with pytest.raises(UnknownContract, match="entropy_from_logits takes"):
        patch_verl()
    assert everything(made) == before and patch_verl.applied == ()
