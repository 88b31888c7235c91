"""Bootstrap confidence intervals of a mean score.

Percentile bootstrap (Efron 1979): resample with replacement, take the quantiles of the resampled
means. Questions about one video are not independent, so whole groups (videos) are resampled when
`groups` is given; with one question a video this is the plain bootstrap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

# Resampled indices held at a time; bounds memory to tens of MB whatever the data set's size.
_INDICES_AT_A_TIME = 1 << 22


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    values: (n,) finite numbers, n >= 1. groups: (n,) labels resampled as wholes (default: each
    value is its own group). level: coverage in (0, 1). The same arguments give the same interval,
    bit for bit. Raises ValueError on an empty or non-finite sample or an impossible level.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"values must be a non-empty vector, got shape {scores.shape}")
    means = bootstrap_means(scores[:, None], groups=groups, resamples=resamples, seed=seed)
    return percentile_interval(means[:, 0], level)


def bootstrap_means(
    values: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Means of resamples of `values` (n, m), all m columns resampled alike: (resamples, m).

    A quantity that is made of several means (an F1 of mean precision and mean recall) has its
    interval from the rows of these. ValueError as for `bootstrap_interval`.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"values must be a non-empty matrix, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"values must be finite, got {scores[~np.isfinite(scores)][:3].tolist()}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    sums, counts = _group_sums(scores, groups)
    rng = np.random.default_rng(seed)
    size = len(counts)
    rows = max(1, _INDICES_AT_A_TIME // size)
    means = []
    for first in range(0, resamples, rows):
        sampled = rng.integers(0, size, size=(min(rows, resamples - first), size))
        totals = [column[sampled].sum(axis=1) for column in sums.T]
        means.append(np.stack(totals, axis=1) / counts[sampled].sum(axis=1)[:, None])
    return np.concatenate(means)


def percentile_interval(means: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of resampled means (resamples,) that leaves (1 - level) / 2 on either side."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be inside (0, 1), got {level}")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def _group_sums(
    scores: np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums (groups, m) and counts (groups,): a mean over resampled groups is a ratio of these."""
    if groups is None:
        return scores, np.ones(len(scores))
    if len(groups) != len(scores):
        raise ValueError(f"groups has {len(groups)} labels for {len(scores)} values")
    index: dict[Hashable, int] = {}
    labels = np.array([index.setdefault(group, len(index)) for group in groups])
    sums = [np.bincount(labels, weights=column) for column in scores.T]
    return np.stack(sums, axis=1), np.bincount(labels).astype(np.float64)
