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
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"values must be a non-empty vector, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"values must be finite, got {scores[~np.isfinite(scores)][:3].tolist()}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be inside (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    sums, counts = _group_sums(scores, groups)
    rng = np.random.default_rng(seed)
    rows = max(1, _INDICES_AT_A_TIME // sums.size)
    means = []
    for first in range(0, resamples, rows):
        drawn = rng.integers(0, sums.size, size=(min(rows, resamples - first), sums.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(low), float(high)


def _group_sums(
    scores: np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each group: a mean over resampled groups is a ratio of these."""
    if groups is None:
        return scores, np.ones_like(scores)
    if len(groups) != scores.size:
        raise ValueError(f"groups has {len(groups)} labels for {scores.size} values")
    index: dict[Hashable, int] = {}
    labels = np.array([index.setdefault(group, len(index)) for group in groups])
    return np.bincount(labels, weights=scores), np.bincount(labels).astype(np.float64)
