"""The IoU ops in plain torch: their specification, their gradient, and the backend "reference".

The formulae are in iou.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TORCHVISION_EPS = 1e-7


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is not a positive finite number."""
    usable = (denominator > 0) & denominator.isfinite()
    # A safe denominator, too: the gradient of the branch not taken must not be NaN.
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def _pair_up(a: Tensor, b: Tensor, pairwise: bool) -> tuple[Tensor, Tensor]:
    return (a[:, None], b[None]) if pairwise else (a, b)


def temporal_iou_reference(pred: Tensor, target: Tensor, pairwise: bool) -> Tensor:
    pred, target = _pair_up(pred, target, pairwise)
    length_pred = (pred[..., 1] - pred[..., 0]).clamp(min=0)
    length_target = (target[..., 1] - target[..., 0]).clamp(min=0)
    first_end = torch.minimum(pred[..., 1], target[..., 1])
    last_start = torch.maximum(pred[..., 0], target[..., 0])
    shared = (first_end - last_start).clamp(min=0)
    return _ratio(shared, length_pred + length_target - shared)


def angle(wh: Tensor, exact: bool) -> Tensor:
    width, height = wh.unbind(-1)
    return torch.atan(width / height) if exact else torch.atan2(width, height)


def _ciou_penalty(wh_a: Tensor, wh_b: Tensor, iou: Tensor, eps: float) -> Tensor:
    angle_a, angle_b = (angle(wh, bool(eps)) for wh in (wh_a, wh_b))
    v = (4 / math.pi**2) * (angle_a - angle_b) ** 2
    if not eps:
        v = torch.where(v.isfinite(), v, 0.0)
    with torch.no_grad():
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
    if not exact:  # holds reversed corners, too: keeps the penalties within [0, 1]
        low = torch.minimum(low, torch.minimum(a[..., 2:], b[..., 2:]))
        high = torch.maximum(high, torch.maximum(a[..., :2], b[..., :2]))
    hull = (high - low).clamp(min=0)
    if kind == "giou":
        area = hull[..., 0] * hull[..., 1]
        return iou - divide(area - union, area)
    eps = _TORCHVISION_EPS if exact else 0.0
    diagonal = hull[..., 0] ** 2 + hull[..., 1] ** 2 + eps
    centres = (a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2
    iou_minus_distance = iou - divide(centres[..., 0] ** 2 + centres[..., 1] ** 2, diagonal)
    if kind == "diou":
        return iou_minus_distance
    return iou_minus_distance - _ciou_penalty(wh_a, wh_b, iou, eps)


def track_iou_reference(pred: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
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
        p, t = p[p[:, 1] > p[:, 0]], t[t[:, 1] > t[:, 0]]
        (p_start, p_end), (t_start, t_end) = _merge(p), _merge(t)
        overlap = torch.minimum(p_end[:, None], t_end) - torch.maximum(p_start[:, None], t_start)
        shared = overlap.clamp(min=0).sum()
        union = (p_end - p_start).sum() + (t_end - t_start).sum() - shared
        iou = _ratio(shared, union).clamp(max=1)
        result.append(torch.where(union == 0, empty, iou))
    if not result:
        return pred.new_empty(0)
    return torch.stack(result).to(pred.dtype)
