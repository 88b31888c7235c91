"""Warnings about a run's numbers: skipped updates, spikes of gradient norm and KL."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping

WATCHED = ("grad_norm", "kl")
SPIKE = 10.0
"""Factor over the median of recent steps from which a value is reported."""
_WINDOW, _ENOUGH = 50, 10


class Health:
    """Watches the metrics of each step. `log` receives a line for each finding."""

    def __init__(self, max_skipped_updates: int, log: Callable[[str], None]) -> None:
        self.max_skipped_updates, self.log = max_skipped_updates, log
        self._skipped_in_a_row = 0
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in WATCHED}

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Counts for the step's row: "spikes". ValueError after more than `max_skipped_updates`
        updates skipped in a row, because loss or gradient was not finite."""
        skipped = int(metrics.get("skipped_updates", 0))
        if skipped:
            self._skipped_in_a_row += skipped
            self.log(
                f"step {step}: skipped {skipped} updates whose loss or gradient was not finite; "
                "the completions are in skipped.jsonl"
            )
            if self._skipped_in_a_row > self.max_skipped_updates:
                raise ValueError(
                    f"{self._skipped_in_a_row} updates in a row had no finite loss or gradient, "
                    f"more than optim.max_skipped_updates {self.max_skipped_updates}; the weights "
                    "are those before the first of them"
                )
        else:
            self._skipped_in_a_row = 0
        return {"spikes": float(sum(self._is_spike(step, name, metrics) for name in WATCHED))}

    def _is_spike(self, step: int, name: str, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(name, 0.0)
        if not math.isfinite(value) or value <= 0:
            return False
        recent = self._recent[name]
        median = statistics.median(recent) if len(recent) >= _ENOUGH else math.inf
        recent.append(value)
        if value <= SPIKE * median:
            return False
        self.log(
            f"step {step}: {name} {value:.3g} is {value / median:.1f} times the median of the last "
            f"{len(recent) - 1} steps"
        )
        return True
