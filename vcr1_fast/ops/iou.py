"""Intersection over union of time spans, sets of spans, boxes and box tracks.

    IoU(a, b) = |a and b| / |a or b|

A span is (start, end), a box (x0, y0, x1, y1); an end before its start makes an empty one. An empty
union gives 0, not NaN, and so does a value that is not finite: every IoU lies in [0, 1], and it is
symmetric to the bit. With hull C of the two boxes, centre distance d, hull diagonal l, width w and
height h:

    GIoU = IoU - (|C| - |a or b|) / |C|                              (Rezatofighi et al., 2019)
    DIoU = IoU - d^2 / l^2                                                (Zheng et al., 2020)
    CIoU = DIoU - v^2 / (1 - IoU + v),  v = 4/pi^2 (atan w_a/h_a - atan w_b/h_b)^2

where v / (1 - IoU + v) takes no gradient. A penalty whose denominator is 0 counts as 0.

`convention="torchvision"` repeats torchvision.ops.boxes instead: areas may be negative, 0 / 0 is
NaN, and 1e-7 is added to l^2 and to 1 - IoU + v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native
from vcr1_fast.ops.iou_reference import (
    angle,
    box_iou_reference,
    interval_set_iou_reference,
    temporal_iou_reference,
    track_iou_reference,
)

KINDS = ("iou", "giou", "diou", "ciou")
CONVENTIONS = ("zero", "torchvision")


def _planes(x: Tensor, kind: str, exact: bool) -> Tensor:
    """(n, k) to contiguous (k, n): one array a coordinate; for CIoU the angle is one more."""
    if kind == "ciou":
        wh = x[:, 2:] - x[:, :2]
        column = angle(wh if exact else wh.clamp(min=0), exact)[:, None]
        x = torch.cat([x, column], dim=1)
    return x.t().contiguous()


def _box_cpu(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    out = _fake_pairs(a, b, pairwise)
    exact = convention == "torchvision"
    if out.numel() == 0:
        return out
    sides = [x.reshape(-1, x.shape[-1]) for x in (a, b)]
    if pairwise or kind == "ciou":
        sides = [_planes(x, kind, exact) for x in sides]
    else:
        sides = [x.contiguous() for x in sides]
    native.box_iou(*sides, out, kind, pairwise, exact, torch.get_num_threads())
    return out


def _temporal_cpu(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    return _box_cpu(pred, target, "span", pairwise, "zero")


def _track_cpu(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    out = pred.new_empty(pred.shape[0])
    inputs = (x.contiguous() for x in (pred, target, lengths))
    native.track_iou(*inputs, out, torch.get_num_threads())
    return out


def _sets_cpu(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor, empty: float
) -> Tensor:
    spans, out = _sets_memory(pred, pred_offsets, target, target_offsets)
    native.interval_set_iou(*spans, empty, out, torch.get_num_threads())
    return out.to(pred.dtype)


def _sets_memory(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The spans as copies in float64, which the kernels sort and merge in place; the result."""
    out = pred.new_empty(pred_offsets.shape[0] - 1, dtype=torch.float64)
    p, t = (
        torch.empty(x.shape, dtype=torch.float64, device=x.device).copy_(x) for x in (pred, target)
    )
    return [p, pred_offsets.contiguous(), t, target_offsets.contiguous()], out


def _box_cuda(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    out = _fake_pairs(a, b, pairwise)
    if out.numel() > 0:
        rows = (x.reshape(-1, x.shape[-1]).contiguous() for x in (a, b))
        native.box_iou(*rows, out, kind, pairwise, convention == "torchvision", 1)
    return out


def _temporal_cuda(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    return _box_cuda(pred, target, "span", pairwise, "zero")


def _track_cuda(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    out = pred.new_empty(pred.shape[0])
    if out.numel() > 0:
        native.track_iou(*(x.contiguous() for x in (pred, target, lengths)), out, 1)
    return out


def _sets_cuda(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor, empty: float
) -> Tensor:
    spans, out = _sets_memory(pred, pred_offsets, target, target_offsets)
    if out.numel() > 0:
        native.interval_set_iou(*spans, empty, out, 1)
    return out.to(pred.dtype)


def _fake_pairs(a: Tensor, b: Tensor, pairwise: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]) if pairwise else a.shape[:-1])


def _fake_boxes(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    return _fake_pairs(a, b, pairwise)


def _fake_tracks(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    return pred.new_empty(pred.shape[0])


def _fake_sets(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor, empty: float
) -> Tensor:
    return pred.new_empty(pred_offsets.shape[0] - 1)


_temporal = Op("temporal_iou", "(Tensor pred, Tensor target, bool pairwise) -> Tensor", _fake_pairs)
_temporal.register("reference", temporal_iou_reference)
_temporal.register("cpu", _temporal_cpu)
_temporal.register("cuda", _temporal_cuda)
_box = Op(
    "box_iou",
    "(Tensor a, Tensor b, str kind, bool pairwise, str convention) -> Tensor",
    _fake_boxes,
)
_box.register("reference", box_iou_reference)
_box.register("cpu", _box_cpu)
_box.register("cuda", _box_cuda)
_track = Op("track_iou", "(Tensor pred, Tensor target, Tensor lengths) -> Tensor", _fake_tracks)
_track.register("reference", track_iou_reference)
_track.register("cpu", _track_cpu)
_track.register("cuda", _track_cuda)
_sets = Op(
    "interval_set_iou",
    "(Tensor pred, Tensor pred_offsets, Tensor target, Tensor target_offsets, float empty)"
    " -> Tensor",
    _fake_sets,
)
_sets.register("reference", interval_set_iou_reference)
_sets.register("cpu", _sets_cpu)
_sets.register("cuda", _sets_cuda)


def _check_floats(names: str, a: Tensor, b: Tensor, width: int) -> None:
    if a.dtype not in (torch.float32, torch.float64) or b.dtype != a.dtype:
        raise ValueError(f"{names} must both be float32 or float64, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{names} must be on one device, got {a.device} and {b.device}")
    if a.dim() < 1 or b.dim() < 1 or a.shape[-1] != width or b.shape[-1] != width:
        raise ValueError(
            f"{names} must be (..., {width}), got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _check_shapes(names: str, a: Tensor, b: Tensor, pairwise: bool) -> None:
    if pairwise and (a.dim() != 2 or b.dim() != 2):
        raise ValueError(
            f"pairwise {names} must have two dimensions, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not pairwise and a.shape != b.shape:
        raise ValueError(
            f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "for all pairs pass pairwise=True"
        )


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def temporal_iou(pred: Tensor, target: Tensor, *, pairwise: bool = False) -> Tensor:
    """IoU of time spans.

    pred, target: (..., 2) of one shape, or (N, 2) and (M, 2) with pairwise=True; float32 or
        float64, (start, end) in any unit.
    Returns (...) or (N, M), of their dtype. Differentiable (as plain torch, whatever the backend).
    Raises ValueError for other shapes and dtypes.
    """
    _check_floats("pred and target", pred, target, 2)
    _check_shapes("pred and target", pred, target, pairwise)
    if _needs_gradient(pred, target):
        return temporal_iou_reference(pred, target, pairwise)
    return _temporal(pred, target, pairwise)


def box_iou(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "iou",
    pairwise: bool = False,
    convention: str = "zero",
) -> Tensor:
    """IoU of boxes, or a generalised one.

    a, b: (..., 4) of one shape, or (N, 4) and (M, 4) with pairwise=True; float32 or float64,
        (x0, y0, x1, y1) in any unit.
    kind: "iou" in [0, 1], "giou" and "diou" in [-1, 1], "ciou" in [-1.5, 1].
    convention: for empty boxes: "zero" or "torchvision"; see the module's docstring.
    Returns (...) or (N, M), of their dtype. Differentiable (as plain torch, whatever the backend),
    so 1 - box_iou(a, b, kind="giou") is a loss. Raises ValueError for other shapes and dtypes.
    """
    _check_floats("a and b", a, b, 4)
    _check_shapes("a and b", a, b, pairwise)
    if kind not in KINDS or convention not in CONVENTIONS:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)} and convention one of "
            f"{', '.join(CONVENTIONS)}; got {kind!r} and {convention!r}"
        )
    if _needs_gradient(a, b):
        return box_iou_reference(a, b, kind, pairwise, convention)
    return _box(a, b, kind, pairwise, convention)


def track_iou(pred: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean box IoU along tracks.

    pred, target: (B, L, 4) float32 or float64 boxes (x0, y0, x1, y1).
    lengths: (B,) int64, boxes that count in each track, 0..L; None counts all.
    Returns (B,); a track of length 0 has 0. Differentiable (as plain torch, whatever the backend).
    Raises ValueError for other shapes and dtypes; lengths outside 0..L are cut to it.
    """
    _check_floats("pred and target", pred, target, 4)
    if pred.dim() != 3 or pred.shape != target.shape:
        raise ValueError(
            f"pred and target must be (B, L, 4), got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    batch, steps = pred.shape[:2]
    if lengths is None:
        lengths = torch.full((batch,), steps, dtype=torch.int64, device=pred.device)
    elif lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths must be int64 ({batch},), got {lengths.dtype} {tuple(lengths.shape)}"
        )
    else:
        lengths = lengths.clamp(0, steps)
    if _needs_gradient(pred, target):
        return track_iou_reference(pred, target, lengths)
    return _track(pred, target, lengths)


def interval_set_iou(
    pred: Tensor,
    pred_offsets: Tensor,
    target: Tensor,
    target_offsets: Tensor,
    *,
    empty: float = 0.0,
) -> Tensor:
    """IoU of sets of time spans; spans of one set may overlap, and count once.

    pred (P, 2), target (Q, 2): float32 or float64 (start, end); pred_offsets, target_offsets: int64
        (N + 1,), set i of pred is pred[pred_offsets[i]:pred_offsets[i + 1]].
    empty: the value where both sets are empty (VideoChat-R1's reward gives 1).
    Returns (N,), summed in float64. Not differentiable.
    Raises ValueError for other shapes and dtypes, for offsets that do not run from 0 to the number
    of spans without falling, and for inputs that require gradients. On a GPU, where the host would
    have to wait for them, offsets are not refused: a set whose own two are no part of the spans
    has NaN.
    """
    _check_floats("pred and target", pred, target, 2)
    if pred.dim() != 2 or target.dim() != 2:
        raise ValueError(
            f"pred and target must be (P, 2) and (Q, 2), got {tuple(pred.shape)} and "
            f"{tuple(target.shape)}"
        )
    if _needs_gradient(pred, target):
        raise ValueError("interval_set_iou is not differentiable: detach pred and target")
    if pred_offsets.shape != target_offsets.shape:
        raise ValueError(
            "pred_offsets and target_offsets must be (N + 1,), got "
            f"{tuple(pred_offsets.shape)} and {tuple(target_offsets.shape)}"
        )
    for name, offsets in (("pred_offsets", pred_offsets), ("target_offsets", target_offsets)):
        if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] == 0:
            raise ValueError(
                f"{name} must be int64 (N + 1,), got {offsets.dtype} {tuple(offsets.shape)}"
            )
    return _sets(pred, pred_offsets, target, target_offsets, empty)
