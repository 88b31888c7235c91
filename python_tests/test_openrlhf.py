"""OpenRLHF's log-probs, entropy and policy loss on our ops, against its formulae in plain torch."""

from itertools import product

import pytest
import torch
from peer_stubs import everything, install, stub

from vcr1_fast.integrations.openrlhf import (
    compute_entropy,
    fused_policy_loss,
    log_probs_from_logits,
    patch_openrlhf,
)
from vcr1_fast.integrations.patching import UnknownContract

B, T, V = 5, 11, 29
LOW, HIGH = 0.7, 1.3
ARGUMENTS = (
    "log_probs",
    "old_log_probs",
    "advantages",
    "action_mask",
    "rollout_log_probs",
    "dp_size",
    "batch_num_tokens",
    "global_batch_size",
)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 10.0}


class Options(torch.nn.Module):
    """What OpenRLHF's class keeps of its options; its forward is only known by its signature."""

    def __init__(self, policy_loss_type, token_level_loss, dual_clip, level, mode, gating="ratio"):
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = 0.2, 0.28, dual_clip
        self.token_level_loss, self.policy_loss_type = token_level_loss, policy_loss_type
        self.is_correction_level, self.is_correction_mode = level, mode
        self.is_correction_gating, self.is_correction_threshold = gating, [LOW, HIGH]

    def forward(
        self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None,
        dp_size=1, batch_num_tokens=None, global_batch_size=None,
    ):  # fmt: skip
        return "the original"


def expected(options, logp, old, advantages, mask, rollout, info):
    """(loss, clip ratio, old - new, rollout - old, share filtered) by the formulae."""
    corrected = options.is_correction_level != "off"
    ppo = options.policy_loss_type == "ppo"
    counts = mask.sum(-1)
    if ppo:
        r = (logp - old).clamp(-20, 20).exp()
    else:
        x = logp - (rollout if corrected else old)
        r = ((x * mask).sum(-1) / counts.clamp(min=1)).exp()[:, None]
    first, second = r * advantages, r.clamp(0.8, 1.28) * advantages
    gain = torch.minimum(first, second)
    if options.dual_clip:
        gain = torch.where(
            advantages < 0, torch.maximum(gain, options.dual_clip * advantages), gain
        )
    loss, gap, filtered = -gain, None, None
    if corrected and ppo:
        tokens = (old - rollout).exp()
        unit = tokens
        if options.is_correction_level == "seq":
            unit = (((old - rollout) * mask).sum(-1, True) / counts[:, None]).exp()
        outside = (unit < LOW) | (unit > HIGH)
        kept = torch.where(outside, 0.0, tokens)
        loss = loss * (tokens.clamp(LOW, HIGH) if options.is_correction_mode == "clip" else kept)
        gap = (rollout - old)[mask].mean()
        share = outside if unit.shape[1] == 1 else outside[mask]
        filtered = share.double().mean()
    sums = (loss * mask).sum(-1)
    if options.token_level_loss:
        loss = sums.sum() / info.get("batch_num_tokens", counts.sum())
    else:
        means = sums / counts.clamp(min=1)
        loss = means.sum() / info.get("global_batch_size", (counts > 0).sum())
    clipped = (second < first).expand_as(mask)[mask].double().mean()
    return loss * info.get("dp_size", 1), clipped, (old - logp)[mask].mean(), gap, filtered


@pytest.mark.parametrize("info", ({}, GLOBAL), ids=("local", "global"))
@pytest.mark.parametrize(
    "correction", (("off", "mask"), ("token", "clip"), ("token", "mask"), ("seq", "mask"))
)
@pytest.mark.parametrize(
    ("kind", "by_token", "dual"), list(product(("ppo", "gspo"), (True, False), (None, 3.0)))
)
def test_policy_loss_is_the_formula(kind, by_token, dual, correction, info):
    options = fused_policy_loss(Options)(kind, by_token, dual, *correction)
    generator = torch.Generator().manual_seed(1)
    lengths = [11, 5, 1, 7, 2] if correction[0] == "seq" else [11, 5, 1, 0, 7]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    logp, old, rollout, advantages = torch.randn(4, B, T, generator=generator)
    old, rollout = logp + 0.6 * old, logp + 0.4 * rollout
    exact = logp.to(torch.float64, copy=True).requires_grad_()
    wanted = expected(
        options, exact, old.double(), advantages.double(), mask, rollout.double(), info
    )
    wanted[0].backward()
    given = logp.clone().requires_grad_()
    out = options(
        given, old, advantages, action_mask=mask.long(), rollout_log_probs=rollout, **info
    )
    out[0].backward()
    for got, want in zip(out, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_no_mask_counts_all_and_a_divergence_gate_stays_with_the_original():
    logp, old, advantages = torch.randn(3, B, T, generator=torch.Generator().manual_seed(2))
    fused = fused_policy_loss(Options)
    whole = fused("ppo", True, None, "off", "mask")(logp, old, advantages)
    masked = fused("ppo", True, None, "off", "mask")(logp, old, advantages, torch.ones(B, T))
    torch.testing.assert_close(whole[:3], masked[:3])
    gated = fused("ppo", True, None, "token", "mask", "tv")
    assert gated(logp, old, advantages, None, old) == "the original"
    with pytest.raises(ValueError, match=r"dual clip 1\.1"):
        fused("ppo", True, 1.1, "off", "mask")(logp, old, advantages)
    with pytest.raises(ValueError, match="reinforce"):
        fused("reinforce", True, None, "off", "mask")(logp, old, advantages)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logprobs_divide_in_place_and_keep_the_dtype(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, V, generator=generator).to(dtype)
    labels = torch.randint(0, V, (2, 6), generator=generator)
    scaled = logits / 0.7
    exact = scaled.to(torch.float64, copy=True).requires_grad_()
    logp = exact.log_softmax(-1)
    wanted = logp.gather(-1, labels[..., None])[..., 0]
    given = logits.clone()
    got = log_probs_from_logits(given, labels, 0.7)
    assert got.dtype == dtype and torch.equal(given, scaled)
    torch.testing.assert_close(got, wanted.to(dtype), rtol=1e-5, atol=1e-5)
    leaf = scaled.clone().requires_grad_()
    kept = log_probs_from_logits(leaf, labels)
    kept[:, 0] = 0  # as trainers mask what they were given
    (kept.sum() + compute_entropy(leaf).sum()).backward()
    (wanted[:, 1:].sum() - (logp.exp() * logp).sum()).backward()
    coarse = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=coarse, atol=coarse)
    assert compute_entropy(leaf).dtype == dtype


def modules():
    functions = {
        "log_probs_from_logits": stub("f", "logits", "labels", "temperature"),
        "compute_entropy": stub("f", "logits"),
    }
    forward = stub("f", "self", *ARGUMENTS)
    loss = {"PolicyLoss": type("PolicyLoss", (torch.nn.Module,), {"forward": forward})}
    return {
        "openrlhf.models.utils": functions,
        "openrlhf.models.actor": dict(functions),
        "openrlhf.models.loss": loss,
        "openrlhf.models": dict(loss),
        "openrlhf.trainer.ray.ppo_actor": dict(loss),
    }


def test_the_patch_reaches_copies_and_is_undone(monkeypatch):
    made = install(monkeypatch, "openrlhf", "0.11.2", modules())
    before = everything(made)
    with patch_openrlhf():
        assert made["openrlhf.models.actor"].compute_entropy is compute_entropy
        trainer = made["openrlhf.trainer.ray.ppo_actor"]
        assert trainer.PolicyLoss is made["openrlhf.models"].PolicyLoss
        assert issubclass(trainer.PolicyLoss, before["openrlhf.models", "PolicyLoss"])
    assert everything(made) == before


def test_other_releases_are_refused(monkeypatch):
    install(monkeypatch, "openrlhf", "0.11.1", modules())
    with pytest.raises(UnknownContract, match=r"0\.11\.1"):
        patch_openrlhf()
