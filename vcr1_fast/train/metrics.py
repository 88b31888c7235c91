"""Metrics of a step: merged over micro-batches and ranks, by task, as rows of the log files."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vcr1_fast.model.rollout import Rollout
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.scoring import Scored
from vcr1_fast.train.setup import Run
from vcr1_fast.train.trackers import worst_samples


def to_numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics as floats, with one wait for the device."""
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def merge_metrics(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """One step's metrics from those of its micro-batches.

    Losses and counts ("num_") add up, "_max" and "_min" stay extremes, all others are means
    weighted by "num_tokens". A metric that some parts lack is the mean over the others.
    """
    merged: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        tokens = part.get("num_tokens", 0.0)
        for name, value in part.items():
            if name not in merged:
                merged[name], weights[name] = value, tokens
            elif name.endswith("_max"):
                merged[name] = max(merged[name], value)
            elif name.endswith("_min"):
                merged[name] = min(merged[name], value)
            elif name.startswith("num_") or name.endswith("loss"):
                merged[name] += value
            else:
                weights[name] += tokens
                share = tokens / weights[name] if weights[name] else 0.0
                merged[name] += (value - merged[name]) * share
    return merged


def reward_spread(scored: Sequence[Scored], group_size: int) -> float:
    """Standard deviation of a group's rewards, mean over the groups: 0 teaches nothing."""
    totals = [one.total for one in scored]
    groups = [totals[i : i + group_size] for i in range(0, len(totals), group_size)]
    return _mean(statistics.pstdev(group) for group in groups)


def task_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Mean reward, length and share finished over all completions and over each task's."""
    out: dict[str, float] = {}
    for name in ["", *sorted({one.task for one in scored})]:
        part = [one for one in scored if name in ("", one.task)]
        suffix = f"/{name}" if name else ""
        out[f"reward{suffix}"] = _mean(one.total for one in part)
        out[f"length{suffix}"] = _mean(float(one.length) for one in part)
        out[f"finished{suffix}"] = _mean(float(one.finished) for one in part)
        if name:
            # A user's reward may score only some of a task's completions.
            # Completions of one task may have different rewards: a user's reward may give None.
            for reward in dict.fromkeys(reward for one in part for reward in one.rewards):
                given = [one.rewards[reward] for one in part if reward in one.rewards]
                out[f"reward{suffix}/{reward}"] = _mean(given)
            for metric in part[0].metrics:
                out[f"metric{suffix}/{metric}"] = _mean(one.metrics[metric] for one in part)
    return out


def step_row(
    step: int,
    everyone: Sequence[Scored],
    metrics: Mapping[str, float],
    watch: Stopwatch,
    *,
    group_size: int,
) -> dict[str, float]:
    """The row of metrics.jsonl after `step` steps."""
    seconds, sampled = sum(watch.seconds.values()), sum(one.length for one in everyone)
    # The name of the panel in `report/curves.py`, beside clip_low, clip_high and clip_delta.
    renamed = {"clip_region": "clip_fraction"}
    return {
        "step": step,
        **task_metrics(everyone),
        "reward_spread": reward_spread(everyone, group_size),
        **{renamed.get(name, name): value for name, value in metrics.items()},
        "tokens_per_second": sampled / max(seconds, 1e-9),
        "tokens_per_second/rollout": sampled / max(watch.seconds.get("rollout", 0.0), 1e-9),
        **{f"seconds/{name}": value for name, value in watch.seconds.items()},
    }


def log_completions(
    run: Run,
    step: int,
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout],
    scored: Sequence[Scored],
    advantages: Tensor,
    *,
    skipped: bool,
) -> None:
    """Write the completions of step 0, 1, ... where they are due, or where its update was
    `skipped`; the worst of them to the trackers. All ranks call this; others as `rollout_rows`."""
    settings = run.config.run
    every, track = settings.log_rollouts_every, settings.track_samples_every
    due = skipped or bool(every and step % every == 0)
    tracked = run.log.has_trackers and bool(track and step % track == 0)
    if not (due or tracked):  # has_trackers differs by rank, so `due` alone decides to gather
        return
    think, ranks = run.config.data.think, (run.rank, run.ranks)
    rows = rollout_rows(step + 1, samples, rollouts, scored, advantages, think=think, ranks=ranks)
    if due:
        run.log.rollouts(gather_object(rows), skipped=skipped)
    if tracked:  # of this rank's prompts: pictures of the others' would have to be sent
        clips = [sample.shown for sample in samples]
        run.log.samples(step + 1, worst_samples(rows, clips))


def rollout_rows(
    step: int,
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout],
    scored: Sequence[Scored],
    advantages: Tensor,
    *,
    think: bool,
    ranks: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl, one a completion; `scored` and `advantages` (N,) in their order.
    `ranks`: (this process's number, how many there are)."""
    rows: list[dict[str, Any]] = []
    for number, (sample, one) in enumerate(zip(samples, rollouts, strict=True)):
        # The user's text: the sample's has the chat template around it.
        prompt = TASKS[sample.record.task].prompt(sample.record, think)
        for tokens, text, finished in zip(
            one.tokens[0], one.texts[0], one.finished[0], strict=True
        ):
            index = len(rows)
            rows.append(
                {
                    "step": step,
                    # Unlike the id it tells a record's groups apart, over all ranks.
                    "group": number * ranks[1] + ranks[0],
                    "task": sample.record.task,
                    "id": sample.record.id,
                    "prompt": prompt,
                    "target": sample.record.answer,
                    "completion": text,
                    "rewards": scored[index].rewards,
                    "reward": scored[index].total,
                    "advantage": float(advantages[index]),
                    "tokens": len(tokens),
                    "finished": finished,
                }
            )
    return rows


def _mean(values: Iterable[float]) -> float:
    # fsum: the mean does not depend on the order in which ranks report.
    values = list(values)
    return math.fsum(values) / max(len(values), 1)
