"""gather_logprobs beside what trainers use today: TRL, and F.cross_entropy.

Bytes: forward reads the logits once; backward reads them and writes as much.
"""

import peers
import torch
import torch.nn.functional as F
from harness import Bench, arguments

from vcr1_fast.ops import gather_logprobs

SHAPES = {"cpu": [(256, 151_936), (2048, 4096)], "cuda": [(4096, 151_936), (2048, 151_936)]}


def bench_shape(bench: Bench, rows: int, vocab: int, dtype: torch.dtype) -> None:
    device = bench.device
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)
    leaf = logits.clone().requires_grad_()
    size = logits.numel() * logits.element_size()
    shape, name = f"{rows}x{vocab}", str(dtype).removeprefix("torch.")
    forms = {
        "TRL": peers.trl_logprobs(),
        "cross_entropy": lambda x, y: -F.cross_entropy(x, y, reduction="none"),
        "ours": lambda x, y: gather_logprobs(x, y).logps,
    }

    def forward(fn):
        return fn if isinstance(fn, str) else lambda: fn(logits, labels)

    def both(fn):
        if isinstance(fn, str):
            return fn

        def step():
            leaf.grad = None
            fn(leaf, labels).sum().backward()

        return step

    bench.run(
        "gather_logprobs forward",
        shape,
        name,
        {key: forward(fn) for key, fn in forms.items()},
        size,
        limit="read",
    )
    bench.run(
        "with entropy",
        shape,
        name,
        {
            "log_softmax": lambda: _entropy(logits, labels),
            "TRL": forward(peers.trl_logprobs_entropy()),
            "ours": lambda: gather_logprobs(logits, labels, entropy=True),
        },
        size,
        limit="read",
    )
    bench.run(
        "forward + backward", shape, name, {key: both(fn) for key, fn in forms.items()}, 3 * size
    )

    def in_place():
        # A fresh graph leaf over the same memory: its contents do not matter to the timing.
        x = leaf.detach().requires_grad_()
        gather_logprobs(x, labels, inplace_backward=True).logps.sum().backward()

    in_place_forms = {
        **{key: both(forms[key]) for key in ("TRL", "cross_entropy")},
        "ours": in_place,
    }
    bench.run("forward + backward in place", shape, name, in_place_forms, 3 * size)


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, labels[:, None]), -(log_p.exp() * log_p).sum(-1)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("gather_logprobs", **vars(args)) as bench:
        for rows, vocab in SHAPES[args.device]:
            for dtype in (torch.float32, torch.bfloat16):
                bench_shape(bench, rows, vocab, dtype)


if __name__ == "__main__":
    main()
