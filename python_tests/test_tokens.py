"""The GRPO loss's tokens one by one: ops against the reference, and torch's launches counted."""

import math
import random
import re

import pytest
import torch

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, linear_grpo_loss, logits_grpo_loss
from vcr1_fast.ops.grpo.config import LOSS_TYPES, encode
from vcr1_fast.ops.grpo.loss import LossArguments
from vcr1_fast.ops.grpo.tokens import as_tokens, grpo_tokens_op, pack
from vcr1_fast.ops.lm_head import gather_rows_op, scatter_rows_op

BACKENDS = [name for name in ("cpu", "cuda") if name in grpo_tokens_op.backends("cpu")]
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
ICEPOP = ("token_icepop", "sequence_icepop")


def random_arguments(seed, dtype):
    """A batch, padded or packed, with the options that a token's weight depends on."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    options = {"loss_type": rng.choice([n for n in LOSS_TYPES if n != "vespo"]), "max_length": 7}
    options["aggregation"] = rng.choice(
        (None, "sequence_mean", "token_mean", "sequence_sum", "max_length", "num_items")
    )
    options["exclude_empty"] = rng.random() < 0.5
    options["log_ratio_clamp"] = rng.choice((20.0, 0.1))  # log-ratios are within +-0.5
    if rng.random() < 0.6:
        kind = rng.choice((*CORRECTIONS, *ICEPOP))
        options |= {"rollout_correction": kind, "rollout_min": 0.5, "rollout_max": 2.0}
    if rng.random() < 0.5:
        options["entropy_coef"] = 0.2
        options["entropy_aggregation"] = rng.choice(("loss", "token_mean"))
    count = None
    if rng.random() < 0.3:
        count = torch.tensor(11.0, dtype=dtype)
        options["num_items"] = options["num_sequences"] = count
    config = GRPOLossConfig(**options)
    offsets = None
    if rng.random() < 0.5:
        counts = [rng.choice((0, 1, 5, 31, 33, 130, 300)) for _ in range(rng.randint(1, 9))]
        # Tokens before the first completion and after the last are in none.
        offsets = torch.tensor([rng.choice((0, 3)), *counts]).cumsum(0)
        shape = (int(offsets[-1]) + rng.choice((0, 4)),)
        sequences = len(counts)
    else:
        shape = (rng.randint(1, 7), rng.choice((1, 2, 31, 33, 129, 300)))
        sequences = shape[0]

    def near():
        return torch.randn(shape, dtype=dtype) * 0.1 - 2

    per_token = rng.random() < 0.3 and shape[0] != sequences
    aggregation = config.resolved_aggregation
    return LossArguments(
        labels=torch.randint(50, shape),
        row_temperature=torch.rand(shape) if rng.random() < 0.5 else None,
        old_logps=near(),
        advantages=torch.randn(shape if per_token else (sequences,), dtype=dtype),
        mask=torch.rand(shape) < 0.7 if rng.random() < 0.7 else None,
        ref_logps=near(),
        rollout_logps=torch.where(torch.rand(shape) < 0.1, math.nan, near()),
        token_weights=torch.rand(shape, dtype=dtype) if rng.random() < 0.5 else None,
        cu_seqlens=offsets,
        denominator=None if aggregation == "token_mean" else count,
        temperature=1.0,
        entropy=config.entropy_coef != 0,
        parameters=encode(config),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(16))
def test_tokens_and_their_gradients_are_those_of_the_reference(seed, backend):
    dtype = (torch.float32, torch.float64)[seed % 2]
    args = random_arguments(seed, dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if seed % 2 == 0 else {"rtol": 1e-10, "atol": 1e-12}
    with ops.use("reference"):
        expected = as_tokens(args)
    with ops.use(backend):
        got = as_tokens(args)
    assert got.parameters == expected.parameters
    assert torch.equal(got.keep, expected.keep)
    keep = got.keep
    vectors = [(got.grad_entropy, expected.grad_entropy)]
    vectors += list(zip(got.inputs, expected.inputs, strict=True))
    for a, b in vectors:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a[keep], b[keep], equal_nan=True, **tolerance)
    for name in ("weights", "advantages"):
        assert not getattr(got.inputs, name)[~keep].any()
    logps = torch.randn(keep.shape, dtype=dtype) * 0.1 - 2
    with ops.use("reference"):
        wanted = expected.gradients(logps)
    with ops.use(backend):
        part = slice(1, len(keep))
        torch.testing.assert_close(
            got.part(part).gradients(logps[part])[keep[part]], wanted[part][keep[part]], **tolerance
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(10))
def test_packed_tokens_are_those_of_the_mask(seed, backend):
    args = random_arguments(100 + seed, torch.float32)
    shape = args.labels.shape
    mask = torch.rand(shape) < (0.6 if seed else 0.0)
    args = args._replace(mask=mask)
    with ops.use(backend):
        packed, rows = pack(args)
    begin, end = 0, mask.numel()
    sequences = shape[0]
    offsets = torch.arange(sequences + 1) * (shape[1] if len(shape) == 2 else 0)
    if args.cu_seqlens is not None:
        begin, end = int(args.cu_seqlens[0]), int(args.cu_seqlens[-1])
        offsets, sequences = args.cu_seqlens, len(args.cu_seqlens) - 1
    keep = [i for i in range(begin, end) if mask.reshape(-1)[i]]
    assert rows.tolist() == keep
    assert packed.mask is None
    assert packed.cu_seqlens.tolist() == [sum(i < o for i in keep) for o in offsets.tolist()]
    for name in ("labels", "row_temperature", "old_logps", "rollout_logps", "token_weights"):
        before, after = getattr(args, name), getattr(packed, name)
        assert (before is None) == (after is None)
        if before is not None:
            torch.testing.assert_close(
                after, before.reshape(-1)[rows], rtol=0, atol=0, equal_nan=True
            )
    if args.advantages.shape == shape:
        assert torch.equal(packed.advantages[:, 0], args.advantages.reshape(-1)[rows])
    else:
        assert torch.equal(packed.advantages, args.advantages.reshape(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (1, 7, 8, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_rows_taken_out_and_put_back(width, dtype, backend):
    whole = torch.randn(9, width + 3).to(dtype)
    x, rows = whole[:, 3:], torch.tensor([0, 2, 3, 8])
    with ops.use(backend):
        taken = gather_rows_op(x, rows)
        back = scatter_rows_op(taken, rows, 9)
        none = scatter_rows_op(taken[:0], rows[:0], 9)
    assert torch.equal(taken, x[rows])
    expected = torch.zeros_like(x)
    expected[rows] = x[rows]
    assert torch.equal(back, expected)
    assert none.shape == x.shape and not none.any()


def test_as_many_tokens_as_completions():
    """Packed, N = B advantages per token must not be taken for one per completion."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(9, 4).double()
    labels, advantages = torch.randint(9, (2, 3)), torch.randn(2, 3).double()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    config = GRPOLossConfig(loss_type="dapo")
    for backend in (*BACKENDS, "reference"):
        with ops.use(backend):
            loss, _ = linear_grpo_loss(hidden, weight, labels, advantages, mask, config=config)
        assert float(loss) == pytest.approx(-float(advantages[mask].mean()), abs=1e-12)


CONFIGS = {
    **{name: GRPOLossConfig(loss_type=name, max_length=9, beta=0.1) for name in LOSS_TYPES},
    **{
        name: GRPOLossConfig(rollout_correction=name, rollout_min=0.5, rollout_max=2.0)
        for name in (*CORRECTIONS, *ICEPOP)
    },
    "sequence": GRPOLossConfig(level="sequence", beta=0.1, kl_bias_correction=True),
    "entropy": GRPOLossConfig(entropy_coef=0.2, loss_type="bnpo", exclude_empty=True),
    "entropy_token_mean": GRPOLossConfig(entropy_coef=0.2, entropy_aggregation="token_mean"),
    "off_policy": GRPOLossConfig(off_policy_threshold=0.05),
    "count": GRPOLossConfig(loss_type="dapo", num_items=torch.tensor(17.0)),
    "delta": GRPOLossConfig(delta=1.5, kl_straight_through=True, kl_output_clamp=3.0),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
# Of torch's operators these start nothing on a device: views and memory.
NO_LAUNCH = re.compile(
    "aten::(alias|as_strided_?|contiguous|detach_?|empty|empty_like|empty_strided|expand|flatten|"
    "new_empty|permute|promote_types|reshape|resize_|result_type|select|slice|split|squeeze|t|to|transpose|unbind|"
    "unsqueeze|view|view_as|lift_fresh|resolve_conj)"
)


def launching(name):
    return name.startswith("aten::") and not NO_LAUNCH.fullmatch(name)


def launches(fn):
    """(torch's launches, matrix products) of a call, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        fn()
    # zeros is a fill, and to is a copy: the innermost operator counts.
    inner = [
        e.name for e in profile.events() if launching(e.name) and not any(
            launching(c.name) for c in e.cpu_children
        )
    ]  # fmt: skip
    return [n for n in inner if n not in PRODUCTS], [n for n in inner if n in PRODUCTS]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    mask = torch.rand(shape, generator=generator) < 0.7
    near = {name: normal(*shape) for name in ("old_logps", "ref_logps", "rollout_logps")}
    labels = torch.randint(11, shape, generator=generator)
    tokens = {**near, "token_weights": normal(*shape).abs()}
    return labels, normal(3), mask, tokens, normal(*shape, 11), normal(*shape, 4), normal(11, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_few_launches_of_torch_whatever_the_options(name, backend):
    """Beside our kernels and the head's matrix products; every chunk's included."""
    config = CONFIGS[name]
    labels, advantages, mask, tokens, logits, hidden, weight = batch()
    logits, hidden, weight = (x.requires_grad_() for x in (logits, hidden, weight))
    one = torch.ones(())

    def of_logits(mask=mask, inplace=False):
        source = logits * 1 if inplace else logits
        loss, _ = logits_grpo_loss(
            source, labels, advantages, mask, inplace=inplace, entropy=True, config=config, **tokens
        )
        loss.backward(one)

    def of_hidden(mask=mask):
        loss, _ = linear_grpo_loss(
            hidden, weight, labels, advantages, mask, entropy=True, chunk_rows=3, config=config,
            **tokens,
        )  # fmt: skip
        loss.backward(one)

    with ops.use(f"{backend},reference"):
        for mask_given in (mask, None):
            logits.grad = hidden.grad = weight.grad = None
            found, _ = launches(lambda given=mask_given: of_logits(given))
            # On the CPU the upstream gradient is read there, and is 1.
            found = [n for n in found if n != "aten::_local_scalar_dense"]
            assert found == [], mask_given is None
            found, products = launches(lambda given=mask_given: of_hidden(given))
            found = [n for n in found if n != "aten::_local_scalar_dense"]
            # On the CPU rows are moved by torch, in three operators where CUDA has two kernels.
            assert len(found) <= (6 if backend == "cpu" else 4), found
            chunks = math.ceil((15 if mask_given is None else int(mask.sum())) / 3)
            assert len(products) in (3 * chunks, 4 * chunks)
