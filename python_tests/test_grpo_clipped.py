"""The CPU's loop in registers for the common GRPO losses (float32), against the reference in
float64, and against the loop for every option, which token weights of 1 make it leave to."""

import dataclasses
import itertools
import math

import pytest
import torch

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, grpo_loss
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.grpo.config import encode
from vcr1_fast.ops.grpo.loss import LossOutputs, grpo_loss_op, native_parameters
from vcr1_fast.ops.grpo.reference import METRICS, LossInputs

pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")

# About a vector of 4, 8 or 16 tokens, two of them, and the 1024 that are summed at a time.
LENGTHS = (0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 1023, 1024, 1025, 2050)
CONFIGS = {
    "plain": GRPOLossConfig(),
    "kl": GRPOLossConfig(beta=0.1, eps_high=0.28),
    "dual": GRPOLossConfig(beta=0.1, delta=1.5),
    "delta_inside": GRPOLossConfig(delta=1.05),
    "sequence": GRPOLossConfig(beta=0.1, level="sequence", loss_type="dapo"),
    "sequence_token": GRPOLossConfig(level="sequence_token", loss_type="luspo"),
    "cispo": GRPOLossConfig(loss_type="cispo", eps_high=1.2, beta=0.2),
    "cispo_sequence": GRPOLossConfig(loss_type="cispo", cispo_bounds="relative", level="sequence"),
    "narrow": GRPOLossConfig(
        beta=0.3, log_ratio_clamp=0.3, kl_input_clamp=0.4, kl_output_clamp=0.05, loss_type="bnpo"
    ),
    "unbounded": GRPOLossConfig(beta=0.1, log_ratio_clamp=None, kl_input_clamp=None),
    "entropy": GRPOLossConfig(entropy_coef=0.2, loss_type="dr_grpo", max_length=3000),
    "entropy_mean": GRPOLossConfig(
        entropy_coef=-0.2, entropy_aggregation="token_mean", exclude_empty=True, level="sequence"
    ),
}


def make_batch(lengths=LENGTHS, seed=0):
    """float32 inputs; what is outside the mask is inf and nan."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 3)
    logps = -torch.rand(shape, generator=generator) - 0.1
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask &= (torch.rand(shape, generator=generator) < 0.8) | (torch.arange(shape[1]) == 0)
    batch = {"logps": logps}
    for name in ("old_logps", "ref_logps"):
        batch[name] = logps + 0.3 * torch.randn(shape, generator=generator)
    batch["entropy"] = torch.rand(shape, generator=generator)
    for index, (name, x) in enumerate(batch.items()):
        batch[name] = torch.where(mask, x, (math.nan, math.inf, -math.inf)[index % 3])
    batch["advantages"] = torch.randn(len(lengths), generator=generator)
    batch["mask"] = mask
    return batch


def run(batch, config, backend="cpu", **options):
    """(loss, gradients of logps and entropy, metrics)."""
    tensors = dict(batch)
    for name in ("logps", "entropy"):
        tensors[name] = tensors[name].clone().requires_grad_()
    positional = [tensors.pop(name) for name in ("logps", "old_logps", "advantages", "mask")]
    with ops.use(backend):
        loss, metrics = grpo_loss(*positional, **tensors, **options, config=config)
        loss.backward()
    grad_entropy = tensors["entropy"].grad
    if grad_entropy is None:
        grad_entropy = torch.zeros_like(positional[0])
    return loss.detach(), positional[0].grad, grad_entropy, metrics


def wide(batch):
    return {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in batch.items()
    }


def check(got, want):
    scale = max(float(want[0].abs()), float(want[1].abs().max()))
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=3e-5, atol=3e-6 * scale)
    assert got[3].keys() == want[3].keys()
    for name, value in want[3].items():
        torch.testing.assert_close(
            got[3][name].double(), value.double(), rtol=3e-5, atol=1e-6, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_reference_in_float64(name, isa):
    batch, config = make_batch(), CONFIGS[name]
    try:
        native.choose_cpu_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for dropped in ((), ("old_logps",), ("ref_logps",), ("mask",)):
            if config.beta and "ref_logps" in dropped:
                continue
            given = {**batch, **dict.fromkeys(dropped)}
            if "mask" in dropped:
                given = {
                    n: x if x is None or x.ndim == 1 else x.nan_to_num(-0.5, -0.5, -0.5)
                    for n, x in given.items()
                }
            check(run(given, config), run(wide(given), config, "reference"))
    finally:
        native.choose_cpu_isa("auto")


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_with_advantages_by_token(name):
    batch, config = make_batch(), CONFIGS[name]
    mask = batch["mask"]
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = {n: x[mask] if x.ndim == 2 else x for n, x in batch.items() if n != "mask"}
    packed["mask"] = None
    want = run(wide(batch), config, "reference")
    got = run(packed, config, cu_seqlens=counts)
    check(got, (want[0], want[1][mask], want[2][mask], want[3]))
    if config.level == "token":
        each = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
        batch["advantages"] = torch.where(mask, each, math.nan)
        check(run(batch, config), run(wide(batch), config, "reference"))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_loops_agree(name):
    batch, config = make_batch(), CONFIGS[name]
    general = run(batch, config, token_weights=torch.ones_like(batch["logps"]))
    check(run(batch, config), general)


@pytest.mark.parametrize("value", (200.0, -200.0, math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("place", (0, 40))
@pytest.mark.parametrize("name", ("kl", "sequence", "cispo", "unbounded"))
def test_extreme_log_probs_give_what_the_other_loop_gives(name, place, value):
    batch = {
        n: x.nan_to_num(-0.5, -0.5, -0.5) if x.ndim == 2 else x
        for n, x in make_batch((45, 45)).items()
    }
    batch["mask"] = torch.ones(batch["logps"].shape, dtype=torch.bool)
    for tensor in ("logps", "old_logps", "ref_logps"):
        given = {**batch, tensor: batch[tensor].clone()}
        given[tensor][0, place] = value
        got = run(given, CONFIGS[name])
        want = run(given, CONFIGS[name], token_weights=torch.ones_like(batch["logps"]))
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=1e-6, equal_nan=True)
        assert all(torch.equal(got[3][n].isfinite(), want[3][n].isfinite()) for n in want[3])


@pytest.mark.parametrize("name", ("kl", "sequence", "entropy"))
def test_bits_do_not_depend_on_threads(name):
    batch = make_batch((1400, 3, 900, 1023) * 40)  # more than one piece of work for each
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(batch, CONFIGS[name]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
        assert all(torch.equal(results[0][3][n], value) for n, value in other[3].items())


@pytest.mark.parametrize("columns", (5, 16, 37, 64))
def test_writes_its_tokens_and_no_others(columns):
    rows = 3
    x = torch.rand(rows, columns)
    advantages, entropy = torch.rand(rows), torch.rand(rows, columns)
    parameters = native_parameters(encode(GRPOLossConfig(beta=0.1, entropy_coef=0.1)))
    buffers = [torch.full((rows * columns + 64,), 7.0) for _ in range(2)]
    grad, grad_entropy = (b[32:-32].view(rows, columns) for b in buffers)
    scratch = torch.empty(rows * native.grpo_loss_scratch, dtype=torch.float64)
    outputs = LossOutputs(torch.empty(()), grad, grad_entropy, torch.empty(len(METRICS)), scratch)
    inputs = LossInputs(x, x.clone(), advantages, None, x.clone(), entropy)
    native.grpo_loss(inputs, parameters, outputs, 1)
    for buffer in buffers:
        assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()
        assert (buffer[32:-32] != 7).all()


def test_a_tie_at_the_edge_of_the_range_has_the_whole_gradient():
    # 1.5 is exact: the ratio is the bound itself, and one more unit in the last place is outside.
    config = GRPOLossConfig(eps_low=0.5, eps_high=0.5, log_ratio_clamp=None)
    ratios = torch.tensor([[1.5, 1.5 + 2**-20, 0.5, 0.5 - 2**-20]], dtype=torch.float64)
    logps = ratios.log()
    for advantage in (1.0, -1.0):
        batch = {
            "logps": logps, "old_logps": torch.zeros_like(logps), "mask": None, "ref_logps": None,
            "advantages": torch.tensor([advantage], dtype=torch.float64),
            "entropy": torch.zeros_like(logps),
        }  # fmt: skip
        exact = run(batch, config, "reference")
        single = {n: x if x is None else x.float() for n, x in batch.items()}
        outside = [1, 3]  # rounding may move the others over the edge
        torch.testing.assert_close(
            run(single, config)[1][:, outside].double(), exact[1][:, outside], rtol=1e-6, atol=0
        )


def test_options_that_the_loop_does_not_have_are_left_to_the_other():
    batch = make_batch((20, 5))
    changes = {
        "loss_type": ("sapo", "vespo"),
        "kl": ("k1", "k2", "abs"),
        "kl_bias_correction": (True,),
        "kl_straight_through": (True,),
        "off_policy_threshold": (0.0,),
    }
    base = GRPOLossConfig(beta=0.2)
    for name, value in itertools.chain(*([(n, v) for v in vs] for n, vs in changes.items())):
        config = dataclasses.replace(base, **{name: value})
        check(run(batch, config), run(wide(batch), config, "reference"))
    assert "cpu" in grpo_loss_op.backends("cpu")
