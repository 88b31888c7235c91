"""Score completions and summarise them, a task at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from vcr1_fast.data.records import Record
from vcr1_fast.evaluate.completions import Completion, Pass
from vcr1_fast.evaluate.intervals import bootstrap_means, percentile_interval
from vcr1_fast.tasks import TASKS, Columns, Task
from vcr1_fast.tasks.base import mean_metrics, rows


@dataclass(frozen=True)
class Scored:
    """One record with the model's completion, its prediction, and its metrics."""

    record: Record
    completion: Completion
    prediction: Any
    metrics: dict[str, float]

    @property
    def parsed(self) -> bool:
        return self.prediction is not None

    def as_line(self) -> dict[str, Any]:
        """The predictions file's JSON object, without anything that depends on the machine."""
        passes = self.completion.passes
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
            **({"passes": [_untimed(one) for one in passes]} if len(passes) > 1 else {}),
        }


Measure = Callable[[Task, Sequence[Any], Sequence[Record]], Columns]
"""Metrics of a task's predictions, all of an evaluation together, so that a judge gets one batch of
requests."""


def score(
    answered: Sequence[tuple[Record, Completion]], measure: Measure = Task.measure
) -> list[Scored]:
    """Parse and score completions by their tasks, in order.

    An unreadable completion has the metrics of the prediction None (zero); the summary also counts
    it as a parse failure.
    """
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, (record, _) in enumerate(answered):
        by_task[record.task].append(index)
    scored: dict[int, Scored] = {}
    for name, indices in by_task.items():
        task, pairs = TASKS[name], [answered[index] for index in indices]
        records = [record for record, _ in pairs]
        predictions = [task.parse(completion.text, record) for record, completion in pairs]
        measured = rows(measure(task, predictions, records), len(records))
        for index, prediction, metrics in zip(indices, predictions, measured, strict=True):
            scored[index] = Scored(*answered[index], prediction, metrics)
    return [scored[index] for index in range(len(answered))]


@dataclass(frozen=True)
class Part:
    """Scores of the records of one kind, e.g. of one type of question."""

    n: int
    metrics: dict[str, float]
    interval: tuple[float, float]
    """Of the primary metric."""


@dataclass(frozen=True)
class TaskSummary:
    """Scores of one task. Every rate is over `n`, parse failures included, quarantined excluded."""

    task: str
    n: int
    primary: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Bootstrap interval of each metric, resampled by video."""
    parse_failures: int
    parse_failure_rate: float
    unfinished: int
    """Completions cut at the token limit."""
    mean_tokens: float
    floor: dict[str, float]
    """Metrics of the blind baseline: the best answer that ignores the video."""
    floor_strategy: str
    floor_fitted_on: str
    """"train", or "evaluated" without training records, which can only raise the baseline."""
    breakdown: dict[str, dict[str, Part]]
    """Metadata field -> its value -> scores of those records."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: coverage, number of resamples, seed."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0


def summarise(
    scored: Sequence[Scored],
    *,
    train_records: Sequence[Record] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    breakdown: Sequence[str] = (),
) -> list[TaskSummary]:
    """Summaries in the order in which tasks first appear.

    The blind baseline of a task is fitted on its `train_records`, else on the evaluated records.
    `breakdown` names metadata fields; those that no record of a task has are left out.
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
        strategy, baseline = task.blind_baseline(fitted_on, records)
        failures = sum(not item.parsed for item in items)
        metrics, intervals = means_and_intervals(items, bootstrap)
        summaries.append(
            TaskSummary(
                task=name,
                n=len(items),
                primary=task.primary,
                metrics=metrics,
                intervals=intervals,
                parse_failures=failures,
                parse_failure_rate=failures / len(items),
                unfinished=sum(not item.completion.finished for item in items),
                mean_tokens=float(np.mean([item.completion.tokens for item in items])),
                floor=with_f1(baseline),
                floor_strategy=strategy,
                floor_fitted_on="train" if train_by_task[name] else "evaluated",
                breakdown={
                    field: parts
                    for field in breakdown
                    if (parts := _parts(items, field, task.primary, bootstrap))
                },
            )
        )
    return summaries


def means_and_intervals(
    items: Sequence[Scored], bootstrap: Bootstrap
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Mean of each metric, and its interval; questions about one video are resampled together."""
    names = list(items[0].metrics)
    values = {name: [item.metrics[name] for item in items] for name in names}
    means = with_f1(mean_metrics(values))
    resampled = bootstrap_means(
        np.array(list(values.values())).T,
        groups=[item.record.media for item in items],
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
    )
    columns = with_f1(dict(zip(names, resampled.T, strict=True)))
    intervals = {name: percentile_interval(columns[name], bootstrap.level) for name in columns}
    return means, intervals


def with_f1(means: dict[str, Any]) -> dict[str, Any]:
    """Replace F1 by the harmonic mean of mean precision and mean recall, where both are there.

    F1 of a split is not the mean of its samples' (DREAM-1k, arXiv 2407.00634). 0 where both are 0.
    """
    if not {"precision", "recall"} <= set(means):
        return means
    precision, recall = (np.asarray(means[name], np.float64) for name in ("precision", "recall"))
    whole = precision + recall
    f1 = np.divide(2 * precision * recall, whole, out=np.zeros_like(whole), where=whole > 0)
    return {**means, "F1": f1 if f1.ndim else float(f1)}


def _parts(
    items: Sequence[Scored], field: str, primary: str, bootstrap: Bootstrap
) -> dict[str, Part]:
    """Scores by the value of a metadata field, sorted; {} where no record has it."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for item in items:
        if (value := item.record.metadata.get(field)) is not None:
            groups[str(value)].append(item)
    parts = {}
    for value, group in sorted(groups.items()):
        metrics, intervals = means_and_intervals(group, bootstrap)
        parts[value] = Part(len(group), metrics, intervals[primary])
    return parts


def _untimed(one: Pass) -> dict[str, Any]:
    row = asdict(one)
    del row["seconds"]
    return row


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
