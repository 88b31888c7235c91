"""Completions of the next step, sampled by a server while this step updates the policy.

`rollout.ahead: 1` hides the rollout behind the update. The completions are then of the policy one
step before, which `loss.rollout_correction` weighs: their log-probs are the sampler's, and
`rollout_gap_*` measures how far the policy has moved since.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vcr1_fast.model.rollout import Rollout
from vcr1_fast.train.dataset import Sample


class Ahead:
    """The rollout in progress, and the samples that it is of. Close it before the engine."""

    def __init__(self) -> None:
        self._upcoming: Sequence[Sample] | None = None
        self._pending: Future[list[Rollout]] | None = None
        self._worker = ThreadPoolExecutor(1, "rollout")

    def batches(self, steps: Iterable[list[Sample]]) -> Iterator[list[Sample]]:
        """The samples of each step, those of the one after it known by then."""
        source = iter(steps)
        current = next(source, None)
        while current is not None:
            self._upcoming = following = next(source, None)
            yield current
            current = following

    def start(self, sample: Callable[[Sequence[Sample]], Callable[[], list[Rollout]]]) -> None:
        """Begin the next step's rollout, if there is a next step. `sample` prepares it here, where
        the policy's weights stand still, and returns what the thread does."""
        if self._upcoming:
            self._pending = self._worker.submit(sample(self._upcoming))

    def result(self) -> list[Rollout] | None:
        """The rollout that was begun for this step, waited for; None where none was. Its errors are
        raised here."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Wait for the rollout in progress and drop it."""
        self._worker.shutdown(wait=True)
