"""Advantages of completions relative to their group (the completions of one prompt).

With mu_g the mean reward of group g, n_g its size, l a completion's length:

    grpo   A_i = r_i - mu_g                                     [DeepSeekMath]
    rloo   A_i = r_i - mean of the group's other rewards = (r_i - mu_g) n_g / (n_g - 1)
    opo    A_i = r_i - sum_g(l r) / sum_g(l)                    [on-policy optimal baseline]
    gdpo   z-score of each reward function in the group, weighted sum, z-score in the batch
    reinforce_plus_plus_baseline   r_i - mu_g

then divided by (std + eps), with the unbiased std of the group's rewards ("group"), of all rewards
("batch"), a std that the caller gives for every row ("given"), or not divided ("none");
reinforce_plus_plus_baseline divides by the std of all r - mu_g. EMA-GRPO [OneThinker, arXiv
2512.03043] is grpo with the running std of the row's task as the given std.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op

ESTIMATORS = ("grpo", "rloo", "opo", "gdpo", "reinforce_plus_plus_baseline")
SCALES = ("group", "batch", "given", "none")
DEFAULT_SCALE = {
    "grpo": "group",
    "rloo": "none",
    "opo": "none",
    "gdpo": "group",
    "reinforce_plus_plus_baseline": "batch",
}


@dataclass(frozen=True)
class _Options:
    """Options of `group_advantages` as its op's schema names them; guard 0 means none."""

    group_size: int
    estimator: str
    scale: str
    nan: str
    singleton: str
    eps: float
    guard: float


class _Groups:
    """Sums and extremes over groups of rows, in float64 and in a fixed order."""

    def __init__(self, rewards: Tensor, group_index: Tensor | None, group_size: int) -> None:
        rows = torch.arange(len(rewards), device=rewards.device)
        if group_index is None:
            self._order, self._index = rows, rows // group_size
            offsets = torch.arange(0, len(rewards) + 1, group_size, device=rewards.device)
        else:
            _, self._index, counts = group_index.unique(return_inverse=True, return_counts=True)
            self._order = self._index.argsort(stable=True)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._offsets = offsets

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        """(N,) -> (N,): every row gets the reduction over its group."""
        # segment_reduce adds in row order; index_add_ on a GPU would add in any, and change bits.
        initial = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}[reduction]
        reduced = torch.segment_reduce(
            x[self._order], reduction, offsets=self._offsets, initial=initial, unsafe=True
        )
        return reduced[self._index]


def group_advantages_reference(
    rewards: Tensor,
    *,
    group_index: Tensor | None,
    weights: Tensor | None,
    lengths: Tensor | None,
    stds: Tensor | None,
    **options: Any,
) -> Tensor:
    """(N,) float32 advantages; arguments as `group_advantages`, options as `_Options`."""
    o = _Options(**options)
    valid = ~rewards.isnan()
    # An infinite reward would make its whole group nan.
    refused = ~rewards.isfinite() if o.nan == "error" else rewards.isinf()
    if bool(refused.any()):
        bad = refused.reshape(len(rewards), -1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f'rewards of rows {bad} are nan or infinite; nan="ignore" leaves the nan out'
        )
    if len(rewards) == 0:
        return rewards.new_zeros(0, dtype=torch.float32)
    groups = _Groups(rewards, group_index, o.group_size)
    # float64: ten thousand rewards cost nothing, and the difference to a mean loses no digits.
    matrix = rewards.double().reshape(len(rewards), -1)
    valid = valid.reshape(len(rewards), -1)
    weights = matrix.new_ones(matrix.shape[1]) if weights is None else weights.double()
    if o.estimator == "gdpo":
        # Each reward is normalised by itself first, or one of large range would hide the others.
        z = [_scores(matrix[:, k], valid[:, k], groups, o.eps) for k in range(matrix.shape[1])]
        total = (torch.stack(z, 1) * weights).sum(1)
        rows = valid.any(1)
        if o.scale == "none":
            return total.float()
        centred = torch.where(rows, _centre(total, rows, _mean(total, rows), groups), 0.0)
        return (centred / (_std(total, rows) + o.eps)).float()

    rewards = (torch.where(valid, matrix, 0.0) * weights).sum(1)
    rows = valid.any(1)
    kept = rows.double()
    count = groups.reduce(kept, "sum")
    mean = groups.reduce(rewards * kept, "sum") / count.clamp(min=1)
    baseline = mean
    if o.estimator == "opo":
        assert lengths is not None  # `group_advantages` checks it
        share = kept * lengths.double()
        baseline = groups.reduce(share * rewards, "sum") / groups.reduce(share, "sum").clamp(min=1)
    advantages = _centre(rewards, rows, baseline, groups)
    if o.estimator == "rloo":
        advantages = advantages * count / (count - 1).clamp(min=1)
    squares = groups.reduce(kept * (rewards - mean) ** 2, "sum")
    if o.scale == "group":
        advantages = advantages / ((squares / (count - 1).clamp(min=1)).sqrt() + o.eps)
    elif o.scale == "given":
        # A group far from its task's usual spread would outweigh the batch: its own std is used,
        # over n rather than n - 1, as the authors do.
        assert stds is not None  # `group_advantages` checks it
        given = advantages / (stds.double() + o.eps)
        own = advantages / ((squares / count.clamp(min=1)).sqrt() + o.eps)
        largest = groups.reduce(given.abs(), "max")
        advantages = torch.where(largest > o.guard, own, given) if o.guard else given
    elif o.scale == "batch":
        spread = advantages if o.estimator == "reinforce_plus_plus_baseline" else rewards
        advantages = advantages / (_std(spread, rows) + o.eps)
    alone = rewards if o.singleton == "keep" else torch.zeros_like(rewards)
    advantages = torch.where(count == 1, alone, advantages)
    return torch.where(rows, advantages, 0.0).float()


def _centre(rewards: Tensor, rows: Tensor, baseline: Tensor, groups: _Groups) -> Tensor:
    # Equal rewards must give exactly 0 (such groups are skipped), and their mean is rounded.
    low = groups.reduce(torch.where(rows, rewards, torch.inf), "min")
    high = groups.reduce(torch.where(rows, rewards, -torch.inf), "max")
    return torch.where(low == high, 0.0, rewards - baseline)


def _scores(rewards: Tensor, rows: Tensor, groups: _Groups, eps: float) -> Tensor:
    kept = rows.double()
    rewards = torch.where(rows, rewards, 0.0)
    count = groups.reduce(kept, "sum")
    mean = groups.reduce(rewards, "sum") / count.clamp(min=1)
    centred = torch.where(rows, _centre(rewards, rows, mean, groups), 0.0)
    deviation = groups.reduce(centred**2, "sum") / (count - 1).clamp(min=1)
    return centred / (deviation.sqrt() + eps)


def _mean(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, x, 0.0).sum() / rows.sum().clamp(min=1)


def _std(x: Tensor, rows: Tensor) -> Tensor:
    centred = torch.where(rows, x - _mean(x, rows), 0.0)
    return ((centred**2).sum() / (rows.sum() - 1).clamp(min=1)).sqrt()


def _fake(rewards: Tensor, **_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape[:1], dtype=torch.float32)


# An op although it has one backend: torch.compile must not trace the check of the rewards' values.
group_advantages_op = Op(
    "group_advantages",
    "(Tensor rewards, *, Tensor? group_index, Tensor? weights, Tensor? lengths, Tensor? stds, "
    "int group_size, str estimator, str scale, str nan, str singleton, float eps, float guard)"
    " -> Tensor",
    _fake,
)
group_advantages_op.register("reference", group_advantages_reference)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_index: Tensor | None = None,
    scale: str | None = None,
    estimator: str = "grpo",
    eps: float = 1e-4,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    stds: Tensor | None = None,
    guard: float | None = None,
    nan: str = "error",
    singleton: str = "zero",
) -> Tensor:
    """Advantages (N,) float32 of N completions from their rewards; no gradient.

    Args:
        rewards: (N,), or (N, R) for R reward functions, summed with `weights` first (gdpo: after
            normalising each).
        group_size: groups are consecutive runs of this many rows; N must be a multiple.
        group_index: (N,) integer naming each row's group, in any order; instead of group_size.
        scale: "group", "batch", "given" or "none": the divisor. None takes the
            estimator's usual one: "group" for grpo and gdpo, "batch" for
            reinforce_plus_plus_baseline, else "none". gdpo takes "group" (the whole formula) and
            "none" (without the last normalisation over the batch).
        estimator: one of `ESTIMATORS`. Dr. GRPO is grpo with scale "none".
        eps: added to the standard deviation (TRL: 1e-4, verl: 1e-6).
        weights: (R,) weights of the reward functions, or (N, R) where they differ from row to row
            (tasks); None is 1 each.
        lengths: (N,) tokens of each completion, for opo.
        stds: (N,) divisor of each row, for scale "given"; equal within a group.
        guard: with scale "given", a group in which an advantage would exceed this is divided by its
            own (biased) standard deviation instead (OneThinker: 5). None: no limit.
        nan: "error": a nan reward raises. "ignore": sums and statistics skip it, and a row without
            any reward gets advantage 0.
        singleton: a group of one gets advantage "zero", or with "keep" its reward (verl).

    A group whose rewards are all equal gets exactly 0. ValueError for shapes or names that do not
    fit, infinite rewards and, with nan="error", nan ones; that check waits for the device.
    """
    n = rewards.shape[0] if rewards.ndim else -1
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards must be (N,) or (N, R), got shape {tuple(rewards.shape)}")
    if (group_size is None) == (group_index is None):
        raise ValueError(
            f"give either group_size or group_index, got {group_size} and {group_index}"
        )
    if group_size is not None and (group_size < 1 or n % group_size):
        raise ValueError(f"{n} rewards do not make groups of {group_size}")
    for name, tensor, shape in (
        ("group_index", group_index, (n,)),
        ("lengths", lengths, (n,)),
        ("stds", stds, (n,)),
        ("weights", weights, rewards.shape if _is_by_row(weights) else rewards.shape[1:]),
    ):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if scale is None and estimator in DEFAULT_SCALE:
        scale = DEFAULT_SCALE[estimator]
    for name, value, known in (
        ("estimator", estimator, ESTIMATORS),
        ("scale", scale, ("group", "none") if estimator == "gdpo" else SCALES),
        ("nan", nan, ("error", "ignore")),
        ("singleton", singleton, ("zero", "keep")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    if estimator == "opo" and lengths is None:
        raise ValueError("estimator opo needs lengths")
    if (scale == "given") != (stds is not None):
        raise ValueError(f'scale "given" and stds go together, got scale {scale!r}')
    if guard is not None and not guard > 0:
        raise ValueError(f"guard must be above 0, got {guard}")
    return group_advantages_op(
        rewards.detach(),
        group_index=group_index,
        weights=weights,
        lengths=lengths,
        stds=stds,
        group_size=group_size or 0,
        estimator=estimator,
        scale=scale,
        nan=nan,
        singleton=singleton,
        eps=eps,
        guard=guard or 0.0,
    )


def _is_by_row(weights: Tensor | None) -> bool:
    return weights is not None and weights.ndim == 2
