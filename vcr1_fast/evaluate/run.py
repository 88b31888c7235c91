"""Evaluation: records -> greedy completions -> scores -> predictions.jsonl, summary.json, a table.

Records are cut into batches once, and shard i of n answers batches i, i+n, i+2n, ...: batch
composition, hence rounding, does not depend on the number of shards or on interruptions. Whichever
shard finds all batches answered writes the merged files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vcr1_fast.data.quarantine import Quarantine, QuarantineItem
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.evaluate.completions import (
    Completion,
    append_completions,
    given_completions,
    load_completions,
    merge_shards,
    shard_path,
)
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.cost import PassCost, pass_costs
from vcr1_fast.evaluate.identity import claim_folder, given_identity, run_identity
from vcr1_fast.evaluate.published import Published, published_beside
from vcr1_fast.evaluate.results import write_results
from vcr1_fast.evaluate.score import Bootstrap, Scored, TaskSummary, score, summarise
from vcr1_fast.model.judge import open_judge
from vcr1_fast.progress import Progress
from vcr1_fast.rewards.caption import Judge
from vcr1_fast.rewards.judge import ModelJudge
from vcr1_fast.tasks import TASKS

Answer = Callable[[Sequence[Sequence[Record]]], Iterator[list[Completion]]]
"""Batches of records in, one list of completions a batch out, in order."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a finished evaluation. Quarantined samples are in no score."""

    predictions: list[Scored]
    tasks: list[TaskSummary]
    quarantined: list[QuarantineItem]
    cost: list[PassCost] = field(default_factory=list)
    published: dict[str, Published] = field(default_factory=dict)
    """By task, where the records are a published split."""
    notes: list[str] = field(default_factory=list)
    level: float = 0.95
    """Coverage of the intervals."""

    def summary(self) -> dict[str, Any]:
        """JSON form; but for the seconds in `cost` nothing in it depends on the machine."""
        return {
            "level": self.level,
            "tasks": {summary.task: asdict(summary) for summary in self.tasks},
            "quarantined": [asdict(item) for item in self.quarantined],
            "cost": [asdict(cost) for cost in self.cost],
            "published": {task: split.as_json() for task, split in self.published.items()},
            "notes": self.notes,
        }


def evaluate(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    config: EvalConfig | None = None,
    *,
    train_records: Sequence[Record] | None = None,
    answer: Answer | None = None,
) -> Evaluation:
    """Answer and score all `records` in memory, e.g. for validation inside training.

    `answer` replaces the model (then unused) by another source of completions.
    """
    config = config or EvalConfig()
    _check_ids(records)
    _check_scoring(records, config)
    if answer is None:
        answer = _model_answers(model, processor, config)
    batches = answer(cut_batches(records, config.batch_size))
    completions = [completion for batch in batches for completion in batch]
    return score_all(records, completions, config, train_records=train_records)


def evaluate_checkpoint(
    model_path: str | Path,
    records_path: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
) -> Evaluation | None:
    """Evaluate a checkpoint folder on a records file, resuming what `out_dir` already holds.

    Writes completions.<i>-of-<n>.jsonl while running; when all shards are done predictions.jsonl,
    summary.json and quarantine.jsonl. The model is loaded only when something is left to answer.
    Returns None when other shards still have work. Raises ValueError when `out_dir` holds another
    evaluation (another checkpoint, records file or setting), naming the difference.
    """
    config = config or EvalConfig()
    records, train_records, bad_rows = _load(records_path, config)
    identity = run_identity(model_path, records_path, config)
    claim_folder(out_dir, identity, restart=config.restart)

    answer = load_answers(model_path, config)
    completions = answer_shard(answer, records, out_dir, config)
    if completions is None:
        return None
    evaluation = score_all(
        records, completions, config, train_records=train_records, bad_rows=bad_rows
    )
    write_results(out_dir, evaluation, identity)
    return evaluation


def evaluate_predictions(
    predictions_path: str | Path,
    records_path: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
) -> Evaluation:
    """Score a file of completions made elsewhere (see `given_completions`) on a records file, and
    write the same result files. No model and no video is read. ValueError as there, and as in
    `evaluate_checkpoint`."""
    config = config or EvalConfig()
    records, train_records, bad_rows = _load(records_path, config)
    ids = [record.id for record in records]
    refused = any(item.record_id for item in bad_rows)
    others = config.tasks is not None or refused
    completions = given_completions(predictions_path, ids, others=others)
    identity = given_identity(predictions_path, records_path, config)
    claim_folder(out_dir, identity, restart=config.restart)
    evaluation = score_all(
        records, completions, config, train_records=train_records, bad_rows=bad_rows
    )
    write_results(out_dir, evaluation, identity)
    return evaluation


def load_answers(model_path: str | Path, config: EvalConfig) -> Answer:
    """Answers of a checkpoint, which is loaded when the first batch is asked for."""

    def answer(batches: Sequence[Sequence[Record]]) -> Iterator[list[Completion]]:
        from vcr1_fast.engines.open import open_sampler  # as in _model_answers
        from vcr1_fast.model import checkpoint

        dtype, device = config.placement()
        model, processor = checkpoint.load(
            model_path,
            dtype=dtype,
            device=device,
            mrope=config.mrope,
            video_text=config.video_text,
        )
        model.eval()
        with open_sampler(
            config,
            model_path,
            model,
            processor,
            temperature=0.0,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        ) as sampler:
            sampler.sync(checkpoint.policy_weights(model), 0)
            yield from _model_answers(model, processor, config, sampler)(batches)

    return answer


def cut_batches(records: Sequence[Record], batch_size: int) -> list[Sequence[Record]]:
    """Consecutive batches; the last may be shorter."""
    return [records[first : first + batch_size] for first in range(0, len(records), batch_size)]


def answer_shard(
    answer: Answer, records: Sequence[Record], out_dir: str | Path, config: EvalConfig
) -> list[Completion] | None:
    """Answer what this shard still lacks, appending a batch at a time.

    Returns all completions in record order when every shard is done, else None.
    """
    _check_ids(records)
    path = shard_path(out_dir, config.shard_index, config.shard_count)
    done = load_completions(path, repair=True)
    mine = cut_batches(records, config.batch_size)[config.shard_index :: config.shard_count]
    if config.retry_failed:
        done = {name: completion for name, completion in done.items() if completion.error is None}
    # A batch of which one record is missing is answered whole again: see the module docstring.
    pending = [batch for batch in mine if any(record.id not in done for record in batch)]
    if pending:
        shard = f", shard {config.shard_index} of {config.shard_count}"
        label = f"evaluate{shard if config.shard_count > 1 else ''}"
        with Progress(sum(map(len, pending)), label) as progress:
            for completions in answer(pending):
                append_completions(path, completions)
                progress.advance(len(completions))
    return merge_shards(out_dir, config.shard_count, [record.id for record in records])


def score_all(
    records: Sequence[Record],
    completions: Sequence[Completion],
    config: EvalConfig,
    *,
    train_records: Sequence[Record] | None = None,
    bad_rows: Sequence[QuarantineItem] = (),
) -> Evaluation:
    """Score completions (parallel to `records`); one with an error is quarantined instead."""
    answered = []
    quarantined = list(bad_rows)
    for record, completion in zip(records, completions, strict=True):
        if completion.id != record.id:
            raise ValueError(f"completion of {completion.id!r} at the place of {record.id!r}")
        if completion.error is None:
            answered.append((record, completion))
        else:
            quarantined.append(QuarantineItem(record.id, record.media, completion.error))
    judge = open_judge(config.judge, config.placement()[1])
    scored = score(answered, lambda task, *batch: task.measure(*batch, judge))
    tasks = summarise(
        scored,
        train_records=train_records,
        bootstrap=Bootstrap(config.level, config.resamples, config.seed),
        breakdown=config.breakdown,
    )
    failed = {completion.id for completion in completions if completion.error is not None}
    published, notes = published_beside(records, config.benchmark, unanswered=failed)
    notes += _judge_notes(judge, tasks)
    costs = pass_costs(completions)
    return Evaluation(scored, tasks, quarantined, costs, published, notes, config.level)


def _load(
    records_path: str | Path, config: EvalConfig
) -> tuple[list[Record], list[Record] | None, list[QuarantineItem]]:
    """Records to evaluate, records to fit blind baselines on, and rows that cannot be used."""
    bad_rows = Quarantine(None)
    records = load_records(
        records_path,
        media_root=config.media_root,
        inside_root=config.inside_root,
        tasks=config.tasks,
        on_error="quarantine",
        quarantine=bad_rows,
        columns=config.columns,
    )
    train_records = None
    if config.train_records is not None:
        train_records = load_records(
            config.train_records, tasks=config.tasks, columns=config.columns
        )
    _check_scoring(records, config)
    return records, train_records, bad_rows.items


def _check_scoring(records: Sequence[Record], config: EvalConfig) -> None:
    """A wrong benchmark, or a judge without its key, is an error now and not after hours."""
    published_beside(records, config.benchmark)
    open_judge(config.judge)


def _judge_notes(judge: Judge, tasks: Sequence[TaskSummary]) -> list[str]:
    """Note that a model judged the scores, but not the blind baseline, which must cost nothing."""
    judged = [summary.task for summary in tasks if TASKS[summary.task].judged is not None]
    if not judged or not isinstance(judge, ModelJudge):
        return []
    note = f"{', '.join(judged)}: judged by a model, the blind baseline by matching words"
    return [f"{note}; {judge.unreadable} replies were neither yes nor no and count as no"]


def _model_answers(model: Any, processor: Any, config: EvalConfig, sampler: Any = None) -> Answer:
    # Imported here: scoring an already answered run needs no decoder and no model code.
    from vcr1_fast.evaluate.greedy import greedy_answers

    return greedy_answers(model, processor, config, sampler)


def _check_ids(records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"record id {record.id!r} occurs twice")
        seen.add(record.id)
