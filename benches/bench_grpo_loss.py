"""grpo_loss beside TRL's and a plainer eager torch form: loss, gradient and logged metrics.

Bytes: log-probs, old and reference log-probs and the mask are read once, the gradient written once.
"""

import peers
import torch
from harness import Bench, arguments

from vcr1_fast.ops import GRPOLossConfig, grpo_loss

SHAPES = [(8, 200), (16, 512), (64, 1024), (256, 2048)]
CONFIGS = {
    "grpo": GRPOLossConfig(beta=0.04),
    "sequence": GRPOLossConfig(beta=0.04, level="sequence"),
}


def eager(logps, old, advantages, mask, ref, config: GRPOLossConfig):
    """The clipped loss with k3 KL as a trainer writes it out, one small kernel a line."""
    log_ratio = logps - old
    tokens = mask.sum(-1).clamp(min=1.0)
    if config.level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / tokens)[:, None]
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - config.eps_low, 1 + config.eps_high)
    a = advantages[:, None]
    loss = -torch.min(ratio * a, clipped * a)
    difference = ref - logps
    kl = torch.exp(difference) - difference - 1
    loss = loss + config.beta * kl
    loss = ((loss * mask).sum(-1) / tokens).mean()
    with torch.no_grad():
        total = mask.sum().clamp(min=1.0)
        low = (ratio < 1 - config.eps_low) & (a < 0)
        high = (ratio > 1 + config.eps_high) & (a > 0)
        metrics = [(x.float() * mask).sum() / total for x in (kl, low, high, low | high)]
    return loss, metrics


def bench_shape(bench: Bench, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    device = bench.device
    leaf = -torch.rand(rows, columns, device=device)
    old, ref = (leaf + 0.1 * torch.randn_like(leaf) for _ in range(2))
    advantages = torch.randn(rows, device=device)
    lengths = torch.randint(columns // 2, columns + 1, (rows, 1), device=device)
    mask = (torch.arange(columns, device=device) < lengths).float()
    leaf.requires_grad_()
    kept = mask.bool()
    ids, entropy = kept.long(), torch.rand_like(mask)
    for name, config in CONFIGS.items():

        def ours(config=config):
            leaf.grad = None
            grpo_loss(leaf, old, advantages, kept, ref_logps=ref, config=config)[0].backward()

        def baseline(config=config):
            leaf.grad = None
            eager(leaf, old, advantages, mask, ref, config)[0].backward()

        trl = peers.trl_grpo_loss(
            beta=config.beta, loss_type="grpo", importance_sampling_level=config.level
        )

        def theirs(trl=trl):
            leaf.grad = None
            trl(leaf, old, advantages, ids, ref, entropy).backward()

        fast = torch.compile(eager, dynamic=True)

        def compiled(config=config, fast=fast):
            leaf.grad = None
            fast(leaf, old, advantages, mask, ref, config)[0].backward()

        inputs = (leaf, old, advantages, mask, ref)
        got = grpo_loss(*inputs[:4], ref_logps=ref, config=config)[0]
        torch.testing.assert_close(got, eager(*inputs, config)[0])
        bench.run(
            f"{name}, forward + backward",
            f"{rows}x{columns}",
            "float32",
            {
                "eager": baseline,
                "eager, compiled": compiled,
                "TRL": trl if isinstance(trl, str) else theirs,
                "ours": ours,
            },
            (4 * 4 + 1) * leaf.numel(),
        )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("grpo_loss", **vars(args)) as bench:
        for rows, columns in SHAPES:
            bench_shape(bench, rows, columns)


if __name__ == "__main__":
    main()
