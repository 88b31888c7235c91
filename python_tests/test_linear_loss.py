"""linear_grpo_loss against a plain head and the float64 loop, for every backend."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from grpo_oracle import loop_loss

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, grpo_loss, linear_grpo_loss
from vcr1_fast.ops.grpo.config import LOSS_TYPES, encode
from vcr1_fast.ops.grpo.loss import grpo_loss_op
from vcr1_fast.ops.lm_head import HeadGradients

HIDDEN, VOCAB = 12, 37
LENGTHS = (5, 0, 1, 9)
BACKENDS = [name for name in ("reference", "cpu", "cuda") if name in grpo_loss_op.backends("cpu")]
# Interpreted, in the process that runs it, Triton takes part where that costs little.
EACH = [*BACKENDS, *(name for name in ("triton",) if name in grpo_loss_op.backends("cpu"))]


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Interpreted kernels are numpy, which warns of the infinities that GPUs compute with."""
    with np.errstate(all="ignore"):
        yield


def make_batch(dtype=torch.float64, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(lengths), max(lengths) + 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    batch = {
        "hidden": normal(rows, columns, HIDDEN),
        "labels": torch.randint(VOCAB, (rows, columns), generator=generator),
        "mask": mask,
        "advantages": normal(rows),
        "weight": 0.5 * normal(VOCAB, HIDDEN),
        "bias": normal(VOCAB),
        "token_weights": normal(rows, columns).abs(),
        "temperature": 0.7 + normal(rows, columns).abs(),
    }
    logps = head_logps(batch, 1.0)[0].detach()
    for name in ("old_logps", "ref_logps", "rollout_logps"):
        batch[name] = torch.where(mask, logps + 0.4 * normal(rows, columns), math.nan)
    batch["hidden"][~mask] = math.nan
    batch["labels"][~mask] = -100
    floats = {n: x.to(dtype) for n, x in batch.items() if x.is_floating_point()}
    return {**batch, **floats}


def head_logps(batch, temperature, softcap=None):
    """(log-probs of the labels, entropy) the plain way; rows outside the mask hold nonsense."""
    logits = batch["hidden"] @ batch["weight"].t() + batch["bias"]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None]
    log_p = (logits / temperature).log_softmax(-1)
    labels = batch["labels"].clamp(min=0)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def pack(batch):
    mask = batch["mask"]
    packed = {
        n: x[mask] if x.shape[:2] == mask.shape and n != "mask" else x for n, x in batch.items()
    }
    counts = mask.sum(1)
    packed["mask"] = None
    packed["cu_seqlens"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return packed


def call(
    batch, config, *, old=True, bias=True, temperature=1.0, chunk_rows=4, scale=3.0, softcap=None
):
    """(loss, gradients of hidden, weight, bias, metrics)."""
    leaves = [batch[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    hidden, weight, offset = leaves
    loss, metrics = linear_grpo_loss(
        hidden,
        weight,
        batch["labels"],
        batch["advantages"],
        batch["mask"],
        old_logps=batch["old_logps"] if old else None,
        ref_logps=batch["ref_logps"],
        rollout_logps=batch["rollout_logps"],
        token_weights=batch["token_weights"],
        bias=offset if bias else None,
        cu_seqlens=batch.get("cu_seqlens"),
        temperature=temperature,
        softcap=softcap,
        chunk_rows=chunk_rows,
        config=config,
    )
    (scale * loss).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad / scale for x in leaves]
    return loss.detach(), *grads, metrics


def oracle(batch, config, *, old=True, bias=True, temperature=1.0, softcap=None):
    mask = batch["mask"]
    leaves = {n: batch[n].double() for n in ("weight", "bias")}
    leaves["hidden"] = torch.where(mask[..., None], batch["hidden"].double(), 0)
    leaves = {n: x.clone().requires_grad_() for n, x in leaves.items()}
    head = {**leaves, "labels": batch["labels"]}
    if not bias:
        head["bias"] = torch.zeros(VOCAB, dtype=torch.float64)
    logps, entropy = head_logps(head, temperature, softcap)
    sequences = [
        {
            "logps": logps[b][kept],
            "entropy": entropy[b][kept],
            "advantages": batch["advantages"][b].double().expand_as(kept)[kept],
            "old": batch["old_logps"][b][kept].double() if old else None,
            "rollout": batch["rollout_logps"][b][kept].double(),
            "ref": batch["ref_logps"][b][kept].double(),
            "token_weights": batch["token_weights"][b][kept].double(),
        }
        for b, kept in enumerate(mask)
    ]
    loss = loop_loss(config, sequences) + 0 * sum(x.sum() for x in leaves.values())
    loss.backward()
    return loss.detach(), *(leaves[n].grad for n in ("hidden", "weight", "bias"))


CONFIGS = {
    **{name: GRPOLossConfig(loss_type=name, max_length=9, beta=0.1) for name in LOSS_TYPES},
    "sequence": GRPOLossConfig(level="sequence", beta=0.1, kl_bias_correction=True),
    "sequence_token": GRPOLossConfig(level="sequence_token"),
    "entropy": GRPOLossConfig(entropy_coef=0.2, loss_type="bnpo"),
    "entropy_token_mean": GRPOLossConfig(entropy_coef=0.2, entropy_aggregation="token_mean"),
    "entropy_sequence": GRPOLossConfig(entropy_coef=0.2, level="sequence"),
    "token_truncate": GRPOLossConfig(rollout_correction="token_truncate", rollout_max=1.1),
    "sequence_mask": GRPOLossConfig(
        rollout_correction="sequence_mask", rollout_min=0.2, rollout_max=3.0, beta=0.1
    ),
    "sequence_mask_after_kl": GRPOLossConfig(
        rollout_correction="sequence_mask", rollout_max=1.5, rollout_after_kl=True, beta=0.1
    ),
    "off_policy": GRPOLossConfig(off_policy_threshold=0.05),
    "delta": GRPOLossConfig(delta=1.1, eps_high=0.3, exclude_empty=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_loop(name, backend):
    batch, config = make_batch(), CONFIGS[name]
    for old in (True, False):
        with ops.use(backend):
            padded = call(batch, config, old=old)
            packed = call(pack(batch), config, old=old)
        expected = oracle(batch, config, old=old)
        mask = batch["mask"]
        for got, want in zip(padded[:4], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        assert not padded[1][~mask].any()
        torch.testing.assert_close(packed[1], expected[1][mask], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(packed[2], expected[2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy", "sequence_mask"))
def test_matches_grpo_loss_of_the_logprobs(name, backend):
    batch = make_batch()
    config = CONFIGS[name]
    with ops.use(backend):
        loss, *_, metrics = call(batch, config)
        logps, entropy = head_logps(batch, 1.0)
        expected, expected_metrics = grpo_loss(
            logps,
            batch["old_logps"],
            batch["advantages"],
            batch["mask"],
            ref_logps=batch["ref_logps"],
            entropy=entropy if config.entropy_coef else None,
            rollout_logps=batch["rollout_logps"],
            token_weights=batch["token_weights"],
            config=config,
        )
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == set(expected_metrics)
    for key, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy"))
def test_temperature_bias_and_chunks(name, backend):
    batch, config = make_batch(), CONFIGS[name]
    for temperature in (0.6, batch["temperature"]):
        for bias in (True, False):
            expected = oracle(batch, config, bias=bias, temperature=temperature)
            for chunk_rows in (1, 7, None):
                with ops.use(backend):
                    got = call(
                        batch, config, bias=bias, temperature=temperature, chunk_rows=chunk_rows
                    )
                for a, b in zip(got[:4], expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy"))
def test_softcap(name, backend):
    batch, config = make_batch(), CONFIGS[name]
    options = {"softcap": 2.5, "temperature": batch["temperature"]}
    expected = oracle(batch, config, **options)
    for chunk_rows in (4, None):
        with ops.use(backend):
            got = call(batch, config, chunk_rows=chunk_rows, **options)
        for a, b in zip(got[:4], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(expected[1], oracle(batch, config)[1], rtol=0.1, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy"))
@pytest.mark.parametrize("chunk_rows", (4, None))
def test_half_precision_keeps_small_gradients(name, chunk_rows, backend):
    """A loss over many tokens, times a loss scaler's 65536: the gradient is made before that."""
    batch = make_batch(torch.float64)
    for key in ("hidden", "weight", "bias"):
        batch[key] = batch[key].half().double()
    config = dataclasses.replace(CONFIGS[name], aggregation="num_items", num_items=1e7)
    expected = oracle(batch, config)
    leaves = [batch[n].half().requires_grad_() for n in ("hidden", "weight", "bias")]
    with ops.use(backend):
        loss, _ = linear_grpo_loss(
            *leaves[:2],
            *(batch[n] for n in ("labels", "advantages", "mask")),
            old_logps=batch["old_logps"],
            ref_logps=batch["ref_logps"],
            token_weights=batch["token_weights"],
            bias=leaves[2],
            chunk_rows=chunk_rows,
            config=config,
        )
        (loss * 2.0**22).backward()
    for leaf, truth in zip(leaves, expected[1:], strict=True):
        got = leaf.grad.double() / 2**22
        assert truth.abs().max() < 1e-6  # float16 ends at 6e-8
        assert (got - truth).norm() < 5e-3 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy"))
def test_no_worse_than_plain_torch(name, dtype, backend):
    """Against float64, our error is at most twice that of autograd in the same dtype."""
    batch, config = make_batch(dtype), CONFIGS[name]
    expected = oracle(batch, config)
    with ops.use(backend):
        got = call(batch, config)
    mask = batch["mask"]
    leaves = [batch[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    with torch.no_grad():
        leaves[0][~mask] = 0
    head = dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    logps, entropy = head_logps({**head, "labels": batch["labels"]}, 1.0)
    with ops.use("reference"):
        loss, _ = grpo_loss(
            logps,
            batch["old_logps"],
            batch["advantages"],
            mask,
            ref_logps=batch["ref_logps"],
            entropy=entropy,
            rollout_logps=batch["rollout_logps"],
            token_weights=batch["token_weights"],
            config=config,
        )
    loss.backward()
    plain = [loss, *(x.grad for x in leaves)]
    for ours, theirs, truth in zip(got[:4], plain, expected, strict=True):
        error = (ours.double() - truth).norm()
        limit = 2 * (theirs.double() - truth).norm()
        assert error <= limit + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed(backend):
    batch, config = make_batch(), GRPOLossConfig()

    def loss(hidden, weight):
        return linear_grpo_loss(
            hidden, weight, batch["labels"], batch["advantages"], batch["mask"], config=config
        )[0]

    with ops.use(backend):
        hidden = batch["hidden"].clone().requires_grad_()
        weight = batch["weight"].clone().requires_grad_()
        both = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        (frozen,) = torch.autograd.grad(loss(hidden, batch["weight"]), hidden)
        (head_only,) = torch.autograd.grad(loss(batch["hidden"], weight), weight)
        none = loss(batch["hidden"], batch["weight"])
    torch.testing.assert_close(frozen, both[0], rtol=0, atol=0)
    torch.testing.assert_close(head_only, both[1], rtol=0, atol=0)
    assert not none.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_made_under_no_grad(backend, monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(HeadGradients, "add", refuse)
    batch = make_batch()
    arguments = (batch["labels"], batch["advantages"], batch["mask"])
    parameter = torch.nn.Parameter(batch["weight"])
    with ops.use(backend):
        with torch.no_grad():
            loss, _ = linear_grpo_loss(batch["hidden"], parameter, *arguments)
        assert not loss.requires_grad
        with pytest.raises(AssertionError, match="gradient was made"):
            linear_grpo_loss(batch["hidden"], parameter, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("grpo", "sequence", "entropy", "vespo"))
def test_nothing_to_learn_from(name, backend):
    batch = make_batch(lengths=(0, 0))
    with ops.use(backend):
        loss, *grads, metrics = call(batch, CONFIGS[name])
        assert loss == 0 and not any(g.any() for g in grads)
        assert all(value == 0 for value in metrics.values())
        loss, *grads, _ = call(pack(batch), CONFIGS[name])
        assert loss == 0 and grads[0].shape == (0, HIDDEN) and not grads[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_reported_on_demand(backend):
    batch = make_batch()
    with ops.use(backend):
        _, metrics = linear_grpo_loss(
            batch["hidden"],
            batch["weight"],
            batch["labels"],
            batch["advantages"],
            batch["mask"],
            bias=batch["bias"],
            entropy=True,
        )
    expected = head_logps(batch, 1.0)[1][batch["mask"]].mean()
    torch.testing.assert_close(metrics["entropy"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    batch = make_batch(torch.float32)
    for name in ("grpo", "sequence"):
        with ops.use(backend):
            first, second = (call(batch, CONFIGS[name]) for _ in range(2))
        for a, b in zip(first[:4], second[:4], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_and_tensor_counts(backend):
    batch = make_batch(torch.float32)
    config = GRPOLossConfig(loss_type="dapo", num_items=torch.tensor(11))
    hidden = batch["hidden"].clone().requires_grad_()
    with ops.use(backend):
        loss, _ = linear_grpo_loss(
            hidden,
            batch["weight"].requires_grad_(),
            batch["labels"],
            batch["advantages"],
            batch["mask"],
            config=config,
        )
        (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (two,) = torch.autograd.grad(2 * loss, hidden)
        fixed = dataclasses.replace(config, num_items=11.0)
        expected, _ = linear_grpo_loss(
            hidden,
            batch["weight"],
            batch["labels"],
            batch["advantages"],
            batch["mask"],
            config=fixed,
        )
    torch.testing.assert_close(two, 2 * one, rtol=0, atol=0)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", EACH)
def test_opcheck(backend):
    batch = make_batch(torch.float32)
    x = {n: t.nan_to_num(0) if t.is_floating_point() else t for n, t in batch.items()}
    with ops.use(backend):
        torch.library.opcheck(
            torch.ops.vcr1_fast.linear_grpo_loss.default,
            (
                *(x["hidden"], x["weight"], x["bias"], 5.0, 4, [True, True, False]),
                *(x["labels"].clamp(min=0), None, x["old_logps"], x["advantages"], x["mask"]),
                *(x["ref_logps"], None, None, None, None, 1.0, False),
                encode(GRPOLossConfig(beta=0.1)),
            ),
        )


# Dynamo itself makes an instance of autograd.Function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiles_whole(dtype, backend):
    batch = make_batch(dtype)
    batch["hidden"][~batch["mask"]] = 0

    def step(hidden, weight):
        loss, metrics = linear_grpo_loss(
            hidden * 1.0,
            weight,
            batch["labels"],
            batch["advantages"],
            batch["mask"],
            old_logps=batch["old_logps"],
        )
        return loss * 2, metrics["ratio_mean"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    with ops.use(backend):
        for run in (step, compiled):
            inputs = [batch[n].clone().requires_grad_() for n in ("hidden", "weight")]
            loss, ratio = run(*inputs)
            loss.backward()
            results.append([loss, ratio, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def plain_loss(hidden, weight, batch, config):
    logps = head_logps({**batch, "hidden": hidden, "weight": weight}, 1.0)[0]
    with ops.use("reference"):
        return grpo_loss(
            logps, batch["old_logps"], batch["advantages"], batch["mask"], config=config
        )[0]


def our_loss(hidden, weight, batch, config):
    return linear_grpo_loss(
        hidden, weight, batch["labels"], batch["advantages"], batch["mask"],
        old_logps=batch["old_logps"], bias=batch["bias"], chunk_rows=4, config=config,
    )[0]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_tied_embeddings(level, backend):
    batch, config = make_batch(), GRPOLossConfig(level=level)
    hidden = torch.where(batch["mask"][..., None], batch["hidden"], 0.0)
    labels = batch["labels"].clamp(min=0)
    results = []
    for loss in (plain_loss, our_loss):
        table = batch["weight"].clone().requires_grad_()
        embedded = torch.nn.functional.embedding(labels, table) + hidden
        with ops.use(backend):
            (2 * loss(embedded, table, batch, config)).backward()
        results.append(table.grad)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend):
    batch, config = make_batch(torch.float32), GRPOLossConfig()
    hidden = torch.where(batch["mask"][..., None], batch["hidden"], 0.0)
    results = []
    for loss, dtype in ((plain_loss, torch.float64), (our_loss, torch.float32)):
        wide = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
        x, weight = (t.to(dtype).requires_grad_() for t in (hidden, batch["weight"]))
        layer = torch.nn.Linear(HIDDEN, HIDDEN, bias=False).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(HIDDEN))
        with ops.use(backend), torch.autocast("cpu", torch.bfloat16, dtype == torch.float32):
            out = loss(layer(x), weight, wide, config)
        out.backward()
        assert {g.dtype for g in (x.grad, weight.grad, layer.weight.grad)} == {dtype}
        results.append([out, x.grad, weight.grad])
    for exact, got in zip(*results, strict=True):
        assert (got.double() - exact).norm() < 0.03 * exact.norm()


# Dynamo itself makes an instance of autograd.Function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_compiled_backbone(backend):
    batch, config = make_batch(), CONFIGS["grpo"]
    config = dataclasses.replace(config, beta=0.0)
    start = torch.where(batch["mask"][..., None], batch["hidden"], 0.0)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU()).double()
        weight = batch["weight"].clone().requires_grad_()
        run = torch.compile(backbone, fullgraph=True, backend="aot_eager") if compiled else backbone
        with ops.use(backend):
            loss = (our_loss if compiled else plain_loss)(run(start), weight, batch, config)
        loss.backward()
        results.append([loss, weight.grad, *(p.grad for p in backbone.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_alias_what_a_kept_graph_needs(backend):
    batch = make_batch(torch.float32)
    hidden, weight = (batch[n].clone().requires_grad_() for n in ("hidden", "weight"))
    with ops.use(backend):
        loss = our_loss(hidden, weight, batch, GRPOLossConfig())
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()
        (7 * loss).backward(retain_graph=True)
        weight.grad.mul_(0.5)
        last = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(last, kept, strict=True):
        torch.testing.assert_close(a, 3 * b)
    torch.testing.assert_close(weight.grad, 3.5 * kept[1])


@pytest.mark.parametrize("chunk_rows", (2, 5, None))
def test_bfloat16_weight_gradient_is_summed_in_float32(chunk_rows):
    """Many chunks must not add an error that grows with their number."""
    batch = make_batch(torch.bfloat16, lengths=(60, 60))
    batch["hidden"] = batch["hidden"].abs()  # sums that grow
    expected = oracle(batch, GRPOLossConfig())
    got = call(batch, GRPOLossConfig(), chunk_rows=chunk_rows, scale=1.0)
    assert (got[2].double() - expected[2]).norm() < 6e-3 * expected[2].norm()


def test_errors():
    batch = make_batch(torch.float32)

    def run(**changes):
        x = {**batch, **changes}
        linear_grpo_loss(
            x["hidden"], x["weight"], x["labels"], x["advantages"], x["mask"], bias=x["bias"],
            chunk_rows=x.get("chunk_rows"), temperature=x.get("t", 1.0),
        )  # fmt: skip

    for changes, message in (
        ({"hidden": batch["hidden"][:2]}, "do not fit"),
        ({"weight": batch["weight"][:, :3]}, "weight must be"),
        ({"bias": batch["bias"][:3]}, "bias must be"),
        ({"weight": batch["weight"].double()}, "weight is"),
        ({"labels": batch["labels"].float()}, "labels must be integers"),
        ({"chunk_rows": 0}, "chunk_rows must be"),
        ({"t": 0.0}, "temperature must be"),
        ({"advantages": torch.zeros(3)}, "advantages has shape"),
        ({"labels": batch["labels"].clamp(min=VOCAB)}, "vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changes)
