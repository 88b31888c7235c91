"""EasyR1's log-probs and policy loss on our ops, against its formulae in plain torch."""

from itertools import product

import pytest
import torch
from peer_stubs import everything, install, stub

from vcr1_fast.integrations.easyr1 import compute_policy_loss, log_probs_from_logits, patch_easyr1
from vcr1_fast.integrations.patching import UnknownContract

B, T, V = 4, 9, 31
COMPILED = torch.compile(log_probs_from_logits, dynamic=True, backend="aot_eager")
MASK = torch.arange(T) < torch.tensor([9, 4, 0, 6])[:, None]
ARGUMENTS = (
    "old_log_probs",
    "log_probs",
    "advantages",
    "response_mask",
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_dual",
    "tau_positive",
    "tau_negative",
    "loss_type",
    "loss_avg_mode",
    "kwargs",
)


def average(values, mode):
    values = torch.where(MASK, values, 0.0)
    if mode == "token":
        return values.sum() / MASK.sum()
    return (values.sum(-1) / MASK.sum(-1).clamp(min=1)).mean()


def expected(kind, old, logp, advantages, mode):
    """(loss, metrics) by the formulae."""
    x = logp - old
    if kind in ("gspo", "gspo_token"):
        seq = (x * MASK).sum(-1, True) / MASK.sum(-1, True).clamp(min=1)
        x = seq.detach() + logp - logp.detach() if kind == "gspo_token" else seq.expand_as(logp)
    r = x.clamp(-20, 20).exp()
    bounded = r.clamp(0.8, 1.28)
    metrics = {
        "ppo_kl": (old - logp)[MASK].mean(),
        "entropy_loss": average(-logp, mode),
    }
    if kind == "cispo":
        loss = -advantages * logp * bounded.detach()
    elif kind == "sapo":
        tau = torch.where(advantages >= 0, 1.0, 1.05)
        loss = -advantages * 4 / tau * torch.sigmoid(tau * (r - 1))
    else:
        free, clipped, ceiling = -advantages * r, -advantages * bounded, -3.0 * advantages
        loss = torch.maximum(free, clipped)
        dual = (loss > ceiling) & (advantages < 0)
        metrics["pg_clipfrac_higher"] = (free < clipped)[MASK].double().mean()
        metrics["pg_clipfrac_lower"] = dual[MASK].double().mean()
        loss = torch.where(dual, ceiling, loss)
    return average(loss, mode), metrics


@pytest.mark.parametrize("spread", (0.3, 3.0))
@pytest.mark.parametrize(
    ("kind", "mode"),
    list(product(("default", "gspo", "gspo_token", "cispo", "sapo"), ("token", "seq"))),
)
def test_policy_loss_is_the_formula(kind, mode, spread):
    logp, old, advantages = torch.randn(3, B, T, generator=torch.Generator().manual_seed(4))
    old = logp + spread * old
    exact = logp.to(torch.float64, copy=True).requires_grad_()
    loss, metrics = expected(kind, old.double(), exact, advantages.double(), mode)
    loss.backward()
    given = logp.clone().requires_grad_()
    got, report = compute_policy_loss(
        old_log_probs=old, log_probs=given, advantages=advantages, response_mask=MASK.long(),
        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, tau_positive=1.0,
        tau_negative=1.05, loss_type=kind, loss_avg_mode=mode,
    )  # fmt: skip
    got.backward()
    torch.testing.assert_close(got.double(), loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert report == {
        name: pytest.approx(value.item(), rel=1e-4, abs=1e-6) for name, value in metrics.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo'"),
        ({"loss_avg_mode": "batch"}, "'batch'"),
        ({"clip_ratio_dual": 1.2}, r"dual clip 1\.2"),
    ],
)
def test_refusals(change, message):
    options = {
        "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_dual": 3.0, "tau_positive": 1.0,
        "tau_negative": 1.05, "loss_type": "default", "loss_avg_mode": "token",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        compute_policy_loss(*torch.randn(3, B, T), MASK, **{**options, **change})


# torch's tracer looks at the gradients of what it is given, leaves or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_logprobs_are_float32_and_write_their_gradient_over_the_logits_even_when_compiled():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 8, V, generator=generator).bfloat16()
    labels = torch.randint(0, V, (2, 5), generator=generator)
    exact = logits.double().requires_grad_()
    wanted = exact[:, 2:7].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    wanted.sum().backward()
    for function in (log_probs_from_logits, COMPILED):
        given = logits.clone().requires_grad_()
        part = given[:, 2:7]  # EasyR1 hands over the rows of the response
        got = function(part, labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        got.sum().backward()
        torch.testing.assert_close(given.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)
        assert torch.equal(given[:, 2:7], given.grad[:, 2:7])


def modules():
    functions = {"log_probs_from_logits": stub("f", "logits", "labels")}
    loss = {"compute_policy_loss": stub("f", *ARGUMENTS)}
    return {
        "verl.utils.torch_functional": functions,
        "verl.trainer.core_algos": loss,
        "verl.workers.actor.dp_actor": dict(loss),
    }


def test_the_patch_reaches_copies_and_is_undone(monkeypatch):
    made = install(monkeypatch, "verl", "0.3.3.dev0", modules())
    before = everything(made)
    with patch_easyr1():
        actor = made["verl.workers.actor.dp_actor"]
        assert actor.compute_policy_loss is compute_policy_loss
        assert made["verl.utils.torch_functional"].log_probs_from_logits is log_probs_from_logits
    assert everything(made) == before


def test_verl_itself_is_not_taken_for_easyr1(monkeypatch):
    install(monkeypatch, "verl", "0.9.1", modules())
    with pytest.raises(UnknownContract, match=r"verl 0\.9\.1"):
        patch_easyr1()
