"""Warnings about a run: skipped updates, spikes, and steps from which nothing is learned."""

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WATCHED = ("grad_norm", "kl")
SPIKE = 10.0
"""Factor over the median of recent steps from which a value is reported."""
ENTROPY_JUMP = 3.0
"""Factor over or under the median of recent steps by which entropy jumps: a policy that collapses
to one answer, or that falls apart."""
_WINDOW, _ENOUGH = 50, 10
PATIENCE = 3
"""Steps in a row after which a lasting trouble is reported, once."""
_CUT_OFF = 0.9
"""Share of completions that reach rollout.max_new_tokens from which this is a trouble."""


class Health:
    """Watches the metrics of each step. `log` receives a line for each finding."""

    def __init__(self, max_skipped_updates: int, log: Callable[[str], None]) -> None:
        self.max_skipped_updates, self.log = max_skipped_updates, log
        self._skipped_in_a_row = 0
        self._troubled: dict[str, int] = {}
        names = (*WATCHED, "entropy")
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in names}

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows of the steps before a resume, without a line: medians and counts go on
        as if the run had not stopped. Every rank does it, since all must stop at the same step."""
        log, most = self.log, self.max_skipped_updates
        self.log, self.max_skipped_updates = lambda text: None, sys.maxsize
        for row in rows:
            # Values that were not finite are null in the file.
            self.check(row["step"], {k: math.nan if v is None else v for k, v in row.items()})
        self.log, self.max_skipped_updates = log, most

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Counts for the step's row: "spikes". ValueError after more than `max_skipped_updates`
        updates skipped in a row, because loss or gradient was not finite."""
        skipped = int(metrics.get("skipped_updates", 0))
        if skipped:
            self._skipped_in_a_row += skipped
            where = "; the completions are in skipped.jsonl" if "reward" in metrics else ""
            self.log(
                f"step {step}: skipped {skipped} updates whose loss or gradient was not "
                f"finite{where}"
            )
            if self._skipped_in_a_row > self.max_skipped_updates:
                raise ValueError(
                    f"{self._skipped_in_a_row} updates in a row had no finite loss or gradient, "
                    f"more than optim.max_skipped_updates {self.max_skipped_updates}; the weights "
                    "are those before the first of them"
                )
        else:
            self._skipped_in_a_row = 0
        for trouble, text in self._troubles(metrics).items():
            if text is None:
                self._troubled.pop(trouble, None)
                continue
            self._troubled[trouble] = self._troubled.get(trouble, 0) + 1
            # Once, while it lasts: a line a step would push everything else off the screen.
            if self._troubled[trouble] == PATIENCE:
                self.log(f"step {step}: warning: in the last {PATIENCE} steps {text}")
        return {"spikes": float(sum(self._is_spike(step, name, metrics) for name in WATCHED))}

    def _troubles(self, metrics: Mapping[str, float]) -> dict[str, str | None]:
        """What keeps a step from teaching anything, by name; None: not in this step. A metric that
        the row lacks (all of them in fine-tuning) is no trouble."""
        cut_off = 1.0 - metrics.get("finished", 1.0)
        silent = metrics.get("zero_advantage_groups", 0.0) >= 1.0
        jump = self._entropy_jump(metrics.get("entropy"))
        found: dict[str, str | None] = {
            "entropy": jump,
            "gradient": f"all completions of every group had the same reward (mean "
            f"{metrics.get('reward', 0.0):.3g}), so no reward gave a gradient"
            if silent
            else None,
            "length": f"{100 * cut_off:.0f} % of the completions were cut off: raise "
            "rollout.max_new_tokens, or ask for shorter answers (data.think, data.prompts)"
            if cut_off >= _CUT_OFF
            else None,
        }
        for name, value in metrics.items():
            section, _, rest = name.partition("/")
            task, _, reward = rest.partition("/")
            if section == "reward" and reward == "format":
                found[name] = (
                    f"no completion of {task} had the tags that its prompt asks for (reward format "
                    "0): fine-tune first (vcr1 sft), or change data.think or data.prompts"
                    if value == 0
                    else None
                )
        return found

    def _entropy_jump(self, value: float | None) -> str | None:
        """Words for an entropy far from the recent ones; None for one that is near them."""
        if value is None or not math.isfinite(value) or value <= 0:
            return None
        recent = self._recent["entropy"]
        median = statistics.median(recent) if len(recent) >= _ENOUGH else value
        # A jump that lasts must not become the measure before it has been reported.
        if 1 / ENTROPY_JUMP < value / median < ENTROPY_JUMP:
            recent.append(value)
            return None
        change = "fell" if value < median else "rose"
        return (
            f"the entropy {change} to {value:.3g} from a median of {median:.3g}: completions of a "
            f"prompt are {'all alike' if value < median else 'near random'}; lower optim.lr, or "
            "raise loss.beta or loss.entropy_coef"
        )

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
