"""`vcr1 eval`: answer and score, or score given completions, and show the scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vcr1_fast.data.video import ClipReader
from vcr1_fast.evaluate.config import EvalConfig, EvalRun
from vcr1_fast.evaluate.run import Evaluation, evaluate_checkpoint, evaluate_predictions
from vcr1_fast.files import rename_flushed
from vcr1_fast.report.rollouts import write_predictions_html
from vcr1_fast.report.scores import write_scores
from vcr1_fast.report.table import print_table, summary_tables
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import prompts_from


def main_eval(run: EvalRun) -> int:
    """Evaluate, print the tables and the quarantined records, draw. Exit status: 1 when nothing
    could be scored."""
    run = replace(run, eval=launched(run.eval, os.environ))
    # Loaded once, for the page as well: the file may have changed when a long evaluation is done.
    prompts = run.eval.prompts if run.predictions is None else None
    with prompts_from(prompts, TASKS, think=run.eval.think):
        return _evaluate(run)


def _evaluate(run: EvalRun) -> int:
    evaluation: Evaluation | None
    if run.predictions is not None:
        evaluation = evaluate_predictions(run.predictions, run.records, run.output, run.eval)
    else:
        assert run.model is not None  # EvalRun holds one of the two
        evaluation = evaluate_checkpoint(run.model, run.records, run.output, run.eval)
    if evaluation is None:
        index, count = run.eval.shard_index, run.eval.shard_count
        print(f"shard {index} of {count} is done; the last one to finish writes {run.output}")
        return 0
    for table in summary_tables(evaluation.summary()):
        print_table(table)
    for note in evaluation.notes:
        print(note)
    for item in evaluation.quarantined:
        print(f"quarantined {item.record_id or item.source}: {item.reason}")
    if run.model is not None and any(item.record_id for item in evaluation.quarantined):
        print("eval.retry_failed=true asks again about those whose clip or prompt failed")
    if not evaluation.predictions:
        print("no sample could be scored")
        return 1
    print(f"wrote {', '.join(map(str, draw(evaluation, run)))}")
    return 0


def launched(config: EvalConfig, environment: Mapping[str, str]) -> EvalConfig:
    """The same settings for one process of several that torchrun or accelerate started: its rank is
    its shard, and its GPU, then the current one, is its own. ValueError where shards are configured
    too: each process would answer the same one."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        return config
    if config.shard_count > 1:
        raise ValueError(
            f"WORLD_SIZE={count} processes are shards already, got shard_count={config.shard_count}"
        )
    device = config.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{environment['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    index = int(environment["RANK"])
    return replace(config, shard_index=index, shard_count=count, device=device)


def draw(evaluation: Evaluation, run: EvalRun) -> list[Path]:
    """Pictures of a finished evaluation beside its other files; the paths of all. Two shards that
    finish together both draw: what they write is moved into place whole."""
    out = Path(run.output)
    paths = [out / name for name in ("predictions.jsonl", "summary.json", "tables.md")]
    with TemporaryDirectory(prefix=".drawn.", dir=out) as own:
        for drawn in _drawn(evaluation, run, Path(own)):
            paths.append(out / drawn.name)
            rename_flushed(drawn, paths[-1])
    return paths


def _drawn(evaluation: Evaluation, run: EvalRun, folder: Path) -> Iterator[Path]:
    try:
        yield write_scores(evaluation.summary(), folder / "scores.png")
    except ImportError as error:
        print(f"no scores.png: {error}; pip install 'vcr1_fast[report]' brings what draws it")
        return
    if run.eval.pictured:
        rows = [item.as_line() for item in evaluation.predictions]
        records = {item.record.id: item.record for item in evaluation.predictions}
        path = folder / "predictions.html"
        with ClipReader(
            backend=run.eval.decoder,
            timeout=run.eval.decode_timeout,
            workers=run.eval.decode_workers,
        ) as reader:
            yield write_predictions_html(
                rows,
                records,
                path,
                think=run.eval.think if run.predictions is None else None,
                max_examples=run.eval.pictured,
                reader=reader,
            )
