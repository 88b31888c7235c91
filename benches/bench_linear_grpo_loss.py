"""linear_grpo_loss beside the plain head, compiled and not, and the fused heads of TRL and Liger.

The limit, "bare products", are the three that any form needs (logits, dhidden, dW) and nothing
else. Bytes: the weight is read twice, and its gradient written once. Errors: the larger of those of
dhidden and dW. torch's linear_cross_entropy and cut-cross-entropy have no GRPO loss: they are timed
with their own, the mean of the labels' negative log-probs, which is less work. The third shape is
more rows than one chunk holds.
"""

import peers
import torch
import torch.nn.functional as F
from harness import Bench, arguments, scaled_error

from vcr1_fast.ops import GRPOLossConfig, linear_grpo_loss

# rows (completions x tokens), hidden, vocabulary
SHAPES = {
    "cpu": [
        ((8, 32), 512, 16_384),
        ((4, 32), 256, 151_936),
        ((8, 128), 256, 151_936),
        ((8, 32), 256, 248_320),
    ],
    "cuda": [
        ((16, 512), 2048, 151_936),
        ((16, 512), 3584, 152_064),
        ((16, 512), 4096, 248_320),
    ],
}
CONFIG = GRPOLossConfig(loss_type="bnpo")


def clipped(logps, advantages, old):
    """The eager loss of log-probs (B, T)."""
    ratio = torch.exp(logps - old)
    a = advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()


def plain(hidden, weight, labels, advantages, old):
    """Whole logits, log-softmax in float32, eager loss."""
    logps = F.linear(hidden, weight)
    logps = (logps if logps.dtype == torch.float64 else logps.float()).log_softmax(-1)
    return clipped(logps.gather(-1, labels[..., None])[..., 0], advantages, old)


def heads(device: str, compiled: bool) -> dict:
    """name -> fn(hidden, weight, labels, advantages, old) -> loss, or why there is none."""
    trl, liger = peers.trl_fused_head(), peers.liger_fused_grpo(loss_type="bnpo", compiled=compiled)

    def trl_form(hidden, weight, labels, advantages, old):
        logps, _ = trl(hidden.flatten(0, 1), weight, labels.flatten())
        return clipped(logps.view_as(old), advantages, old)

    def liger_form(hidden, weight, labels, advantages, old):
        return liger(hidden, weight, labels, torch.ones_like(old), advantages, old)

    def cross_entropy(fn):
        return lambda hidden, weight, labels, *_: fn(hidden.flatten(0, 1), weight, labels.flatten())

    losses = {
        "torch linear_cross_entropy": peers.torch_linear_cross_entropy(),
        "cut-cross-entropy": peers.cut_cross_entropy(device),
    }
    return {
        "TRL fused head": trl if isinstance(trl, str) else trl_form,
        "Liger fused GRPO": liger if isinstance(liger, str) else liger_form,
        **{n: fn if isinstance(fn, str) else cross_entropy(fn) for n, fn in losses.items()},
    }


def gradients(fn, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(fn(*inputs), inputs[:2])


def bench_shape(bench: Bench, lead: tuple[int, int], hidden: int, vocab: int, dtype) -> None:
    torch.manual_seed(0)
    device = bench.device
    x = torch.randn(*lead, hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).to(dtype)
    weight.requires_grad_()
    labels = torch.randint(vocab, lead, device=device)
    advantages = torch.randn(lead[0], device=device)
    with torch.no_grad():
        log_p = F.linear(x, weight).float().log_softmax(-1)
        old = log_p.gather(-1, labels[..., None])[..., 0]
        del log_p
    inputs = (x, weight, labels, advantages, old)

    def ours(x, weight, labels, advantages, old):
        return linear_grpo_loss(x, weight, labels, advantages, None, old_logps=old, config=CONFIG)[
            0
        ]

    torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-2, atol=1e-3)

    def step(fn):
        def run():
            x.grad = weight.grad = None
            fn(*inputs).backward()

        return run

    rows = x.detach().reshape(-1, hidden)
    logits = torch.empty(len(rows), vocab, device=device, dtype=dtype)

    def products():
        torch.mm(rows, weight.detach().t(), out=logits)
        return logits @ weight.detach(), logits.t() @ rows

    forms = {"plain": plain, **heads(device.type, x.is_cuda), "ours": ours}
    large = vocab > 65_536
    if device.type == "cuda" or not large:  # compiling takes longer than the rest of a bench
        forms["plain, compiled"] = torch.compile(plain)
    if device.type == "cpu" and (large or dtype == torch.bfloat16):
        forms["torch linear_cross_entropy"] = "takes seconds a call"
    wide = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    exact = gradients(
        plain, [t.requires_grad_() if t.ndim > 1 and t.is_floating_point() else t for t in wide]
    )
    errors = {
        name: max(map(scaled_error, gradients(fn, inputs), exact))
        for name, fn in forms.items()
        if not isinstance(fn, str) and "cross" not in name
    }
    del wide, exact
    fns = {name: fn if isinstance(fn, str) else step(fn) for name, fn in forms.items()}

    def release():
        x.grad = weight.grad = None

    size = weight.numel() * 3 * weight.element_size()
    bench.run(
        "linear_grpo_loss forward + backward",
        f"{len(rows)}x{hidden}x{vocab}",
        str(dtype).removeprefix("torch."),
        {"bare products": products, **fns},
        size,
        limit="bare products",
        errors=errors,
        memory=release,
        rounds=3 if large and device.type == "cpu" else 5,
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("linear_grpo_loss", **vars(args)) as bench:
        for index, (lead, hidden, vocab) in enumerate(SHAPES[args.device]):
            for dtype in (torch.float32, torch.bfloat16)[index == 2 :]:
                bench_shape(bench, lead, hidden, vocab, dtype)


if __name__ == "__main__":
    main()
