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

import math

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, check_one_device, native

KINDS = ("iou", "giou", "diou", "ciou")
CONVENTIONS = ("zero", "torchvision")
_TORCHVISION_EPS = 1e-7

# Plain torch: the specification, the gradient, and the backend "reference".


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is not a positive finite number."""
    usable = (denominator > 0) & denominator.isfinite()
    # `where` alone would not do: 0 * NaN, the gradient of the branch not taken, is NaN.
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def _pair_up(a: Tensor, b: Tensor, pairwise: bool) -> tuple[Tensor, Tensor]:
    return (a[:, None], b[None]) if pairwise else (a, b)


def temporal_iou_reference(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    pred, target = _pair_up(pred, target, pairwise)
    length_pred = (pred[..., 1] - pred[..., 0]).clamp(min=0)
    length_target = (target[..., 1] - target[..., 0]).clamp(min=0)
    # Reversed spans have length 0 and share nothing: lengths and overlap are clamped, ends are not
    # sorted, so that a span of nonsense earns nothing.
    first_end = torch.minimum(pred[..., 1], target[..., 1])
    last_start = torch.maximum(pred[..., 0], target[..., 0])
    shared = (first_end - last_start).clamp(min=0)
    return _ratio(shared, length_pred + length_target - shared)


def _angle(wh: Tensor, exact: bool) -> Tensor:
    width, height = wh.unbind(-1)
    return torch.atan(width / height) if exact else torch.atan2(width, height)


def _ciou_penalty(wh_a: Tensor, wh_b: Tensor, iou: Tensor, eps: float) -> Tensor:
    angle_a, angle_b = (_angle(wh, bool(eps)) for wh in (wh_a, wh_b))
    v = (4 / math.pi**2) * (angle_a - angle_b) ** 2
    if not eps:
        v = torch.where(v.isfinite(), v, 0.0)
    with torch.no_grad():  # alpha weighs the penalty v; the formula takes it as a constant
        alpha = v / (1 - iou + v + eps) if eps else _ratio(v, 1 - iou + v)
    return alpha * v


def box_iou_reference(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    a, b = _pair_up(a, b, pairwise)
    exact = convention == "torchvision"
    wh_a, wh_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    if not exact:
        wh_a, wh_b = wh_a.clamp(min=0), wh_b.clamp(min=0)
    wh = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    shared = wh[..., 0] * wh[..., 1]
    union = wh_a[..., 0] * wh_a[..., 1] + wh_b[..., 0] * wh_b[..., 1] - shared
    divide = torch.div if exact else _ratio
    iou = divide(shared, union)
    if kind == "iou":
        return iou

    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    if not exact:  # the hull of reversed corners, too: it keeps the penalties within [0, 1]
        low = torch.minimum(low, torch.minimum(a[..., 2:], b[..., 2:]))
        high = torch.maximum(high, torch.maximum(a[..., :2], b[..., :2]))
    hull = (high - low).clamp(min=0)
    if kind == "giou":
        area = hull[..., 0] * hull[..., 1]
        return iou - divide(area - union, area)
    eps = _TORCHVISION_EPS if exact else 0.0
    diagonal = hull[..., 0] ** 2 + hull[..., 1] ** 2 + eps
    # Halved before the difference, as torchvision rounds.
    centres = (a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2
    iou_minus_distance = iou - divide(centres[..., 0] ** 2 + centres[..., 1] ** 2, diagonal)
    if kind == "diou":
        return iou_minus_distance
    return iou_minus_distance - _ciou_penalty(wh_a, wh_b, iou, eps)


def track_iou_reference(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    # Summed in float64, as the kernels do: all backends round once, at the end.
    iou = box_iou_reference(pred, target, "iou", False, "zero").double()
    counted = torch.arange(pred.shape[1], device=pred.device) < lengths[:, None]
    total = torch.where(counted, iou, 0.0).sum(-1)
    return (total / lengths.clamp(min=1)).to(pred.dtype)


def _merge(spans: Tensor) -> tuple[Tensor, Tensor]:
    """The union of (n, 2) spans as disjoint pieces (starts, ends), some of them empty."""
    start, end = spans[spans[:, 0].argsort()].unbind(-1)
    reached = torch.cat([start[:1], end.cummax(0).values[:-1]])
    start = torch.maximum(start, reached)
    return start, torch.maximum(start, end)


def _check_offsets(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor
) -> None:
    for name, spans, offsets in (
        ("pred_offsets", pred, pred_offsets),
        ("target_offsets", target, target_offsets),
    ):
        first, last = offsets[0], offsets[-1]
        if first != 0 or last != len(spans) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(
                f"{name} must rise from 0 to {len(spans)}, the number of spans; got "
                f"{offsets.tolist()}"
            )


def interval_set_iou_reference(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor, empty: float
) -> Tensor:
    _check_offsets(pred, pred_offsets, target, target_offsets)
    result = []
    for p0, p1, t0, t1 in zip(
        pred_offsets[:-1].tolist(),
        pred_offsets[1:].tolist(),
        target_offsets[:-1].tolist(),
        target_offsets[1:].tolist(),
        strict=True,
    ):
        p, t = pred[p0:p1].double(), target[t0:t1].double()
        # Comparisons with NaN are false: a NaN span is dropped like an empty or reversed one.
        p, t = p[p[:, 1] > p[:, 0]], t[t[:, 1] > t[:, 0]]
        (p_start, p_end), (t_start, t_end) = _merge(p), _merge(t)
        overlap = torch.minimum(p_end[:, None], t_end) - torch.maximum(p_start[:, None], t_start)
        shared = overlap.clamp(min=0).sum()
        union = (p_end - p_start).sum() + (t_end - t_start).sum() - shared
        # Sums of rounded differences may exceed the union by an ulp.
        iou = _ratio(shared, union).clamp(max=1)
        result.append(torch.where(union == 0, empty, iou))
    if not result:
        return pred.new_empty(0)
    return torch.stack(result).to(pred.dtype)


# CPU and CUDA: one binding serves both, on the device of its tensors.


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _planes(x: Tensor, kind: str, exact: bool) -> Tensor:
    """(n, k) to contiguous (k, n), one array a coordinate; for CIoU the angle is one more."""
    if kind == "ciou":
        # The only transcendental function: torch's is vectorised, and n + m values are far fewer
        # than the n * m pairs that use them.
        wh = x[:, 2:] - x[:, :2]
        column = _angle(wh if exact else wh.clamp(min=0), exact)[:, None]
        x = torch.cat([x, column], dim=1)
    return x.t().contiguous()


def _box_cpu(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    out = _fake_pairs(a, b, pairwise)
    a, b = (_rows(x) for x in (a, b))
    if pairwise or kind == "ciou":
        # A vector of the CPU takes one coordinate of several boxes.
        a, b = (_planes(x, kind, convention == "torchvision") for x in (a, b))
    return _box_native(a, b, out, kind, pairwise, convention)


def _box_cuda(a: Tensor, b: Tensor, kind: str, pairwise: bool, convention: str) -> Tensor:
    out = _fake_pairs(a, b, pairwise)
    return _box_native(_rows(a), _rows(b), out, kind, pairwise, convention)


def _box_native(
    a: Tensor, b: Tensor, out: Tensor, kind: str, pairwise: bool, convention: str
) -> Tensor:
    if out.numel() == 0:
        return out
    native.box_iou(
        a=a,
        b=b,
        out=out,
        kind=kind,
        pairwise=pairwise,
        torchvision=convention == "torchvision",
        num_threads=torch.get_num_threads(),
    )
    return out


def _temporal_cpu(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    return _box_cpu(pred, target, "span", pairwise, "zero")


def _temporal_cuda(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    return _box_cuda(pred, target, "span", pairwise, "zero")


def _track_native(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    out = pred.new_empty(pred.shape[0])
    native.track_iou(
        pred=pred.contiguous(),
        target=target.contiguous(),
        lengths=lengths.contiguous(),
        out=out,
        num_threads=torch.get_num_threads(),
    )
    return out


def _sets_native(
    pred: Tensor, pred_offsets: Tensor, target: Tensor, target_offsets: Tensor, empty: float
) -> Tensor:
    out = pred.new_empty(pred_offsets.shape[0] - 1, dtype=torch.float64)
    # Copies: the kernel sorts and merges the spans in place.
    p, t = (
        torch.empty(x.shape, dtype=torch.float64, device=x.device).copy_(x) for x in (pred, target)
    )
    native.interval_set_iou(
        pred=p,
        pred_offsets=pred_offsets.contiguous(),
        target=t,
        target_offsets=target_offsets.contiguous(),
        empty=empty,
        out=out,
        num_threads=torch.get_num_threads(),
    )
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
_track.register("cpu", _track_native)
_track.register("cuda", _track_native)
_sets = Op(
    "interval_set_iou",
    "(Tensor pred, Tensor pred_offsets, Tensor target, Tensor target_offsets, float empty)"
    " -> Tensor",
    _fake_sets,
)
_sets.register("reference", interval_set_iou_reference)
_sets.register("cpu", _sets_native)
_sets.register("cuda", _sets_native)


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
    Returns (...) or (N, M), of their dtype. Differentiable (in plain torch, whatever the backend).
    Raises ValueError for other shapes and dtypes.
    """
    _check_floats("pred and target", pred, target, 2)
    _check_shapes("pred and target", pred, target, pairwise)
    # The kernels have no backward pass; plain torch differentiates the same formula.
    if _needs_gradient(pred, target):
        return temporal_iou_reference(pred, target, pairwise)
    return _temporal.direct(pred, target, pairwise)


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
    Returns (...) or (N, M), of their dtype. Differentiable (in plain torch, whatever the backend),
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
    return _box.direct(a, b, kind, pairwise, convention)


def track_iou(pred: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean box IoU along tracks.

    pred, target: (B, L, 4) float32 or float64 boxes (x0, y0, x1, y1).
    lengths: (B,) int64, boxes that count in each track, 0..L; None counts all.
    Returns (B,); a track of length 0 has 0. Differentiable (in plain torch, whatever the backend).
    Raises ValueError for other shapes and dtypes; lengths are clamped to 0..L.
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
        check_one_device("pred", pred, lengths=lengths)
        lengths = lengths.clamp(0, steps)
    if _needs_gradient(pred, target):
        return track_iou_reference(pred, target, lengths)
    return _track.direct(pred, target, lengths)


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
    of spans without falling, and for inputs that require gradients. On a GPU the host does not wait
    to check offsets: a set whose two offsets lie outside the spans has NaN.
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
    return _sets.direct(pred, pred_offsets, target, target_offsets, empty)
