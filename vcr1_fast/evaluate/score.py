"""Score completions and summarise them, a task at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from vcr1_fast.data.records import Record
from vcr1_fast.evaluate.completions import Completion
from vcr1_fast.evaluate.intervals import bootstrap_interval
from vcr1_fast.tasks import TASKS, mean_metrics


@dataclass(frozen=True)
class Scored:
    """One record with the model's completion, what was parsed from it, and its metrics."""

    record: Record
    completion: Completion
    prediction: Any
    metrics: dict[str, float]

    @property
    def parsed(self) -> bool:
        return self.prediction is not None

    def as_line(self) -> dict[str, Any]:
        """The predictions file's JSON object."""
        return {
            "id": self.record.id,
            "task": self.record.task,
            "completion": self.completion.text,
            "tokens": self.completion.tokens,
            "finished": self.completion.finished,
            "parsed": self.parsed,
            "prediction": _plain(self.prediction),
            "answer": _plain(self.record.answer),
            "metrics": self.metrics,
        }


def score(record: Record, completion: Completion) -> Scored:
    """Parse and score one completion by its task. An unparsable one scores as the task's
    `metrics(None, record)` says (zero), and is counted apart in the summary."""
    task = TASKS[record.task]
    prediction = task.parse(completion.text, record)
    return Scored(record, completion, prediction, task.metrics(prediction, record))


@dataclass(frozen=True)
class TaskSummary:
    """Scores of one task. Every rate is over `n`, parse failures included, quarantined excluded."""

    task: str
    n: int
    primary: str
    metrics: dict[str, float]
    interval: tuple[float, float]
    """Bootstrap interval of the primary metric, resampled by video."""
    parse_failures: int
    parse_failure_rate: float
    unfinished: int
    """Completions cut at the token limit."""
    mean_tokens: float
    floor: dict[str, float]
    """Scores of the best strategy that never looks at the video."""
    floor_strategy: str
    floor_fitted_on: str
    """"train", or "evaluated" where no training records were given: then it can only be higher."""


def summarise(
    scored: Sequence[Scored],
    *,
    train_records: Sequence[Record] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[TaskSummary]:
    """Summaries in the order in which tasks first appear.

    The no-look floor of a task is fitted on its `train_records`, else on the evaluated records.
    """
    by_task: dict[str, list[Scored]] = defaultdict(list)
    for item in scored:
        by_task[item.record.task].append(item)
    train_by_task: dict[str, list[Record]] = defaultdict(list)
    for record in train_records or ():
        train_by_task[record.task].append(record)
    summaries = []
    for name, items in by_task.items():
        task = TASKS[name]
        records = [item.record for item in items]
        fitted_on = train_by_task[name] or records
        floor_strategy, floor = task.floor(fitted_on, records)
        failures = sum(not item.parsed for item in items)
        summaries.append(
            TaskSummary(
                task=name,
                n=len(items),
                primary=task.primary,
                metrics=mean_metrics(item.metrics for item in items),
                interval=bootstrap_interval(
                    [item.metrics[task.primary] for item in items],
                    groups=[record.media for record in records],
                    level=level,
                    resamples=resamples,
                    seed=seed,
                ),
                parse_failures=failures,
                parse_failure_rate=failures / len(items),
                unfinished=sum(not item.completion.finished for item in items),
                mean_tokens=float(np.mean([item.completion.tokens for item in items])),
                floor=floor,
                floor_strategy=floor_strategy,
                floor_fitted_on="train" if train_by_task[name] else "evaluated",
            )
        )
    return summaries


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
