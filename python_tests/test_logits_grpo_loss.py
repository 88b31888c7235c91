"""logits_grpo_loss against the float64 loop over completions, for every backend."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gpu_backend import device_of, needs_gpu, with_cuda
from grpo_oracle import loop_loss

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, logits_grpo_loss
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.grpo.config import LOSS_TYPES, encode
from vcr1_fast.ops.grpo.logits_loss import reference
from vcr1_fast.ops.grpo.loss import grpo_loss_op

VOCAB, LENGTHS = 37, (5, 0, 1, 9)
BACKENDS = [name for name in with_cuda(grpo_loss_op) if name != "triton"]
# With TRITON_INTERPRET=1 alone, for `make test` runs those in a process of their own.
TRITON = [name for name in ("triton",) if name in grpo_loss_op.backends("cpu")]
CONFIGS = {
    **{name: GRPOLossConfig(loss_type=name, max_length=9, beta=0.1) for name in LOSS_TYPES},
    "sequence": GRPOLossConfig(level="sequence", beta=0.1, kl_bias_correction=True),
    "entropy": GRPOLossConfig(entropy_coef=0.2, loss_type="bnpo"),
    "rollout": GRPOLossConfig(rollout_correction="sequence_mask", rollout_max=3.0),
    "off_policy": GRPOLossConfig(off_policy_threshold=0.05),
}
# Of these a token's gradient takes the log-probs of its completion's other tokens.
COUPLED = ("vespo", "sequence", "off_policy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Interpreted kernels are numpy, which warns of the infinities that GPUs compute with."""
    with np.errstate(all="ignore"):
        yield


def make_batch(dtype=torch.float64, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    rows, columns = len(lengths), max(lengths) + 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    batch = {
        "logits": 2 * normal(rows, columns, VOCAB),
        "labels": torch.randint(VOCAB, (rows, columns), generator=generator),
        "advantages": normal(rows),
        "mask": mask,
        "temperature": 0.7 + normal(rows, columns).abs(),
        "token_weights": normal(rows, columns).abs(),
    }
    logps, _ = head(batch["logits"], batch, 1.0)
    for name in ("old_logps", "ref_logps", "rollout_logps"):
        batch[name] = torch.where(mask, logps + 0.4 * normal(rows, columns), math.nan)
    batch["logits"][~mask] = math.nan
    batch["labels"][~mask] = -100
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}


def moved(batch, backend):
    return {n: x if x is None else x.to(device_of(backend)) for n, x in batch.items()}


def head(logits, batch, temperature):
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None]
    log_p = (logits / temperature).log_softmax(-1)
    logps = log_p.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    return logps, -(log_p.exp() * log_p).sum(-1)


def pack(batch):
    mask = batch["mask"]
    packed = {
        n: x[mask] if x.shape[:2] == mask.shape and n != "mask" else x for n, x in batch.items()
    }
    counts = mask.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return {**packed, "mask": None, "cu_seqlens": offsets}


def call(batch, config, *, temperature=1.0, inplace=False, scale=3.0):
    """(loss, gradient of the logits, metrics), the first two on the CPU."""
    leaf = batch["logits"].clone().requires_grad_()
    loss, metrics = logits_grpo_loss(
        leaf * 1, batch["labels"], batch["advantages"], batch["mask"],
        **{n: batch[n] for n in ("old_logps", "ref_logps", "rollout_logps", "token_weights")},
        cu_seqlens=batch.get("cu_seqlens"), temperature=temperature, inplace=inplace,
        config=config,
    )  # fmt: skip
    (scale * loss).backward()
    return loss.detach().cpu(), leaf.grad.cpu() / scale, metrics


def oracle(batch, config, temperature=1.0):
    mask = batch["mask"]
    leaf = torch.where(mask[..., None], batch["logits"].double(), 0).requires_grad_()
    logps, entropy = head(leaf, batch, temperature)
    keys = {"old": "old_logps", "ref": "ref_logps", "rollout": "rollout_logps"}
    sequences = [
        {
            "logps": logps[b][kept],
            "entropy": entropy[b][kept],
            "advantages": batch["advantages"][b].double().expand_as(kept)[kept],
            "token_weights": batch["token_weights"][b][kept].double(),
            **{key: batch[name][b][kept].double() for key, name in keys.items()},
        }
        for b, kept in enumerate(mask)
    ]
    loss = loop_loss(config, sequences)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_loop(name, backend):
    batch, config = make_batch(), CONFIGS[name]
    mask = batch["mask"]
    here, flat = moved(batch, backend), moved(pack(batch), backend)
    for each in (False, True):
        expected = oracle(batch, config, batch["temperature"] if each else 1.0)
        with ops.use(backend):
            for inplace in (False, True):
                t = here["temperature"] if each else 1.0
                got = call(here, config, temperature=t, inplace=inplace)
                torch.testing.assert_close(got[:2], expected, rtol=1e-6, atol=1e-7)
                assert not got[1][~mask].any()
            packed = call(flat, config, temperature=flat["temperature"] if each else 1.0)
        torch.testing.assert_close(packed[0], expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(packed[1], expected[1][mask], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy"))
def test_error_in_each_dtype(name, dtype, backend):
    batch, config = make_batch(dtype), CONFIGS[name]
    expected = oracle(batch, config)
    with ops.use(backend):
        here = moved(batch, backend)
        results = [call(here, config, inplace=inplace) for inplace in (False, True)]
    assert torch.equal(results[0][1], results[1][1])
    loss, grad, _ = results[0]
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    assert (loss.double() - expected[0]).abs() < 4 * eps * expected[0].abs()
    assert (grad.double() - expected[1]).norm() < 2 * eps * expected[1].norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "entropy"))
def test_matches_the_reference_with_its_metrics(name, backend):
    batch, config = make_batch(), CONFIGS[name]
    batch["logits"] = batch["logits"].nan_to_num(0)
    batch["labels"] = batch["labels"].clamp(min=0)
    batch = moved(batch, backend)
    names = ("old_logps", "ref_logps", "rollout_logps", "token_weights")
    options = {**{n: batch[n] for n in names}, "config": config}
    args = [batch[n] for n in ("logits", "labels", "advantages", "mask")]
    with ops.use(backend):
        loss, metrics = logits_grpo_loss(*args, **options, entropy=True)
    with ops.use("reference"):
        expected, expected_metrics = reference(*args, **options)
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == set(expected_metrics)
    for key, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[key])


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_of_the_logits(backend):
    batch = moved(make_batch(torch.float32), backend)
    args = [batch[n] for n in ("labels", "advantages", "mask")]
    leaf = batch["logits"].nan_to_num(0).requires_grad_()
    logits = leaf * 1
    before = logits.detach().clone()
    with ops.use(backend):
        with torch.no_grad():  # nothing to make a gradient of: left alone
            logits_grpo_loss(logits, *args, inplace=True)
        assert torch.equal(logits, before)
        loss, _ = logits_grpo_loss(logits, *args, inplace=True)
        assert not torch.equal(logits, before)
        assert not loss.isnan()
        squared = leaf**2 * 1
        total = (squared**2).sum() + logits_grpo_loss(squared, *args, inplace=True)[0]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat_and_kept_graphs(backend):
    batch = moved(make_batch(torch.float32), backend)
    args = [batch[n] for n in ("labels", "advantages", "mask")]
    leaf = batch["logits"].clone().requires_grad_()
    with ops.use(backend):
        first, second = (call(batch, CONFIGS["grpo"])[:2] for _ in range(2))
        loss, _ = logits_grpo_loss(leaf, *args)
        (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = one.clone()
        one.zero_()
        (two,) = torch.autograd.grad(2 * loss, leaf)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(two, 2 * kept)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_opcheck(backend):
    batch = moved(make_batch(torch.float32), backend)
    parameters = encode(GRPOLossConfig(beta=0.1, entropy_coef=0.1))
    x = {n: t.nan_to_num(0) if t.is_floating_point() else t for n, t in batch.items()}
    args = (
        x["logits"], x["labels"].clamp(min=0), None, x["old_logps"], x["advantages"], x["mask"],
        x["ref_logps"], None, None, None, None, 1.0, True, parameters,
    )  # fmt: skip
    with ops.use(backend):
        torch.library.opcheck(torch.ops.vcr1_fast.logits_grpo_loss.default, (*args, True))
        torch.library.opcheck(torch.ops.vcr1_fast.logits_grpo_loss_.default, args)


# Dynamo itself makes an instance of autograd.Function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_compiles_whole(backend):
    batch = moved(make_batch(torch.float32), backend)
    batch["logits"] = batch["logits"].nan_to_num(0)

    def step(logits):
        loss, metrics = logits_grpo_loss(
            logits * 1.0, batch["labels"], batch["advantages"], batch["mask"], inplace=True
        )
        return loss * 2, metrics["ratio_mean"]

    results = []
    with ops.use(backend):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = batch["logits"].clone().requires_grad_()
            loss, ratio = run(leaf)
            loss.backward()
            results.append([loss, ratio, leaf.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_in_larger_ones(backend):
    batch = moved(make_batch(torch.float32), backend)
    inside = dict(batch)
    for name, x in batch.items():
        if name != "logits" and x.ndim > 1:
            inside[name] = torch.cat([x, x], dim=1)[:, x.shape[1] :]
            assert not inside[name].is_contiguous()
    with ops.use(backend):
        for inplace in (False, True):
            expected, got = (
                call(x, CONFIGS["entropy"], inplace=inplace)[:2] for x in (batch, inside)
            )
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.fixture
def one_pass_calls(monkeypatch):
    """A list that grows with each call of the kernel that takes logits to their gradient."""
    calls, kernel = [], native.logits_grpo_loss

    def counted(*args):
        calls.append(None)
        return kernel(*args)

    monkeypatch.setattr(native, "logits_grpo_loss", counted)
    return calls


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_matches_the_loop(name, dtype, one_pass_calls):
    batch, config = make_batch(dtype), CONFIGS[name]
    batch["temperature"] = batch["temperature"].float()
    mask = batch["mask"]
    loss, grad = oracle(batch, config, batch["temperature"].double())
    eps = max(torch.finfo(dtype).eps, 4e-6)
    for form, kept in ((batch, mask), (pack(batch), ...)):
        here = moved(form, "cuda")
        for inplace in (False, True):
            got = call(here, config, temperature=here["temperature"], inplace=inplace)
            torch.testing.assert_close(got[0].double(), loss, rtol=1e-5, atol=1e-6)
            error = got[1][kept].double() - grad[mask]
            assert error.norm() < 2 * eps * grad.norm()
            assert kept is ... or not got[1][~mask].any()
    assert len(one_pass_calls) == (0 if name in COUPLED else 4)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (5, 131, 9001, 50_001, 152_064))
def test_one_pass_in_rows_of_any_alignment(vocab, dtype, one_pass_calls):
    """Against float64, with what is around the rows, which holds 77 there."""
    generator = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(2, 3, vocab, generator=generator)).to(dtype)
    labels = torch.tensor([[0, vocab - 1, 1], [vocab // 2, 2, 3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([1.5, -0.5])
    leaf = values.double().requires_grad_()
    options = {"config": CONFIGS["entropy"], "temperature": 0.9}
    with ops.use("reference"):
        expected, _ = logits_grpo_loss(leaf, labels, advantages, mask, **options)
        expected.backward()
    rest = [x.to(device_of("cuda")) for x in (labels, advantages, mask)]
    for start in (0, 1, 8):
        for inplace in (False, True):
            buffer = torch.full((2, 4, vocab + 11), 77.0, dtype=dtype, device=device_of("cuda"))
            view = buffer[:, :3, start : start + vocab].requires_grad_()
            view.detach().copy_(values)
            loss, _ = logits_grpo_loss(view, *rest, inplace=inplace, **options)
            (grad,) = torch.autograd.grad(loss, view)
            torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
            error = (grad.cpu().double() - leaf.grad).norm()
            assert error < 2 * max(torch.finfo(dtype).eps, 2e-6) * leaf.grad.norm()
            assert torch.equal(view.cpu(), grad.cpu() if inplace else values)
            view.detach().fill_(77)
            assert (buffer == 77).all()
    assert len(one_pass_calls) == 6


def test_errors():
    batch = make_batch(torch.float32)
    args = {n: batch[n] for n in ("logits", "labels", "advantages", "mask")}
    several = batch["labels"][..., None].expand(-1, -1, 2)
    for changes, message in (
        ({"labels": batch["labels"][:2]}, "labels must be"),
        ({"labels": several}, r"labels must be \(4, 11\) for logits"),
        ({"logits": batch["logits"].long()}, "logits must be floating point"),
        ({"advantages": torch.zeros(3)}, "advantages has shape"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"labels": batch["labels"].clamp(min=VOCAB)}, "outside a vocabulary of 37"),
        ({"config": dataclasses.replace(CONFIGS["grpo"])}, "needs ref_logps"),
    ):
        with pytest.raises(ValueError, match=message):
            logits_grpo_loss(**{**args, **changes})
