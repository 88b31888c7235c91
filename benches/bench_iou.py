"""IoU ops beside plain torch (the reference form) and, where it imports, torchvision.

Bytes: both sides' boxes read once, the result written once.
"""

from types import ModuleType

import peers
import torch
from harness import Bench, arguments, scaled_error

from vcr1_fast import ops
from vcr1_fast.ops.iou import (
    KINDS,
    box_iou_reference,
    interval_set_iou_reference,
    temporal_iou_reference,
    track_iou_reference,
)


def bench_boxes(bench: Bench, n: int, m: int, boxes: ModuleType | str) -> None:
    corners = torch.rand(n + m, 2, 2).sort(1).values.flatten(1).to(bench.device)
    a, b = corners[:n], corners[n:]
    names = dict(
        zip(KINDS, ("box", "generalized_box", "distance_box", "complete_box"), strict=True)
    )
    for kind in KINDS:
        fns = {"torch": lambda k=kind: box_iou_reference(a, b, k, True, "zero")}
        if isinstance(boxes, str):
            fns["torchvision"] = boxes
        else:
            theirs = getattr(boxes, f"{names[kind]}_iou")
            fns["torchvision"] = lambda f=theirs: f(a, b)
        fns["ours"] = lambda k=kind: ops.box_iou(a, b, kind=k, pairwise=True)
        exact = box_iou_reference(a.double(), b.double(), kind, True, "zero")
        errors = {
            name: scaled_error(fn(), exact) for name, fn in fns.items() if not isinstance(fn, str)
        }
        traffic = 4 * (4 * (n + m) + n * m)
        bench.run(f"box_iou {kind}", f"{n}x{m}", "float32", fns, traffic, errors=errors)


def bench_rewards(bench: Bench, n: int) -> None:
    """One scoring pass: spans, sets of three spans, tracks of eight boxes."""
    device = bench.device
    spans = torch.rand(2, 3 * n, 2).sort(-1).values.to(device)
    offsets = torch.arange(0, 3 * n + 1, 3, device=device)
    tracks = torch.rand(2, n * 8, 2, 2).sort(2).values.view(2, n, 8, 4).to(device)
    lengths = torch.full((n,), 8, device=device)
    p, t = spans[:, :n]
    bench.run(
        "temporal_iou",
        f"{n}",
        "float32",
        {
            "torch": lambda: temporal_iou_reference(p, t, False),
            "ours": lambda: ops.temporal_iou(p, t),
        },
        4 * 5 * n,
    )
    bench.run(
        "track_iou",
        f"{n}x8",
        "float32",
        {
            "torch": lambda: track_iou_reference(*tracks, lengths),
            "ours": lambda: ops.track_iou(*tracks, lengths),
        },
        4 * (2 * 8 * 4 + 1) * n,
    )
    bench.run(
        "interval_set_iou",
        f"{n}x3",
        "float32",
        {
            "torch": lambda: interval_set_iou_reference(spans[0], offsets, spans[1], offsets, 0.0),
            "ours": lambda: ops.interval_set_iou(spans[0], offsets, spans[1], offsets),
        },
        (4 * 12 + 8 * 2 + 4) * n,
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    boxes = peers.torchvision("ops.boxes")
    with Bench("iou", **vars(args)) as bench:
        torch.manual_seed(0)
        bench_boxes(bench, 2048, 2048, boxes)
        bench_boxes(bench, 100, 300, boxes)
        for n in (64, 4096):
            bench_rewards(bench, n)


if __name__ == "__main__":
    main()
