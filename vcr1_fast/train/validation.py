"""Evaluation while training: greedy answers on other records, the best model, early stopping.

Training does not notice: random states are restored, so a run with evaluations takes the same steps
bit for bit as one without.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object

from vcr1_fast.config.sections import ReadingConfig
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.greedy import greedy_answers
from vcr1_fast.evaluate.run import cut_batches
from vcr1_fast.evaluate.score import score
from vcr1_fast.files import write_atomic
from vcr1_fast.model.checkpoint import save
from vcr1_fast.tasks import TASKS
from vcr1_fast.train import as_trained
from vcr1_fast.train.checkpoint import random_state, set_random_state
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.planner import free_unused, is_out_of_memory

if TYPE_CHECKING:
    from vcr1_fast.evaluate.completions import Completion
    from vcr1_fast.train.setup import Run

SCORE = "val/score"
"""Mean over the tasks of each task's metric to watch."""
BEST, BEST_FILE = "best", "best.json"
"""The best model's folder in the run's, and the file that says which step it is of."""


@dataclass(frozen=True)
class Best:
    """The evaluation with the highest value of `metric`. At step 0 it is the untrained model's."""

    metric: str
    step: int
    value: float


class Validation:
    """The records of `data.val` and the best evaluation on them so far.

    ValueError, naming the file, for one without a usable record. `notes`: lines about the records.
    """

    def __init__(self, config: TrainConfig, path: str, done: int) -> None:
        self.config = config
        self.records, self.notes = validation_records(config, path)
        self.best = read_best(Path(config.run.output), config.run.keep_best, done)

    def is_due(self, step: int) -> bool:
        """Whether the model is evaluated after `step` steps."""
        return step % self.config.run.eval_every == 0 or step == self.config.optim.steps

    def stale(self, step: int) -> int:
        """Evaluations since the best one. A function of steps: a resumed run counts the same."""
        every = self.config.run.eval_every
        # The best may be of a step after the checkpoint that a killed run resumed from.
        return 0 if self.best is None else max(0, step // every - self.best.step // every)

    def gives_up(self, step: int) -> bool:
        """Whether `run.patience` evaluations have brought no better value."""
        patience = self.config.run.patience
        return bool(patience) and self.stale(step) >= patience

    def evaluate(self, run: Run) -> dict[str, float]:
        """Metrics on the records, the same on every rank; {} where a signal's grace ran out."""
        began, state = time.perf_counter(), random_state()
        run.model.eval()
        try:
            completions = self._answers(run)
        finally:
            run.model.train()
            set_random_state(state)
            free_unused()  # the planner counts what is free
        if completions is None:
            return {}
        metrics = validation_metrics(self.records, completions)
        return {**metrics, "seconds/validation": time.perf_counter() - began}

    def keep_best(self, run: Run, step: int, metrics: dict[str, float]) -> None:
        """Write the model to `best` where `run.keep_best` is higher than ever before. ValueError,
        listing the metrics, for one that there is not."""
        name = self.config.run.keep_best
        if name is None or not metrics:
            return
        if name not in metrics:
            known = ", ".join(one for one in metrics if one.startswith("val/"))
            raise ValueError(f"run.keep_best: no metric {name!r} in this data, there are {known}")
        value, best = metrics[name], self.best
        # A run resumed before its best step comes to it again, with the same value.
        again = best is not None and best.step == step
        if not (math.isfinite(value) and (best is None or again or value > best.value)):
            return
        self.best = Best(name, step, value)
        output = Path(self.config.run.output)
        if run.rank == 0:
            if not step:  # the untrained model is where it was; this one is of an earlier run
                shutil.rmtree(output / BEST, ignore_errors=True)
            else:
                others = as_trained.files(self.config, run.identity, step)
                save(run.model, run.processor, output / BEST, others=others)
                run.log.message(f"step {step}: best {name} so far, {value:.4g}: {output / BEST}")
            write_atomic(output / BEST_FILE, json.dumps(asdict(self.best)) + "\n")
        run.accelerator.wait_for_everyone()

    def _answers(self, run: Run) -> list[Completion] | None:
        """A completion a record, in order; None where a signal's grace ran out."""
        size = self.config.rollout.batch_prompts
        while True:
            try:
                return self._answers_by(run, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size == 1 or run.ranks > 1:
                    raise
            free_unused()
            size = max(1, size // 2)
            run.planner.log(f"out of memory while evaluating: {size} prompts at a time from here")

    def _answers_by(self, run: Run, size: int) -> list[Completion] | None:
        batches = cut_batches(self.records, size)
        answer = greedy_answers(run.model, run.processor, evaluation_settings(self.config))
        own: list[list[Completion]] = []
        for completions in answer(batches[run.rank :: run.ranks]):
            own.append(completions)
            # Several ranks finish: one that left would leave the others waiting.
            if run.ranks == 1 and run.stop.is_overdue:
                run.log.message("evaluation given up: a signal asked the run to stop")
                return None
        by_id = {one.id: one for batch in gather_object(own) for one in batch}
        return [by_id[record.id] for record in self.records]


def validation_records(config: TrainConfig, path: str) -> tuple[list[Record], list[str]]:
    """At most `run.eval_records` of the records of a file, at even distances, and lines about
    them. ValueError for a file without a usable record, or with one id twice."""
    data, bad = config.data, Quarantine(None)
    records = load_records(
        path,
        media_root=data.media_root,
        inside_root=data.inside_root,
        tasks=data.tasks,
        on_error="quarantine",
        quarantine=bad,
        columns=data.columns,
    )
    if not records:
        raise ValueError(f"data.val: {path} has no usable record, {len(bad)} refused")
    if len({record.id for record in records}) < len(records):
        raise ValueError(f"data.val: {path} has two records with one id")
    count = min(config.run.eval_records, len(records))
    chosen = np.linspace(0, len(records) - 1, count).round().astype(int)
    refused = f", {len(bad)} rows refused" if len(bad) else ""
    note = (
        f"evaluation: {count} of {len(records)} records of {path}{refused}, "
        f"every {config.run.eval_every} steps"
    )
    return [records[i] for i in chosen], [note]


def evaluation_settings(config: TrainConfig) -> EvalConfig:
    """The run's own frames and prompts, decoded greedily."""
    shared = {one.name: getattr(config.data, one.name) for one in fields(ReadingConfig)}
    shared |= {"prompts": None}  # the run has its templates in place already
    return EvalConfig(
        **shared,
        mrope=config.model.mrope,
        video_text=config.model.video_text,
        max_new_tokens=config.rollout.max_new_tokens,
        batch_size=config.rollout.batch_prompts,
    )


def validation_metrics(
    records: Sequence[Record], completions: Sequence[Completion]
) -> dict[str, float]:
    """Means by name, `val/<task>/<metric>` and `val/score`. Records that could not be shown are in
    no mean; `val/unanswered` counts them."""
    pairs = list(zip(records, completions, strict=True))
    scored = score([pair for pair in pairs if pair[1].error is None])
    by_task: dict[str, list[dict[str, float]]] = defaultdict(list)
    for one in scored:
        metrics = {**one.metrics, "parsed": one.parsed, "finished": one.completion.finished}
        by_task[one.record.task].append(metrics)
    found = {
        f"val/{task}/{name}": fmean(one[name] for one in rows)
        for task, rows in sorted(by_task.items())
        for name in rows[0]
    }
    primary = [found[f"val/{task}/{TASKS[task].primary}"] for task in by_task]
    summary = {"val/unanswered": float(len(pairs) - len(scored))}
    return {**({SCORE: fmean(primary)} if primary else {}), **found, **summary}


def read_best(output: Path, metric: str | None, done: int) -> Best | None:
    """The best evaluation that a run's folder holds of a metric; None at the start."""
    path = output / BEST_FILE
    if metric is None or done == 0 or not path.exists():
        return None
    try:
        best = Best(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: says no best step: {error}") from None
    return best if best.metric == metric else None
