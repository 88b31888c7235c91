"""linear_grpo_loss beside the plain head, Liger's fused head and the bare matrix products.

The limit, "bare products", are the three that any form needs (logits, dhidden, dW) and nothing
else. Bytes: the weight is read twice, and its gradient written once in float32, for each chunk.
"""

import peers
import torch
import torch.nn.functional as F
from harness import Bench, arguments

from vcr1_fast.ops import GRPOLossConfig, linear_grpo_loss

# rows (completions x tokens), hidden, vocabulary
SHAPES = {
    "cpu": [((8, 32), 512, 16_384), ((4, 32), 256, 151_936)],
    "cuda": [((16, 512), 2048, 151_936), ((16, 512), 3584, 152_064)],
}
CONFIG = GRPOLossConfig(loss_type="bnpo")


def plain(hidden, weight, labels, advantages, old):
    """Whole logits, log-softmax in float32, eager loss."""
    logps = F.linear(hidden, weight).float().log_softmax(-1)
    logps = logps.gather(-1, labels[..., None])[..., 0]
    ratio = torch.exp(logps - old)
    a = advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()


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

    liger = peers.liger_fused_grpo(loss_type="bnpo", compiled=x.is_cuda)
    mask = torch.ones_like(labels, dtype=torch.float32)

    def liger_form(x, weight, labels, advantages, old):
        return liger(x, weight, labels, mask, advantages, old)

    fns = {
        "plain": step(plain),
        "bare products": products,
        "Liger": liger if isinstance(liger, str) else step(liger_form),
    }

    def release():
        x.grad = weight.grad = None

    size = weight.numel() * (2 * weight.element_size() + 4)
    bench.run(
        "linear_grpo_loss forward + backward",
        f"{len(rows)}x{hidden}x{vocab}",
        str(dtype).removeprefix("torch."),
        {**fns, "ours": step(ours)},
        size,
        limit="bare products",
        memory=release,
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("linear_grpo_loss", **vars(args)) as bench:
        for lead, hidden, vocab in SHAPES[args.device]:
            for dtype in (torch.float32, torch.bfloat16):
                bench_shape(bench, lead, hidden, vocab, dtype)


if __name__ == "__main__":
    main()
