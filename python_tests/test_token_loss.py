"""The unreduced loss: its derivative by finite differences, and its average beside grpo_loss."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vcr1_fast.ops import GRPOLossConfig, grpo_loss, grpo_token_loss

B, T = 3, 6
MASK = torch.arange(T) < torch.tensor([6, 3, 0])[:, None]
CONFIGS = [
    *(
        GRPOLossConfig(level=level, beta=beta, kl_bias_correction=corrected, delta=delta)
        for level in ("token", "sequence")
        for beta, corrected in ((0.0, False), (0.3, False), (0.3, True))
        for delta in (None, 1.5)
    ),
    GRPOLossConfig(loss_type="sapo", beta=0.1),
    GRPOLossConfig(kl="k2", beta=0.2, log_ratio_clamp=0.4, kl_input_clamp=0.3),
]


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, B, T, generator=generator, dtype=dtype)
    logps = -normal[0].abs() - 0.1
    tensors = {
        "logps": logps,
        "old_logps": logps + 0.5 * normal[1],
        "advantages": normal[2, :, 0],
        "ref_logps": logps + 0.5 * normal[3],
        "token_weights": normal[4].abs(),
    }
    return {
        name: x if x.ndim == 1 else torch.where(MASK, x, math.nan) for name, x in tensors.items()
    }, normal[5]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_derivative_by_finite_differences(config):
    """Only kinks lie between: each token's loss is as its formula says in test_liger.py."""
    tensors, _ = make()
    logps = tensors.pop("logps")

    def loss(valid):
        whole = torch.full_like(logps, math.nan).masked_scatter(MASK, valid)
        return grpo_token_loss(whole, mask=MASK, config=config, **tensors).loss

    leaf = logps[MASK].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf, atol=1e-6)


@pytest.mark.parametrize("loss_type", ("grpo", "cispo", "sapo", "vespo", "luspo"))
def test_its_average_is_the_loss(loss_type):
    """Value and gradient, against the kernel that averages."""
    tensors, _ = make()
    logps = tensors.pop("logps")
    config = GRPOLossConfig(loss_type=loss_type, beta=0.2, aggregation="token_mean")
    a, b = (logps.clone().requires_grad_() for _ in range(2))
    out = grpo_token_loss(a, mask=MASK, config=config, **tensors)
    (out.loss.sum() / MASK.sum()).backward()
    loss, metrics = grpo_loss(b, mask=MASK, config=config, **tensors)
    loss.backward()
    torch.testing.assert_close(out.loss.sum() / MASK.sum(), loss)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(out.kl.sum() / MASK.sum(), metrics["kl"])
    share = out.clipped.sum() / MASK.sum()
    torch.testing.assert_close(share, metrics.get("clip_region", torch.zeros(()).double()))
    assert not any(x[~MASK].any() for x in (*out, a.grad))


def test_fake_tensors_have_its_shapes():
    """It is plain torch: shapes alone pass through it, forward and backward."""
    tensors, _ = make(torch.float32)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
        logps = fake.pop("logps").requires_grad_()
        config = GRPOLossConfig(beta=0.1)
        out = grpo_token_loss(logps, mask=mode.from_tensor(MASK), config=config, **fake)
        out.loss.sum().backward()
    assert {x.shape for x in (*out, logps.grad)} == {(B, T)}


# torch's tracer makes a Function object while it inspects one, and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole():
    tensors, upstream = make(torch.float32)
    logps = tensors.pop("logps")

    def loss(x):
        out = grpo_token_loss(x, mask=MASK, config=GRPOLossConfig(beta=0.1), **tensors)
        return (out.loss * upstream).sum()

    a, b = (logps.clone().requires_grad_() for _ in range(2))
    loss(a).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(b).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": GRPOLossConfig(entropy_coef=0.1)}, "entropy_coef = 0.1"),
        ({"config": GRPOLossConfig(beta=0.1), "ref_logps": None}, "needs ref_logps"),
        ({"logps": torch.zeros(B, T, dtype=torch.long)}, "floating point"),
        ({"token_weights": torch.zeros(B, 1)}, "token_weights has shape"),
    ],
)
def test_refusals(change, message):
    tensors, _ = make()
    with pytest.raises(ValueError, match=message):
        grpo_token_loss(**{**tensors, "mask": MASK, **change})
