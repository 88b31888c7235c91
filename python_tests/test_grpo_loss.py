"""grpo_loss against a float64 autograd loop, in both layouts and for every backend."""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from gpu_backend import EMULATED
from grpo_oracle import loop_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, grpo_loss
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.grpo.config import LOSS_TYPES, decode, encode, parameters_of
from vcr1_fast.ops.grpo.loss import LossOutputs, grpo_loss_op, native_parameters
from vcr1_fast.ops.grpo.reference import METRICS, LossInputs

LENGTHS = (7, 0, 1, 40, 12)
# Interpreted Triton is tested in a separate process, alone and in float32, all that it computes
# in itself.
TRITON = "triton" in grpo_loss_op.backends("cpu")
BACKENDS = ("triton",) if TRITON else grpo_loss_op.backends("cpu")
DTYPE = torch.float32 if TRITON else torch.float64
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6} if TRITON else {"rtol": 1e-10, "atol": 1e-13}
IN_FLOAT64 = pytest.mark.skipif(TRITON, reason="in float64 Triton's is the reference")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
EVERYWHERE = BACKENDS if EMULATED else (*BACKENDS, pytest.param("cuda", marks=GPU))


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """Tests of the "cuda" backend call a `grpo_loss` that moves tensors to the GPU and back."""
    if EMULATED:
        return
    on_cpu = grpo_loss

    def to(where, x):
        return x.to(where) if isinstance(x, torch.Tensor) else x

    def moved(*args, **options):
        args = [to("cuda", x) for x in args]
        loss, metrics = on_cpu(*args, **{name: to("cuda", x) for name, x in options.items()})
        return loss.cpu(), {name: x.cpu() for name, x in metrics.items()}

    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        monkeypatch.setitem(globals(), "grpo_loss", moved)


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Interpreted kernels are numpy, which warns of the infinities that GPUs compute with."""
    with np.errstate(all="ignore"):
        yield


def make_batch(lengths=LENGTHS, seed=0, spread=0.5, token_advantages=False):
    """Padded float64 inputs; what is outside the mask is inf and nan."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(lengths), max((*lengths, 1)) + 2

    def normal():
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    logps = -normal().abs() - 0.1
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    holes = torch.rand(rows, columns, generator=generator) < 0.2
    mask &= ~(holes & (mask.sum(1, keepdim=True) > 3))
    batch = {
        "logps": logps,
        "old": logps + spread * normal(),
        "ref": logps + spread * normal(),
        "rollout": logps + spread * normal(),
        "entropy": normal().abs(),
        "token_weights": torch.rand(rows, columns, generator=generator).double(),
    }
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    if token_advantages:
        advantages = normal()
    for index, (name, tensor) in enumerate(batch.items()):
        batch[name] = torch.where(mask, tensor, (math.nan, math.inf, -math.inf)[index % 3])
    batch["advantages"], batch["mask"] = advantages, mask
    return batch


def pack(batch):
    """The same completions without padding: (tensors, cu_seqlens)."""
    mask = batch["mask"]
    packed = {name: x if x.ndim == 1 else x[mask] for name, x in batch.items() if name != "mask"}
    counts = mask.sum(1)
    return packed, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def call(batch, config, *, cu_seqlens=None, old=True, rollout=True, mask=True, dtype=DTYPE):
    """(loss, gradient of logps, gradient of entropy, metrics)."""
    tensors = {n: x if x.dtype == torch.bool else x.to(dtype) for n, x in batch.items()}
    logps = tensors["logps"].clone().requires_grad_()
    entropy = tensors["entropy"].clone().requires_grad_()
    loss, metrics = grpo_loss(
        logps,
        tensors["old"] if old else None,
        tensors["advantages"],
        tensors.get("mask") if mask else None,
        ref_logps=tensors["ref"],
        entropy=entropy,
        rollout_logps=tensors["rollout"] if rollout else None,
        token_weights=tensors["token_weights"],
        cu_seqlens=cu_seqlens,
        config=config,
    )
    (3 * loss).backward()
    grad_entropy = torch.zeros_like(logps) if entropy.grad is None else entropy.grad
    return loss.detach(), logps.grad / 3, grad_entropy / 3, metrics


def oracle(batch, config, *, old=True, rollout=True):
    """The same from the loop over completions."""
    mask = batch["mask"]
    logps = torch.where(mask, batch["logps"], 0).requires_grad_()
    entropy = torch.where(mask, batch["entropy"], 0).requires_grad_()
    sequences = []
    for b in range(len(mask)):
        kept = mask[b]
        advantages = batch["advantages"][b].expand_as(kept)
        sequences.append(
            {
                "logps": logps[b][kept],
                "entropy": entropy[b][kept],
                "advantages": advantages[kept],
                "old": batch["old"][b][kept] if old else None,
                "rollout": batch["rollout"][b][kept] if rollout else None,
                "ref": batch["ref"][b][kept],
                "token_weights": batch["token_weights"][b][kept],
            }
        )
    loss = loop_loss(config, sequences) + 0 * logps.sum()
    grads = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
    grads = [torch.zeros_like(logps) if grad is None else grad for grad in grads]
    return loss.detach(), *grads


def cases():
    yield from (
        GRPOLossConfig(loss_type=name, level=level, max_length=50, beta=0.0, eps_high=0.28)
        for name in LOSS_TYPES
        for level in ("token", "sequence", "sequence_token")
        if name != "vespo" or level == "token"
    )
    for level in ("token", "sequence", "sequence_token"):
        for kl in ("k1", "k2", "k3", "abs"):
            for correction in (False, True):
                for clamp, straight in ((None, False), (0.3, False), (None, True)):
                    yield GRPOLossConfig(
                        level=level,
                        kl=kl,
                        beta=0.7,
                        kl_bias_correction=correction,
                        kl_output_clamp=clamp,
                        kl_input_clamp=None if clamp is None else 0.6,
                        kl_straight_through=straight,
                    )
    for name in ("grpo", "cispo", "sapo", "vespo"):
        for scope in ("token", "sequence"):
            for action in ("truncate", "mask", "icepop"):
                for after in (False, True):
                    yield GRPOLossConfig(
                        loss_type=name,
                        beta=0.2,
                        rollout_correction=f"{scope}_{action}",
                        rollout_min=0.7,
                        rollout_max=1.6,
                        rollout_after_kl=after,
                        off_policy_threshold=0.05,
                    )
    yield GRPOLossConfig(rollout_correction="sequence_mask", rollout_max=3.0)
    yield GRPOLossConfig(rollout_correction="token_truncate", rollout_max=2.0)
    for level in ("token", "sequence", "sequence_token"):
        yield GRPOLossConfig(level=level, delta=1.1)
        yield GRPOLossConfig(level=level, delta=1.5)
        yield GRPOLossConfig(level=level, log_ratio_clamp=0.2, beta=0.1, kl_bias_correction=True)
    yield GRPOLossConfig(loss_type="cispo", cispo_bounds="relative")
    yield GRPOLossConfig(loss_type="cispo", eps_high=1.2)
    for aggregation in ("sequence_mean", "token_mean", "sequence_sum", "max_length", "num_items"):
        for options in (
            {},
            {"num_items": 33.0, "num_sequences": 9.0},
            {"exclude_empty": True, "entropy_aggregation": "token_mean"},
        ):
            yield GRPOLossConfig(
                aggregation=aggregation, max_length=50, entropy_coef=0.3, **options
            )


def name_of(config):
    default = {field.name: field.default for field in dataclasses.fields(config)}
    given = {name: getattr(config, name) for name in default}
    return "-".join(f"{n}={value}" for n, value in given.items() if value != default[n])


@IN_FLOAT64
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("config", tuple(cases()), ids=name_of)
def test_matches_the_loop(config, backend):
    batch = make_batch(token_advantages=config.level == "token" and config.beta == 0.7)
    packed, cu_seqlens = pack(batch)
    mask = batch["mask"]
    for old, rollout in ((True, True), (False, True), (True, False)):
        if config.rollout_correction and not rollout:
            continue
        expected = oracle(batch, config, old=old, rollout=rollout)
        with ops.use(backend):
            padded = call(batch, config, old=old, rollout=rollout)
            flat = call(packed, config, cu_seqlens=cu_seqlens, old=old, rollout=rollout)
            single = call(batch, config, old=old, rollout=rollout, dtype=torch.float32)
        for got, want in zip(padded[:3], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        for got, want in zip(flat[:3], expected, strict=True):
            torch.testing.assert_close(
                got, want if want.ndim == 0 else want[mask], rtol=1e-10, atol=1e-13
            )
        for name, value in padded[3].items():
            torch.testing.assert_close(flat[3][name], value, rtol=1e-10, atol=1e-13)
        scale = max(float(expected[0].abs()), float(expected[1].abs().max()))
        for got, want in zip(single[:3], expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=3e-6 * scale)


def near(got, want, scale=1.0):
    """Within the backend's precision of values of size `scale`."""
    torch.testing.assert_close(
        got.double(), want.double(), rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] * scale
    )


def test_triton_is_tested_where_it_is_interpreted():
    assert bool(TRITON) == (os.environ.get("TRITON_INTERPRET") == "1")


# Interpreted kernels are slow: each case in one layout, and with one choice of inputs.
@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("start", range(10))
def test_triton_matches_the_loop(start):
    for index, config in itertools.islice(enumerate(cases()), start, None, 10):
        batch = make_batch((7, 0, 12), token_advantages=config.level == "token" and index % 4 < 2)
        old, rollout = ((True, True), (False, True), (True, False))[index % 3]
        options = {"old": old, "rollout": rollout or config.rollout_correction is not None}
        expected, select = oracle(batch, config, **options), batch["mask"]
        with ops.use("reference"):
            metrics = call(batch, config, dtype=torch.float64, **options)[3]
        with ops.use("triton"):
            if index // 10 % 2:
                packed, cu_seqlens = pack(batch)
                got = call(packed, config, cu_seqlens=cu_seqlens, **options)
            else:
                got = call(batch, config, **options)
                select = torch.ones_like(select)
        scale = max(float(expected[0].abs()), float(expected[1].abs().max()))
        for ours, want in zip(got[:3], expected, strict=True):
            near(ours, want if want.ndim == 0 else want[select].view(ours.shape), scale)
        assert got[3].keys() == metrics.keys()
        for name, value in got[3].items():
            near(value, metrics[name], max(1.0, float(metrics[name].abs())))


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_triton_completions_longer_than_a_block(level):
    batch = make_batch((1030, 3, 512), spread=0.2)
    config = GRPOLossConfig(
        level=level, beta=0.1, entropy_coef=0.1, entropy_aggregation="token_mean",
        rollout_correction="sequence_icepop", rollout_min=0.9, rollout_max=1.1,
        off_policy_threshold=0.0, exclude_empty=True,
    )  # fmt: skip
    expected = oracle(batch, config)
    with ops.use("triton"):
        got = call(batch, config)
    scale = max(float(expected[0].abs()), float(expected[1].abs().max()))
    for ours, want in zip(got[:3], expected, strict=True):
        near(ours, want, scale)


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1")
def test_triton_with_weights_by_completion():
    """As the linear head calls it: every token a completion, its weight in the batch given."""
    batch = make_batch((1,) * 70)
    tokens = {n: x[:, :1] if x.ndim == 2 else x for n, x in batch.items()}
    weights = torch.rand(70, dtype=torch.float64)
    parameters = encode(GRPOLossConfig(beta=0.1, level="token"))
    names = ("logps", "old", "advantages", "mask", "ref")
    results = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = [tokens[n] if n == "mask" else tokens[n].to(dtype) for n in names]
        with ops.use(backend):
            results[backend] = grpo_loss_op(
                *inputs, *[None] * 4, weights.to(dtype), None, parameters
            )
    for got, want in zip(results["triton"], results["reference"], strict=True):
        near(got, want, 10.0)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_metrics_are_what_they_say(backend):
    batch = make_batch(seed=3)
    config = GRPOLossConfig(
        beta=0.1,
        delta=1.25,
        rollout_correction="token_mask",
        rollout_max=1.5,
        eps_high=0.28,
        off_policy_threshold=0.02,
    )
    with ops.use(backend):
        metrics = call(batch, config)[3]
    mask = batch["mask"]
    values = {n: x[mask] for n, x in batch.items() if n not in ("mask", "advantages")}
    a = batch["advantages"][:, None].expand_as(mask)[mask]
    x, d = values["logps"] - values["old"], values["ref"] - values["logps"]
    gap, r = values["old"] - values["rollout"], (values["logps"] - values["old"]).exp()
    drift = torch.stack(
        [
            (batch["rollout"] - batch["logps"])[b][mask[b]].mean()
            for b in range(len(mask))
            for _ in range(int(mask[b].sum()))
        ]
    )
    weight = gap.exp() * (gap.exp() <= 1.5)
    expected = {
        "num_tokens": mask.sum(),
        "num_sequences": mask.any(1).sum(),
        "kl": (d.exp() - d - 1).mean(),
        "entropy": values["entropy"].mean(),
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "approx_kl": (x.exp() - 1 - x).mean(),
        "clip_low": ((r < 0.8) & (a < 0)).double().mean(),
        "clip_high": ((r > 1.28) & (a > 0)).double().mean(),
        "clip_region": (((r < 0.8) & (a < 0)) | ((r > 1.28) & (a > 0))).double().mean(),
        "clip_delta": ((r > 1.25) & (a < 0)).double().mean(),
        "off_policy_kept": ((a >= 0) | (drift <= 0.02)).double().mean(),
        "rollout_gap_mean": gap.abs().mean(),
        "rollout_gap_max": gap.abs().max(),
        "rollout_kl": (gap.exp() - 1 - gap).mean(),
        "rollout_weight_mean": weight.mean(),
        "rollout_clipped": (gap.exp() > 1.5).double().mean(),
    }
    assert set(metrics) == {*expected, "policy_loss"}
    for name, value in expected.items():
        value = value.to(DTYPE)
        torch.testing.assert_close(metrics[name], value, msg=lambda m, n=name: f"{n}: {m}")
    no_kl = oracle(batch, dataclasses.replace(config, beta=0.0))[0]
    torch.testing.assert_close(metrics["policy_loss"], no_kl.to(DTYPE))


def test_metrics_depend_on_the_call():
    batch = make_batch(spread=0.0)
    _, metrics = grpo_loss(batch["logps"], None, batch["advantages"], batch["mask"])
    assert set(metrics) == {
        "num_tokens", "num_sequences", "policy_loss", "ratio_mean", "ratio_min", "ratio_max",
        "approx_kl", "clip_low", "clip_high", "clip_region",
    }  # fmt: skip
    _, metrics = grpo_loss(
        batch["logps"], None, batch["advantages"], batch["mask"],
        config=GRPOLossConfig(loss_type="vespo"),
    )  # fmt: skip
    torch.testing.assert_close(metrics["vespo_phi"], torch.tensor(1.0, dtype=torch.float64))
    assert "clip_low" not in metrics


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("level", ("token", "sequence", "sequence_token"))
def test_on_policy_gradient_is_whole(backend, level):
    # At ratio 1 both branches of min() are equal: the gradient must be -A W, not half of it.
    batch = make_batch(lengths=(4, 4), spread=0.0)
    batch["mask"][:] = torch.arange(6) < 4
    logps = torch.where(batch["mask"], batch["logps"].nan_to_num(), 0).to(DTYPE).requires_grad_()
    with ops.use(backend):
        loss, metrics = grpo_loss(
            logps, logps.detach().clone(), batch["advantages"], batch["mask"],
            config=GRPOLossConfig(level=level),
        )  # fmt: skip
        loss.backward()
    expected = -batch["advantages"][:, None] / 8 * batch["mask"]
    torch.testing.assert_close(logps.grad, expected.to(DTYPE))
    assert metrics["ratio_mean"] == 1 and metrics["clip_region"] == 0


@IN_FLOAT64
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_exact_clip_edges(backend):
    # 1.25 and 0.75 are exact in binary, and so is log-free: clamp x at the edge through delta.
    config = GRPOLossConfig(eps_low=0.5, eps_high=1.0, delta=None, log_ratio_clamp=None)
    ratios = torch.tensor([[2.0, 0.5, 2.0, 0.5, 2.0000001, 0.4999999]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    with ops.use(backend):
        loss, metrics = grpo_loss(logps, torch.zeros_like(logps), advantages, None, config=config)
        loss.backward()
    # exp(log 2) == 2 exactly in float64, so the first four sit on the edges, which belong inside.
    assert torch.equal(ratios.log().exp()[0, :4], ratios[0, :4])
    expected = -advantages * ratios / 6 * torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(logps.grad, expected)
    torch.testing.assert_close(metrics["clip_high"], torch.tensor(1 / 6, dtype=torch.float64))
    torch.testing.assert_close(metrics["clip_low"], torch.tensor(1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_learn_from(loss_type, backend):
    config = GRPOLossConfig(loss_type=loss_type, beta=0.1, max_length=4, entropy_coef=0.1)
    for batch in (make_batch(lengths=(0, 0, 0)), make_batch(lengths=())):
        with ops.use(backend):
            loss, grad, grad_entropy, metrics = call(batch, config)
        assert loss == 0 and not grad.any() and not grad_entropy.any()
        assert all(value == 0 for value in metrics.values()), metrics
    with ops.use(backend):
        packed, _ = pack(make_batch(lengths=(0, 0)))
        loss, grad, _, _ = call(packed, config, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert loss == 0 and grad.shape == (0,)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_tokens_outside_the_segments_are_ignored(backend):
    batch = make_batch()
    packed, cu_seqlens = pack(batch)
    config = GRPOLossConfig(beta=0.1, level="sequence", entropy_coef=0.1)
    edge = torch.full((5,), math.nan, dtype=torch.float64)
    wider = {n: x if n == "advantages" else torch.cat([edge, x, edge]) for n, x in packed.items()}
    with ops.use(backend):
        expected = call(packed, config, cu_seqlens=cu_seqlens)
        got = call(wider, config, cu_seqlens=cu_seqlens + 5)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1][5:-5], expected[1], rtol=0, atol=0)
    assert not got[1][:5].any() and not got[1][-5:].any()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_large_log_ratios_stay_finite(backend):
    logps = torch.tensor([[0.0, 0.0, -300.0, -300.0]], requires_grad=True)
    old = torch.tensor([[-300.0, -300.0, 0.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    config = GRPOLossConfig(beta=0.1)
    with ops.use(backend):
        loss, metrics = grpo_loss(logps, old, advantages, None, ref_logps=old, config=config)
        loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_unscored_tokens_count_as_sampled_from_old(backend):
    batch = make_batch()
    config = GRPOLossConfig(rollout_correction="sequence_mask", rollout_max=3.0)
    holes = torch.rand(batch["mask"].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    unscored = {**batch, "rollout": torch.where(holes, math.nan, batch["rollout"])}
    as_old = {**batch, "rollout": torch.where(holes, batch["old"], batch["rollout"])}
    with ops.use(backend):
        got, expected = call(unscored, config), call(as_old, config)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(
    "mask_dtype", (torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8)
)
def test_mask_dtypes(backend, mask_dtype):
    batch = make_batch()
    config = GRPOLossConfig()
    with ops.use(backend):
        expected = call(batch, config)
        batch["mask"] = batch["mask"].to(mask_dtype)
        loss, _ = grpo_loss(
            batch["logps"].to(DTYPE),
            batch["old"],
            batch["advantages"],
            batch["mask"],
            token_weights=batch["token_weights"],
        )
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_computed_in_float32(backend, dtype):
    batch = make_batch()
    logps = batch["logps"].to(dtype).requires_grad_()
    old, mask = batch["old"].to(dtype), batch["mask"]
    with ops.use(backend):
        loss, _ = grpo_loss(logps, old, batch["advantages"], mask)
        loss.backward()
        wide = logps.detach().float().requires_grad_()
        expected, _ = grpo_loss(wide, old.float(), batch["advantages"], mask)
        expected.backward()
    assert loss.dtype == torch.float32 and logps.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(logps.grad, wide.grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_strided_inputs_and_tensor_counts(backend):
    batch = make_batch()
    config = GRPOLossConfig(loss_type="dapo", num_items=torch.tensor(17))
    strided = {n: torch.stack([x, x], -1)[..., 0] if x.ndim == 2 else x for n, x in batch.items()}
    transposed = {n: x.mT.contiguous().mT if x.ndim == 2 else x for n, x in batch.items()}
    with ops.use(backend):
        expected = call(batch, dataclasses.replace(config, num_items=17.0))
        for other in (strided, transposed):
            got = call(other, config)
            torch.testing.assert_close(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_step_split_into_calls_adds_up(backend):
    batch = make_batch()
    for config in (
        GRPOLossConfig(num_sequences=len(LENGTHS)),
        GRPOLossConfig(loss_type="dapo", num_items=float(batch["mask"].sum())),
        GRPOLossConfig(loss_type="luspo", num_sequences=len(LENGTHS), level="sequence"),
    ):
        with ops.use(backend):
            whole = call(batch, config)
            parts = [
                call({n: x[b] for n, x in batch.items()}, config)
                for b in (slice(0, 2), slice(2, 5))
            ]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_repeats_bit_for_bit(backend):
    batch = make_batch(lengths=(300, 17, 900, 1) * (1 if TRITON else 8))
    config = GRPOLossConfig(level="sequence", beta=0.1, entropy_coef=0.1)
    threads = torch.get_num_threads()
    with ops.use(backend):
        first = call(batch, config, dtype=torch.float32)
        second = call(batch, config, dtype=torch.float32)
        try:
            torch.set_num_threads(3)
            other = call(batch, config, dtype=torch.float32) if backend == "cpu" else second
        finally:
            torch.set_num_threads(threads)
    for run in (second, other):
        for a, b in zip(first[:3], run[:3], strict=True):
            assert torch.equal(a, b)
        assert all(
            torch.equal(a, b) for a, b in zip(first[3].values(), run[3].values(), strict=True)
        )


@pytest.mark.skipif(native is None, reason="the native module is not built")
@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_every_instruction_set(isa):
    batch = make_batch(lengths=(300, 17, 1, 0))
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.1, rollout_correction="token_mask")
    expected = oracle(batch, config)
    try:
        native.choose_cpu_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        with ops.use("cpu"):
            got = call(batch, config, dtype=torch.float32)
    finally:
        native.choose_cpu_isa("auto")
    for a, b in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=3e-6)


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_writes_nothing_outside_the_segments():
    """Outputs are views of larger buffers, whose other elements stay as they were."""
    batch = make_batch()
    packed, cu_seqlens = pack(batch)
    n = len(packed["logps"])
    buffer = torch.full((n + 64,), 7.0, dtype=torch.float64)
    metrics = torch.full((len(METRICS) + 8,), 7.0, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    count = len(cu_seqlens) - 1
    scratch = torch.zeros(count * native.grpo_loss_scratch, dtype=torch.float64)
    inputs = LossInputs(
        packed["logps"], packed["old"], packed["advantages"], None, cu_seqlens=cu_seqlens.long()
    )
    outputs = LossOutputs(loss, buffer[32:-32], buffer[:0], metrics[4:-4], scratch)
    native.grpo_loss(inputs, native_parameters(encode(GRPOLossConfig())), outputs, 1)
    assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()
    assert (metrics[:4] == 7).all() and (metrics[-4:] == 7).all()
    expected = grpo_loss(
        packed["logps"], packed["old"], packed["advantages"], None, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(loss, expected[0])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_advantages_may_be_a_column(backend):
    batch = make_batch()
    column = {**batch, "advantages": batch["advantages"][:, None]}
    with ops.use(backend):
        expected = call(batch, GRPOLossConfig())
        got = call(column, GRPOLossConfig())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_token_weights_stay_with_tokens_where_there_are_as_many_completions(backend):
    batch = make_batch(lengths=(2, 0, 3, 1, 0, 0))
    packed, cu_seqlens = pack(batch)
    config = GRPOLossConfig(entropy_coef=0.1)
    assert len(packed["logps"]) == len(batch["mask"])
    with ops.use(backend):
        got = call(packed, config, cu_seqlens=cu_seqlens)
    for ours, want in zip(got[:3], oracle(batch, config), strict=True):
        want = want if want.ndim == 0 else want[batch["mask"]]
        near(ours, want)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_sapo_with_a_steep_gate(backend):
    # tau (1 - r) beyond log 88 and beyond 88: far from the gate's middle.
    config = GRPOLossConfig(loss_type="sapo", sapo_tau_pos=8.0, sapo_tau_neg=95.0)
    batch = make_batch(spread=3.0)
    expected = oracle(batch, config)
    scale = max(float(expected[0].abs()), float(expected[1].abs().max()))
    with ops.use(backend):
        got = call(batch, config, dtype=torch.float32)
    for ours, want in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=3e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_no_gradient_where_none_is_asked(backend):
    batch = make_batch()
    batch = {n: x if n == "mask" else x.to(DTYPE) for n, x in batch.items()}
    with ops.use(backend):
        loss, metrics = grpo_loss(batch["logps"], batch["old"], batch["advantages"], batch["mask"])
    assert not loss.requires_grad and not any(m.requires_grad for m in metrics.values())
    logps = batch["logps"].clone().requires_grad_()
    with ops.use(backend):
        loss, metrics = grpo_loss(logps, batch["old"], batch["advantages"], batch["mask"])
    assert loss.requires_grad and not any(m.requires_grad for m in metrics.values())


def op_arguments(config):
    batch = make_batch(lengths=(3, 0, 5))
    tensors = {n: x if n == "mask" else x.nan_to_num(0, 0, 0).float() for n, x in batch.items()}
    return (
        tensors["logps"], tensors["old"], tensors["advantages"], tensors["mask"], tensors["ref"],
        tensors["entropy"], tensors["rollout"], None, None, None, None, encode(config),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for config in (GRPOLossConfig(beta=0.1, entropy_coef=0.1), GRPOLossConfig(level="sequence")):
        with ops.use(backend):
            torch.library.opcheck(torch.ops.vcr1_fast.grpo_loss.default, op_arguments(config))


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whoever_watches_torch_sees_the_op(backend):
    """A call goes past the dispatcher only where nobody would notice."""
    name = "vcr1_fast.grpo_loss.default"
    arguments = op_arguments(GRPOLossConfig())[:4]
    with ops.use(backend):
        expected = grpo_loss(*arguments)[0]
        with _Seen() as seen:
            assert torch.equal(grpo_loss(*arguments)[0], expected)
        assert name in seen.names
        graph = make_fx(lambda *given: grpo_loss(*given)[0])(*arguments)
        assert name in {str(node.target) for node in graph.graph.nodes}
        with torch.profiler.profile() as profiler:
            grpo_loss(*arguments)
        assert "vcr1_fast::grpo_loss" in {event.key for event in profiler.key_averages()}
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in arguments]
        loss, metrics = grpo_loss(*fake)  # outside the mode, the tensors alone say it
        assert isinstance(loss, FakeTensor) and isinstance(metrics["ratio_mean"], FakeTensor)


# Dynamo itself makes an instance of autograd.Function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_compiles_whole(backend):
    batch = make_batch(lengths=(3, 0, 5))
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.1)

    def step(logps, entropy):
        loss, metrics = grpo_loss(
            logps, batch["old"], batch["advantages"], batch["mask"], ref_logps=batch["ref"],
            entropy=entropy, config=config,
        )  # fmt: skip
        return loss * 2, metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    with ops.use(backend):
        for run in (step, compiled):
            inputs = [batch[n].to(DTYPE, copy=True).requires_grad_() for n in ("logps", "entropy")]
            loss, kl = run(*inputs)
            loss.backward()
            results.append([loss, kl, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_recorded_values():
    """Worked by hand from TRL's formulas: two completions of 2 and 1 tokens, ratios 1.5, 0.5, 1.5.

    A = (1, -1), eps 0.2: terms -min(1.5, 1.2) = -1.2, -min(0.5, 0.8) = -0.5, and
    -min(-1.5, -1.2) = 1.5. KL k3 of d = log 2 is 2 - log 2 - 1 = 0.30685281944.
    """
    old = torch.zeros(2, 2, dtype=torch.float64)
    logps = torch.tensor([[1.5, 0.5], [1.5, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def loss(**options):
        config = GRPOLossConfig(**options)
        return grpo_loss(
            logps, old, advantages, mask, ref_logps=logps + math.log(2), config=config
        )[0].item()

    assert loss() == pytest.approx((-1.7 / 2 + 1.5) / 2)
    assert loss(loss_type="bnpo") == pytest.approx(-0.2 / 3)
    assert loss(loss_type="dr_grpo", max_length=5) == pytest.approx(-0.2 / 10)
    assert loss(loss_type="dapo", num_items=6) == pytest.approx(-0.2 / 6)
    assert loss(loss_type="luspo") == pytest.approx(-0.2 / 2)
    assert loss(delta=1.3) == pytest.approx((-1.7 / 2 + 1.3) / 2)
    assert loss(beta=0.1) == pytest.approx(0.325 + 0.1 * 0.30685281944)
    # GSPO: the first completion's ratio is sqrt(0.75) = 0.8660254, inside the range.
    assert loss(level="sequence") == pytest.approx((-0.8660254038 + 1.5) / 2)
    # cispo: weights min(r, 1.4): -1.4 (0.4054651) - 0.5 (-0.6931472) + 1.4 (0.4054651)
    assert loss(loss_type="cispo", eps_high=1.4) == pytest.approx(0.5 * 0.69314718056 / 3)
    # sapo: 4 sigmoid(.5) = 2.4898373, 4 sigmoid(-.5) = 1.5101627, 4 sigmoid(.525)/1.05 = 2.3935855
    assert loss(loss_type="sapo") == pytest.approx(
        (-(2.4898373 + 1.5101627) / 2 + 2.3935855) / 2, rel=1e-6
    )
    # vespo: w = .75: exp(3 + 2 log .75 - 3 (.75)) = 1.1908125; w = 1.5: exp(2 + 3 log 1.5 - 3)
    phi = (1.1908125, 1.2415931)
    assert loss(loss_type="vespo") == pytest.approx(
        (-phi[0] * (0.4054651 - 0.6931472) + phi[1] * 0.4054651) / 3, rel=1e-6
    )


@IN_FLOAT64
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    loss_type=st.sampled_from(LOSS_TYPES),
    level=st.sampled_from(("token", "sequence", "sequence_token")),
    spread=st.floats(0.0, 3.0),
    beta=st.sampled_from((0.0, 0.3)),
)
def test_any_batch(lengths, seed, loss_type, level, spread, beta):
    config = GRPOLossConfig(
        loss_type=loss_type, level="token" if loss_type == "vespo" else level,
        max_length=6, beta=beta, entropy_coef=0.1,
    )  # fmt: skip
    batch = make_batch(tuple(lengths), seed, spread)
    expected = oracle(batch, config)
    for backend in BACKENDS:
        with ops.use(backend):
            got = call(batch, config)
        for a, b in zip(got[:3], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo'"),
        ({"loss_type": "vespo", "level": "sequence"}, "vespo needs level"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta is for"),
        ({"loss_type": "dr_grpo"}, "max_length"),
        ({"rollout_correction": "token_icepop", "rollout_max": 2.0}, "rollout_min"),
        ({"loss_type": "dr_grpo", "max_length": -5}, "max_length"),
        ({"rollout_min": 2.0, "rollout_max": 0.5}, "rollout_min 2.0 is above"),
        ({"eps_low": -0.1}, "eps_low"),
        ({"eps_high": math.nan}, "eps_high"),
        ({"sapo_tau_neg": 0.0}, "sapo_tau_neg"),
        ({"beta": math.nan}, "beta must be finite and not negative, got nan"),
        ({"beta": math.inf}, "beta must be .* got inf"),
        ({"beta": -0.1}, "beta must be .* got -0.1"),
        ({"beta": "0.1"}, "beta must be .* got '0.1'"),
        ({"beta": None}, "beta must be .* got None"),
        ({"eps_low": True}, "eps_low must be .* got True"),
        ({"delta": math.inf}, "delta must be finite and positive or None, got inf"),
        ({"delta": 0}, "delta must be .* got 0"),
        ({"log_ratio_clamp": math.nan}, "log_ratio_clamp must be .* got nan"),
        ({"kl_input_clamp": -1.0}, "kl_input_clamp must be .* got -1.0"),
        ({"entropy_coef": math.inf}, "entropy_coef must be a finite number, got inf"),
        ({"off_policy_threshold": math.inf}, "off_policy_threshold must be .* got inf"),
        ({"rollout_min": -0.5}, "rollout_min must be .* got -0.5"),
        ({"rollout_max": math.inf}, "rollout_max must be .* got inf"),
        ({"vespo_k_pos": math.nan}, "vespo_k_pos must be .* got nan"),
        ({"num_items": -3}, "num_items must be .* got -3"),
        ({"num_items": 0.0}, "num_items must be .* got 0.0"),
        ({"num_items": math.nan}, "num_items must be .* got nan"),
        ({"num_items": torch.tensor(-3.0)}, "num_items must be .* got -3.0"),
        ({"num_sequences": torch.tensor(math.inf)}, "num_sequences must be .* got inf"),
        ({"num_sequences": torch.ones(2)}, r"num_sequences must be one number, got shape \(2,\)"),
    ),
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**options)


def test_every_number_of_the_config_is_checked():
    names = {f.name for f in dataclasses.fields(GRPOLossConfig) if "float" in str(f.type)}
    names |= {"max_length"}
    assert {"beta", "delta", "num_items"} < names
    for name in names:
        with pytest.raises(ValueError, match=f"{name} must be .* got nan"):
            GRPOLossConfig(**{name: math.nan})


def test_call_errors():
    x, a = torch.zeros(2, 3), torch.zeros(2)
    for arguments, options, message in (
        ((x, x[:, :2], a, None), {}, "old_logps has shape"),
        ((x, x, torch.zeros(3), None), {}, "advantages has shape"),
        ((x[0], x[0], a, None), {}, "tokens must be"),
        ((x, x, a, None), {"config": GRPOLossConfig(beta=0.1)}, "needs ref_logps"),
        ((x, x, a, None), {"config": GRPOLossConfig(entropy_coef=0.1)}, "needs entropy"),
        ((x, x, a, None), {"config": GRPOLossConfig(rollout_correction="token_mask")}, "rollout"),
        ((x, x, a, None), {"cu_seqlens": torch.tensor([0, 6])}, "must be"),
        ((x.long(), x, a, None), {}, "floating"),
        ((x[0], x[0], a, None), {"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens"),
        ((x[0], x[0], a, None), {"cu_seqlens": torch.tensor([0, 2, 4])}, "must rise within 0 to 3"),
        ((x[0], x[0], a, None), {"cu_seqlens": torch.tensor([0, 2, 1])}, "must rise within 0 to 3"),
        ((x[0], x[0], a, None), {"cu_seqlens": torch.tensor([-1, 2, 3])}, "must rise within"),
    ):
        for backend in BACKENDS:
            with ops.use(backend), pytest.raises(ValueError, match=message):
                grpo_loss(*arguments, **options)


def test_metric_names_are_unique():
    assert len(set(METRICS)) == len(METRICS)


def _stored(metrics):
    file = io.BytesIO()
    torch.save(metrics, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


READERS = {
    "json": lambda metrics: json.loads(json.dumps(metrics, default=float)),
    "pytree": lambda metrics: pytree.tree_map(float, metrics),
    "torch.load": _stored,
    "pickle": lambda metrics: pickle.loads(pickle.dumps(metrics)),
    "deepcopy": copy.deepcopy,
}


def _small_metrics():
    return grpo_loss(torch.zeros(2, 3, requires_grad=True), None, torch.ones(2), None)[1]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_metrics_are_a_plain_dict(read):
    metrics = _small_metrics()
    assert type(metrics) is dict
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    expected = {name: float(value) for name, value in metrics.items()}
    assert expected["num_tokens"] == 6
    got = read(_small_metrics())  # which nobody has read yet
    assert {name: float(value) for name, value in got.items()} == expected


def test_parameters_survive_encoding_bit_for_bit():
    """Operators take parameters as text; 0.1 + 0.2 and infinities must come back as they were."""
    config = GRPOLossConfig(
        loss_type="cispo", beta=0.1 + 0.2, delta=None, rollout_min=1e-300, exclude_empty=True,
        rollout_correction="sequence_icepop", rollout_max=1 / 3, kl_straight_through=True,
    )  # fmt: skip
    parameters = decode(encode(config))
    assert parameters == parameters_of(config)
    assert parameters.beta == 0.1 + 0.2 and parameters.delta == math.inf
    assert parameters.exclude_empty is True and parameters.kl_bias_correction is False
    with pytest.raises(ValueError, match="unknown fields beta"):
        decode(encode(config).replace("beta=", "beta_="))


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_native_parameters_are_bound_by_name():
    fields = vars(parameters_of(GRPOLossConfig()))
    native.GrpoParameters(**dict(reversed(fields.items())))  # any order
    with pytest.raises(ValueError, match="beta is missing"):
        native.GrpoParameters(**{n: v for n, v in fields.items() if n != "beta"})
    with pytest.raises(ValueError, match="expected 30 fields, got 31"):
        native.GrpoParameters(**fields, other=1.0)
    with pytest.raises(ValueError, match="unknown loss_type 'ppo'"):
        native.GrpoParameters(**{**fields, "loss_type": "ppo"})


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_native_tensors_are_checked_by_name():
    x = torch.zeros(2, 3)
    inputs = LossInputs(x, x, torch.zeros(2), None)
    scratch = torch.zeros(2 * native.grpo_loss_scratch, dtype=torch.float64)
    outputs = LossOutputs(torch.zeros(()), x.clone(), x[:0], torch.zeros(len(METRICS)), scratch)
    parameters = native_parameters(encode(GRPOLossConfig()))
    native.grpo_loss(inputs, parameters, outputs, 1)
    for name, wrong, message in (
        ("old_logps", torch.zeros(2, 4), "old_logps: expected 6 elements, got 8"),
        ("ref_logps", x.double(), "ref_logps: expected float32, got float64"),
        ("advantages", None, "advantages: expected a tensor, got None"),
        ("mask", torch.zeros(5, dtype=torch.bool), "mask: expected 6 elements"),
        ("logps", torch.zeros(3, 2).T, "logps: expected a contiguous tensor"),
        ("logps", torch.zeros(6), "logps: expected \\(B, T\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            native.grpo_loss(inputs._replace(**{name: wrong}), parameters, outputs, 1)
    with pytest.raises(TypeError, match="mask: expected a tensor, got"):
        native.grpo_loss(inputs._replace(mask=[True]), parameters, outputs, 1)
    with pytest.raises(ValueError, match="metrics: expected 20 elements, got 19"):
        native.grpo_loss(inputs, parameters, outputs._replace(metrics=torch.zeros(19)), 1)
