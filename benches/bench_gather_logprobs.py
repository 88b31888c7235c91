"""gather_logprobs beside what trainers use today: torch plain and compiled, TRL, cross_entropy.

Bytes: forward reads the logits once; backward reads them and writes as much. Errors: of the
log-probs (forward), the entropy and the gradient, on the first 16 rows against float64.
"""

import os
import shutil
from collections.abc import Callable

import peers
import torch
import torch.nn.functional as F
from harness import Bench, arguments, scaled_error

from vcr1_fast.ops import gather_logprobs, host_memory

SHAPES = {
    "cpu": [(256, 151_936), (2048, 4096), (256, 248_320)],
    "cuda": [(4096, 151_936), (2048, 151_936), (4096, 248_320)],
}
CHECKED = 16  # rows
# TRL loops over the first dimension on a CPU, so its speed depends on how rows are batched: as its
# trainer does by default (8 completions), as one completion, and as completions of one token.
BATCHES = {"TRL": 8, "TRL, 1 completion": 1, "TRL, row by row": None}
Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | str


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def plain_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])


def batched(fn: peers.Peer, batch: int | None) -> Form:
    """A peer called with (batch, N / batch, V), or with (N, V)."""
    if isinstance(fn, str) or batch is None:
        return fn
    return lambda x, y: fn(x.view(batch, -1, x.shape[-1]), y.view(batch, -1)).flatten()


def compiled(fn: Form, device: torch.device) -> Form:
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler"
    return torch.compile(fn, dynamic=False)


def gradient(fn: Form, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    leaf = logits.detach().clone().requires_grad_()
    fn(leaf, labels).sum().backward()
    return leaf.grad


def errors(
    forms: dict[str, Form], value: Callable[[Form], torch.Tensor], truth: torch.Tensor
) -> dict[str, float]:
    return {
        name: scaled_error(value(fn), truth)
        for name, fn in forms.items()
        if not isinstance(fn, str)
    }


def bench_shape(bench: Bench, rows: int, vocab: int, dtype: torch.dtype) -> None:
    device = bench.device
    torch.compiler.reset()  # or the shapes before would count as recompilations, up to its limit
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)
    leaf = logits.clone().requires_grad_()
    size = logits.numel() * logits.element_size()
    shape, name = f"{rows}x{vocab}", str(dtype).removeprefix("torch.")
    few, few_labels = logits[:CHECKED], labels[:CHECKED]
    exact = few.double()
    batches = dict(BATCHES) if device.type == "cpu" else {"TRL": None}
    if rows > 256:  # the backward pass of its loop over rows is quadratic in them
        batches.pop("TRL, row by row", None)
    forms: dict[str, Form] = {
        "torch": plain,
        "torch.compile": compiled(plain, device),
        **{key: batched(peers.trl_logprobs(), batch) for key, batch in batches.items()},
        "cross_entropy": lambda x, y: -F.cross_entropy(x, y, reduction="none"),
        "ours": lambda x, y: gather_logprobs(x, y).logps,
    }

    def forward(fn: Form):
        return fn if isinstance(fn, str) else lambda: fn(logits, labels)

    def both(fn: Form):
        if isinstance(fn, str):
            return fn

        def step() -> None:
            leaf.grad = None
            fn(leaf, labels).sum().backward()

        return step

    def release() -> None:
        leaf.grad = None
        host_memory.release()  # or a gradient made in kept memory would seem to take none

    bench.run(
        "gather_logprobs forward",
        shape,
        name,
        {key: forward(fn) for key, fn in forms.items()},
        size,
        limit="read",
        errors=errors(forms, lambda fn: fn(few, few_labels), plain(exact, few_labels)),
        memory=True,
    )
    trl = peers.trl_logprobs_entropy()
    with_entropy: dict[str, Form] = {
        "torch": plain_entropy,
        "torch.compile": compiled(plain_entropy, device),
        "TRL": trl
        if isinstance(trl, str)
        else lambda x, y: torch.stack(trl(x[None], y[None]))[:, 0],
        "ours": lambda x, y: torch.stack(gather_logprobs(x, y, entropy=True)[:2]),
    }
    bench.run(
        "with entropy",
        shape,
        name,
        {key: forward(fn) for key, fn in with_entropy.items()},
        size,
        limit="read",
        errors=errors(
            with_entropy, lambda fn: fn(few, few_labels)[1], plain_entropy(exact, few_labels)[1]
        ),
        memory=True,
    )
    in_float64 = gradient(plain, exact, few_labels)
    of_gradients = errors(forms, lambda fn: gradient(fn, few, few_labels), in_float64)
    bench.run(
        "forward + backward",
        shape,
        name,
        {key: both(fn) for key, fn in forms.items()},
        3 * size,
        errors=of_gradients,
        memory=release,
    )

    def in_place() -> None:
        # A fresh graph leaf over the same memory: its contents do not matter to the timing.
        x = leaf.detach().requires_grad_()
        gather_logprobs(x, labels, inplace_backward=True).logps.sum().backward()

    bench.run(
        "forward + backward in place",
        shape,
        name,
        {
            **{key: both(forms[key]) for key in ("torch.compile", *batches, "cross_entropy")},
            "ours": in_place,
        },
        3 * size,
        errors={key: value for key, value in of_gradients.items() if key != "torch"},
        memory=release,
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("gather_logprobs", **vars(args)) as bench:
        for rows, vocab in SHAPES[args.device]:
            for dtype in (torch.float32, torch.bfloat16):
                bench_shape(bench, rows, vocab, dtype)


if __name__ == "__main__":
    main()
