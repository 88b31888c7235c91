"""Each op's CUDA kernels once, on small shapes, beside the plain torch form in float64.

What a GPU's first minute should run, and what `compute-sanitizer` can run in minutes: every kernel,
odd sizes, rows on other alignments than 16 bytes. Prints a line a case; the exit status is the
number of cases that are wrong. On a build that emulates a GPU (VCR1_NATIVE) it takes CPU tensors.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vcr1_fast import ops
from vcr1_fast.ops import backend
from vcr1_fast.ops.video_patches import CLIP_14, PatchLayout

CLIP_16 = PatchLayout(patch=16, merge=2, temporal=2, mean=(0.5,) * 3, std=(0.5,) * 3)
# Two roundings, of the gradient and of its product with the upstream one. Gradients of a large
# vocabulary are subnormal in float16, where a rounding is more than half a thousandth.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 4e-3}
# (rows, vocabulary, first column): whole vectors; odd rows; rows on three alignments; a cluster.
LOGITS = ((4, 512, 0), (5, 1003, 0), (3, 2056, 3), (2, 20_000, 0))
Case = Callable[[], float]


def scaled(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value; infinite where one is finite and one is not."""
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    if got.shape != exact.shape or not torch.equal(got.isfinite(), exact.isfinite()):
        return float("inf")
    known = exact.isfinite()
    if not known.any():
        return 0.0
    return float((got - exact)[known].abs().max() / exact[known].abs().max().clamp(min=1e-30))


def logits_inputs(
    rows: int, vocab: int, first: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """(rows, vocab) logits whose rows lie `first` elements into wider ones, and labels."""
    generator = torch.Generator().manual_seed(rows * vocab)
    wide = torch.randn(rows, vocab + first, generator=generator).to(device, dtype) * 3
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)
    return wide[:, first:], labels


def gather(logits: Tensor, labels: Tensor) -> list[Tensor]:
    x = logits.detach().requires_grad_()
    out = ops.gather_logprobs(x, labels, temperature=0.7, entropy=True)
    assert out.entropy is not None
    (out.logps.sum() + 0.3 * out.entropy.sum()).backward()
    assert x.grad is not None
    return [out.logps, out.entropy, x.grad]


def logits_loss(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Two completions; the upstream gradient is not 1, so that `multiply_` runs too."""
    x = logits.detach().requires_grad_()
    rows, kind = len(labels), x.double().dtype if x.dtype == torch.float64 else torch.float32
    edges = torch.tensor([0, rows // 2, rows], device=x.device)
    advantages = torch.tensor([1.0, -0.5], dtype=kind, device=x.device)
    old = torch.full((rows,), -8.0, dtype=kind, device=x.device)
    loss, _ = ops.logits_grpo_loss(
        x, labels, advantages, None, old_logps=old, cu_seqlens=edges, temperature=0.7
    )
    (1.5 * loss).backward()
    assert x.grad is not None
    return [loss, x.grad]


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Completions of a batch with a mask: packed, chunk by chunk, and scattered back."""
    x, head = (one.detach().requires_grad_() for one in (hidden, weight))
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    mask = torch.arange(labels.numel(), device=x.device).view(labels.shape) % 3 < 2
    loss, _ = ops.linear_grpo_loss(
        x,
        head,
        labels,
        torch.linspace(-1, 1, len(labels), dtype=kind, device=x.device),
        mask,
        old_logps=torch.full(labels.shape, -6.0, dtype=kind, device=x.device),
        chunk_rows=8,
    )
    (1.5 * loss).backward()
    assert x.grad is not None and head.grad is not None
    return [loss, x.grad, head.grad]


def token_loss(logps: Tensor) -> list[Tensor]:
    x = logps.detach().requires_grad_()
    config = ops.GRPOLossConfig(beta=0.04, kl="k3")
    mask = torch.arange(x.shape[1], device=x.device) < x.shape[1] - 3
    advantages = torch.linspace(-1, 1, len(x), dtype=x.dtype, device=x.device)
    loss, metrics = ops.grpo_loss(
        x,
        x.detach() - 0.1,
        advantages,
        mask.expand(x.shape),
        ref_logps=x.detach() + 0.2,
        config=config,
    )
    (loss * 2).backward()
    assert x.grad is not None
    return [loss, x.grad, metrics["kl"]]


def beside_float64(fn: Callable[..., list[Tensor]], *args: Tensor) -> Case:
    """The CUDA form of `fn` beside the plain form of it on float64."""

    def run() -> float:
        with ops.use("cuda,reference"):
            got = fn(*args)
        exact_args = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]
        with ops.use("reference"):
            exact = fn(*exact_args)
        return max(scaled(a, b) for a, b in zip(got, exact, strict=True))

    return run


def beside_reference(fn: Callable[..., Tensor], *args: Tensor) -> Case:
    """Bit for bit: 0, or 1 where any bit differs. For kernels that promise the bits of the CPU."""

    def run() -> float:
        with ops.use("cuda"):
            got = fn(*args).cpu()
        with ops.use("reference"):
            expected = fn(*(x.cpu() for x in args))
        same = torch.equal(got.nan_to_num(-7), expected.nan_to_num(-7))
        return 0.0 if same else 1.0

    return run


def cases(device: str) -> Iterator[tuple[str, float, Case]]:
    """(name, largest error, case), the most important kernels first."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in LOGITS:
            inputs = logits_inputs(*shape, dtype, device)
            name = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
            yield (
                f"logits_grpo_loss {name}",
                TOLERANCE[dtype],
                beside_float64(logits_loss, *inputs),
            )
            yield f"gather_logprobs {name}", TOLERANCE[dtype], beside_float64(gather, *inputs)
    generator = torch.Generator().manual_seed(0)
    for dtype in TOLERANCE:
        hidden = torch.randn(4, 9, 32, generator=generator).to(device, dtype)
        weight = torch.randn(517, 32, generator=generator).to(device, dtype)
        labels = torch.randint(517, (4, 9), generator=generator).to(device)
        yield (
            f"linear_grpo_loss {str(dtype).removeprefix('torch.')}",
            2 * TOLERANCE[dtype],  # and the roundings of three products
            beside_float64(head_loss, hidden, weight, labels),
        )
    for rows, length in ((1, 4), (8, 33), (70, 129)):
        logps = (torch.randn(rows, length, generator=generator) - 2).to(device)
        yield f"grpo_loss ({rows}, {length})", 5e-5, beside_float64(token_loss, logps)
    for layout, size in ((CLIP_14, (56, 84)), (CLIP_16, (64, 96))):
        for shape in ((3, 97, 131, 3), (2, *size, 3), (1, 300, 900, 3)):
            frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
            for rounding in ("u8", "pil", "f32", "none"):
                # The plain form normalises in float32, as the kernel: the same bits.
                yield (
                    f"video_patches {layout.patch} {shape} {rounding}",
                    0.0,
                    beside_reference(
                        lambda x, size=size, layout=layout, rounding=rounding: ops.video_patches(
                            x, size, layout=layout, rounding=rounding, dtype=torch.bfloat16
                        )[0].float(),
                        frames,
                    ),
                )
                yield (
                    f"resize_frames {shape} {rounding}",
                    0.0,
                    beside_reference(
                        lambda x, size=size, rounding=rounding: ops.resize_frames(
                            x, size, rounding=rounding
                        ),
                        frames,
                    ),
                )
    corners = torch.rand(2, 65, 2, generator=generator)
    boxes = torch.cat([corners, corners + torch.rand(2, 65, 2, generator=generator)], 2).to(device)
    for pairwise in (False, True):
        yield (
            f"box_iou pairwise={pairwise}",
            0.0,
            beside_reference(
                lambda a, b, pairwise=pairwise: ops.box_iou(a, b, pairwise=pairwise), *boxes
            ),
        )
    spans = torch.rand(2, 33, 2, generator=generator).sort(-1).values.to(device)
    yield "temporal_iou", 0.0, beside_reference(ops.temporal_iou, *spans)
    offsets = torch.tensor([0, 5, 5, 33], device=device)
    yield (
        "interval_set_iou",
        1e-6,
        beside_float64(
            lambda a, b, at: [ops.interval_set_iou(a, at, b, at)], spans[0], spans[1], offsets
        ),
    )
    yield (
        "track_iou",
        1e-6,
        beside_float64(
            lambda a, b: [ops.track_iou(a, b)], boxes[0].view(5, 13, 4), boxes[1].view(5, 13, 4)
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    parser.add_argument("--every", type=int, default=1, help="take each so-manieth case")
    arguments = parser.parse_args()
    if reason := backend.unavailable("cuda"):
        print(f"cannot run: {reason}")
        return 1
    device = "cpu" if backend.emulation is not None else "cuda"
    wrong = done = 0
    chosen = [case for case in cases(device) if case[0].startswith(arguments.only)]
    for name, limit, case in chosen[:: arguments.every]:
        began = time.perf_counter()
        try:
            error = case()
            verdict = "ok" if error <= limit else "WRONG"
            said = f"error {error:.1e}, at most {limit:.0e}"
        except Exception as fault:
            traceback.print_exc()
            verdict, said = "WRONG", f"{type(fault).__name__}: {fault}".splitlines()[0]
        done += 1
        wrong += verdict != "ok"
        print(f"{verdict} {name}: {said} ({time.perf_counter() - began:.2f} s)", flush=True)
    print(f"{done - wrong} of {done} cases are right")
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
