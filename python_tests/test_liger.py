"""Liger's GRPO forms on our ops: its own torch code and the written formulae, ragged masks,
gradients; and the patch, where the package is installed (it need not be)."""

import inspect
import math

import pytest
import torch

from vcr1_fast.integrations import liger
from vcr1_fast.integrations.liger import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    fused_selective_log_softmax,
    patch_liger,
    triton_grpo_loss,
)

B, T, H, V = 4, 9, 12, 37
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LENGTHS = (9, 4, 1, 0)


def make_batch(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch = {
        "hidden": normal(B, T, H),
        "weight": normal(V, H) * 0.5,
        "bias": normal(V) * 0.3,
        "ids": torch.randint(0, V, (B, T), generator=generator),
        "mask": (torch.arange(T) < torch.tensor(lengths)[:, None]).long(),
        "advantages": normal(B) * torch.tensor([1.0, -1.0, 1.0, 1.0]),
        "token_ratio": normal(B, T).mul(0.3).exp(),
    }
    logits = batch["hidden"] @ batch["weight"].T + batch["bias"]
    logps = logits.log_softmax(-1).gather(-1, batch["ids"][..., None])[..., 0]
    batch["noise"] = 0.3 * normal(2, B, T)
    batch["old"], batch["ref"] = logps + batch["noise"]
    # What a trainer has for tokens it did not sample: the ratio of equal log-probs.
    batch["token_ratio"] = torch.where(batch["mask"] > 0, batch["token_ratio"], 1.0)
    return batch


def combinations():
    """(loss type, level, beta, KL bias correction, shape of the ratio, old log-probs given)."""
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
                continue
            yield from (
                (loss_type, level, beta, corrected, ratio, with_old)
                for beta, corrected in ((0.0, False), (0.1, False), (0.1, True))
                for ratio in (None, "tokens", "column", "vector")
                for with_old in (True, False)
                if (with_old or ratio is None or loss_type == "vespo")
                and (beta == 0.1 or ratio != "vector")
            )


def ratio_of(batch, kind):
    ratio = batch["token_ratio"]
    return {None: None, "tokens": ratio, "column": ratio[:, :1], "vector": ratio[:, 0]}[kind]


def padding_counts(loss_type, level, beta, ratio):
    """Whether Liger's fused luspo multiplies what stands in the padding into the loss."""
    return loss_type == "luspo" and (level == "token" or beta > 0 or ratio == "tokens")


@pytest.mark.parametrize("case", list(combinations()), ids=lambda c: "-".join(map(str, c)))
def test_fused_form_is_ligers_own(case):
    """Loss, metrics and the three gradients against its torch code, over ragged completions."""
    peer = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    loss_type, level, beta, corrected, ratio, with_old = case
    batch = make_batch(
        lengths=(T,) * B if padding_counts(loss_type, level, beta, ratio) else LENGTHS
    )
    options = {
        "beta": beta, "compiled": False, "use_ref_model": beta > 0, "epsilon_low": 0.1,
        "epsilon_high": 1.1 if loss_type == "cispo" else 0.15, "loss_type": loss_type,
        "max_completion_length": 11, "importance_sampling_level": level, "temperature": 0.7,
        "use_bias_correction_kl": corrected,
        "delta": 1.3 if loss_type in ("grpo", "dapo") else None,
    }  # fmt: skip
    results = []
    for make in (peer.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        leaves = [batch[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
        loss, metrics = make(**options)(
            leaves[0], leaves[1], batch["ids"], batch["mask"], batch["advantages"], leaves[2],
            batch["ref"] if beta else None, batch["old"] if with_old else None,
            vllm_is_ratio=ratio_of(batch, ratio),
        )  # fmt: skip
        (2.0 * loss).backward()
        assert isinstance(metrics, tuple)
        results.append([loss.detach(), *metrics, *(leaf.grad for leaf in leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("items", (None, 50.0, torch.tensor(50)))
@pytest.mark.parametrize("loss_type", ("dapo", "cispo", "vespo", "grpo"))
def test_the_normaliser_given(items, loss_type):
    peer = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    batch = make_batch()
    expected, got = (
        make(beta=0.0, compiled=False, use_ref_model=False, loss_type=loss_type)(
            batch["hidden"].requires_grad_(), batch["weight"], batch["ids"], batch["mask"],
            batch["advantages"], old_per_token_logps=batch["old"], num_items_in_batch=items,
        )[0]
        for make in (peer.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


def test_reference_head_function_form_and_metrics_without_reference():
    batch = make_batch()
    tensors = [batch[n] for n in ("hidden", "weight", "ids", "mask", "advantages", "bias")]
    reference = {"ref_input": batch["hidden"] * 0.9, "ref_weight": batch["weight"]}
    loss = LigerFusedLinearGRPOLoss(beta=0.2, chunk_rows=3)
    given, metrics = loss(*tensors, old_per_token_logps=batch["old"], **reference)
    logits = (batch["hidden"] * 0.9) @ batch["weight"].T
    ref = logits.log_softmax(-1).gather(-1, batch["ids"][..., None])[..., 0]
    computed, _ = loss(*tensors, ref, batch["old"])
    torch.testing.assert_close(given, computed)
    values = [
        p.default for p in inspect.signature(LigerFusedLinearGRPOFunction.apply).parameters.values()
    ]
    positional = [*tensors, ref, batch["old"], None, None, None, 0.2, *values[12:]]
    function, metrics_of_function = LigerFusedLinearGRPOFunction.apply(*positional)
    torch.testing.assert_close(function, given)
    assert len(metrics_of_function) == len(metrics) == 2
    alone, metrics = LigerFusedLinearGRPOLoss(beta=0.2, use_ref_model=False)(*tensors)
    without_kl, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(*tensors)
    assert alone == without_kl and metrics[0] == 0
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input"):
        loss(*tensors)
    with pytest.warns(UserWarning, match="both given"):
        loss(*tensors, ref, **reference)


def token_formula(case, batch, logps):
    """(loss, kl, clipped) of each token, from the formulae, in autograd."""
    loss_type, level, beta, corrected, ratio, with_old = case
    mask, advantages = batch["mask"].to(logps.dtype), batch["advantages"][:, None].to(logps.dtype)
    log_ratio = logps - (batch["old"] if with_old else logps.detach())
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, True) / mask.sum(-1, True).clamp(min=1)
    r = log_ratio.exp().expand_as(logps)
    weight = ratio_of(batch, ratio)
    weight = weight[:, None] if weight is not None and weight.ndim == 1 else weight
    low, high = (0.0, 1.1) if loss_type == "cispo" else (0.9, 1.15)
    clipped = ((r < low) & (advantages < 0)) | ((r > high) & (advantages > 0))
    if loss_type == "cispo":
        loss = -r.clamp(max=1.1).detach() * advantages * logps
    elif loss_type == "sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)
        loss = -4 * torch.sigmoid(tau * (r - 1)) / tau * advantages
        clipped = torch.zeros_like(clipped)
    elif loss_type == "vespo":
        log_w = ((logps.detach() - (batch["old"] if with_old else logps.detach())) * mask).sum(
            -1, True
        )
        if weight is not None:
            log_w = log_w + weight.log().sum(-1, True)
        k, lam = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
        loss = -(lam + k * log_w - lam * log_w.exp()).exp() * advantages * logps
        clipped, weight = torch.zeros_like(clipped), None
    else:
        loss = -torch.minimum(r * advantages, r.clamp(low, high) * advantages)
    if weight is not None:
        loss = loss * weight
    d = batch["ref"] - logps
    kl = (d.exp() - d - 1) * (r if corrected else 1.0)
    return (loss + beta * kl) * mask, kl * mask, clipped * mask


def reduce_formula(loss_type, loss, mask):
    counts = mask.sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (loss.sum(-1) / counts.clamp(min=1)).mean()
    if loss_type == "dr_grpo":
        return loss.sum() / (B * 11)
    if loss_type == "luspo":
        return (loss * counts[:, None]).mean()
    return loss.sum() / counts.sum()


@pytest.mark.parametrize("reduce", (False, True))
@pytest.mark.parametrize("case", list(combinations()), ids=lambda c: "-".join(map(str, c)))
def test_unfused_form_is_the_formula(case, reduce):
    """Values and the gradient of the logits, whose last position is not read and gets none."""
    loss_type, level, beta, corrected, ratio, with_old = case
    batch = make_batch()
    logits = torch.randn(B, T + 1, V, generator=torch.Generator().manual_seed(1))
    logits[:, -1] = math.nan
    upstream = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    exact = logits[:, :-1].double().requires_grad_()
    logps = (exact / 0.7).log_softmax(-1).gather(-1, batch["ids"][..., None])[..., 0]
    batch["old"], batch["ref"] = logps.detach() + batch["noise"]
    loss, kl, clipped = token_formula(case, batch, logps)
    given = logits.clone().requires_grad_()
    out = triton_grpo_loss(
        given, batch["old"].float() if with_old else None, batch["ref"].float() if beta else None,
        batch["ids"], batch["advantages"], batch["mask"], 0.7, beta, 0.1,
        1.1 if loss_type == "cispo" else 0.15, not reduce, loss_type, 11, level, reduce,
        vllm_is_ratio=ratio_of(batch, ratio), use_bias_correction_kl=corrected,
    )  # fmt: skip
    close = {"rtol": 1e-4, "atol": 2e-6, "check_dtype": False}
    total = batch["mask"].sum()
    if reduce:
        expected = reduce_formula(loss_type, loss, batch["mask"])
        torch.testing.assert_close(out[0], expected, **close)
        means = [kl.sum() / total, clipped.sum() / total][0 if beta else 1 :]
        torch.testing.assert_close(torch.stack(out[1]), torch.stack(means), **close)
        expected.backward()
        out[0].backward()
    else:
        torch.testing.assert_close(out[0], loss, **close)
        assert beta or out[1] is None
        if beta:
            torch.testing.assert_close(out[1], kl, **close)
        torch.testing.assert_close(out[2], clipped, **close)
        loss.backward(upstream.double())
        out[0].backward(upstream)
    torch.testing.assert_close(given.grad[:, :-1], exact.grad, **close)
    assert not given.grad[:, -1].any()
    assert (given.grad.data_ptr() == given.data_ptr()) == (not reduce)  # `inplace`


def test_selective_log_softmax_reads_the_last_columns_and_skips_masked_rows():
    batch = make_batch()
    logits = torch.randn(B, T + 1, V, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    logits.requires_grad_()
    wide = torch.cat([torch.full((B, 3), -1), batch["ids"]], 1)
    mask = torch.cat([torch.ones(B, 3, dtype=torch.long), batch["mask"]], 1)
    got = fused_selective_log_softmax(logits, wide, 0.8, mask)
    expected = (logits[:, :-1].double() / 0.8).log_softmax(-1).gather(-1, batch["ids"][..., None])
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, expected[..., 0].float() * batch["mask"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "not supported"),
        ({"importance_sampling_level": "word"}, "must be 'token' or 'sequence'"),
        ({"loss_type": "ppo"}, "unknown loss_type"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_tau_neg"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta"),
        ({"vllm_is_ratio": torch.ones(B, T + 1)}, "vllm_is_ratio must be"),
        ({"ref_logp": None}, "needs ref_logps"),
        ({"completion_ids": torch.zeros(B, T + 1, dtype=torch.long)}, "logits must be"),
    ],
)
def test_refusals(change, message):
    batch = make_batch()
    arguments = {
        "logits": torch.randn(B, T + 1, V), "old_logp": None, "ref_logp": batch["ref"],
        "completion_ids": batch["ids"], "advantages": batch["advantages"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        triton_grpo_loss(**{**arguments, **change})


def test_gradients_of_a_frozen_head_under_autocast_and_with_another_dtype():
    batch = make_batch()
    hidden, weight = batch["hidden"].requires_grad_(), batch["weight"]
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    rest = (batch["ids"], batch["mask"], batch["advantages"])
    loss(hidden, weight, *rest, old_per_token_logps=batch["old"])[0].backward()
    exact, hidden.grad = hidden.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        loss(hidden, weight, *rest, old_per_token_logps=batch["old"])[0].backward()
    torch.testing.assert_close(hidden.grad, exact, rtol=0.1, atol=0.02)
    half = hidden.detach().bfloat16().requires_grad_()
    weight.requires_grad_()
    loss(half, weight, *rest, old_per_token_logps=batch["old"])[0].backward()
    torch.testing.assert_close(half.grad.float(), exact, rtol=0.1, atol=0.02)
    assert weight.grad.dtype == torch.float32


def test_the_patch_is_in_place_everywhere_and_undone():
    chunked = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    import liger_kernel.chunked_loss.grpo_loss as defined

    original = chunked.LigerFusedLinearGRPOLoss
    with patch_liger("fused_linear"):
        assert chunked.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        assert defined.LigerFusedLinearGRPOFunction is LigerFusedLinearGRPOFunction
    assert chunked.LigerFusedLinearGRPOLoss is defined.LigerFusedLinearGRPOLoss is original
    pytest.importorskip("triton")
    import liger_kernel.transformers.grpo_loss as unfused

    before = unfused.triton_grpo_loss
    with patch_liger():
        assert unfused.triton_grpo_loss is triton_grpo_loss
        assert unfused.fused_selective_log_softmax is liger.fused_selective_log_softmax
    assert unfused.triton_grpo_loss is before


@pytest.mark.parametrize("items", (None, 60.0))
def test_counts_are_of_all_processes_and_divided_by_their_number(monkeypatch, items):
    """As gradients averaged over processes want it: here two, of which the other has 20 tokens."""
    batch = make_batch()
    rest = [batch[n] for n in ("hidden", "weight", "ids", "mask", "advantages")]
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    alone, _ = loss(*rest, old_per_token_logps=batch["old"])
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(20))
    together, _ = loss(*rest, old_per_token_logps=batch["old"], num_items_in_batch=items)
    tokens = sum(LENGTHS)
    torch.testing.assert_close(together, alone * tokens / ((items or tokens + 20) / 2))
