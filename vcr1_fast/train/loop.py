"""GRPO (DeepSeekMath) on video, as VideoChat-R1 trains: sample, score, advantage, loss, step.

What is different from the plain form, with the same gradient to rounding:
    a prompt is read once for its whole group, in the rollout and in the policy's forward pass;
    the vision tower encodes a clip once: a step where it is trained, a run where it is frozen (up
    to the size of the cache);
    what cannot move the model is not run (`update.py`);
    the reference is not there at beta 0, and is the model without its adapters under LoRA.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import Rollout, SamplingConfig, rollout
from vcr1_fast.ops import group_advantages
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.optim import learning_rate
from vcr1_fast.train.setup import Run, open_run
from vcr1_fast.train.step import (
    PolicyGroup,
    Scored,
    chunks,
    reward_matrix,
    score,
    task_metrics,
)
from vcr1_fast.train.update import update, with_reference


def train(config: TrainConfig) -> Path:
    """Run or resume GRPO; the folder of the trained model.

    Everything it writes lies in `config.run.output`. ValueError (ConfigError, CheckpointError,
    RecordError among them) names the setting or the file at fault.
    """
    with open_run(config, reference=config.loss.beta != 0) as run:
        for step, samples in enumerate(run.batches(), start=run.done):
            watch = Stopwatch()
            watch.seconds["decode"] = run.source.take_seconds()
            drawn = sample_completions(run, samples, step, watch)
            with watch.stage("reward"):
                scored = score_completions(run, samples, drawn)
                everyone: list[Scored] = gather_object(scored)
                advantages = own_advantages(run, scored, everyone)
            groups = make_groups(samples, drawn, advantages)
            if config.loss.beta != 0:
                with watch.stage("reference"):
                    groups = with_reference(run, groups)
            with watch.stage("policy"):
                metrics = update(run, groups, learning_rate(step, config.optim))
            metrics["quarantined"] = run.missing(samples)
            log_step(run, step + 1, everyone, metrics, watch)
            if config.run.log_rollouts_every and step % config.run.log_rollouts_every == 0:
                log_rollouts(run, step + 1, samples, drawn, scored, advantages)
            run.finish_step(step + 1)
        return run.export()


def sample_completions(
    run: Run, samples: list[Sample], step: int, watch: Stopwatch
) -> list[Rollout]:
    """A rollout for each sample, drawn from random numbers of this step and process alone."""
    settings = run.config.rollout
    sampling = SamplingConfig(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        decoding=settings.decoding,
    )
    seed = (run.config.run.seed * 1_000_003 + step) * run.ranks + run.rank
    generator = torch.Generator().manual_seed(seed % 2**63)
    with_graph = keeps_graph(run, samples)
    drawn = []
    for part in chunks(samples, settings.batch_prompts):
        prompts = [sample.prompt for sample in part]
        with watch.stage("vision"):
            vision = run.clip_features(part, with_graph=with_graph)
        with watch.stage("rollout"):
            together = rollout(
                run.model,
                run.processor,
                prompts,
                settings.group_size,
                sampling,
                generator,
                convention=run.config.model.mrope,
                vision=vision,
            )
        drawn += [one_prompt(together, i) for i in range(len(part))]
    return drawn


def keeps_graph(run: Run, samples: list[Sample]) -> bool:
    """Whether the tower's pass for the rollout serves the update too: if it is trained, the update
    is the step's only one, and there is room for all clips' activations in half the memory."""
    optim = run.config.optim
    if run.vision_is_frozen or optim.inner_steps > 1:
        return False
    patches = sum(sample.prompt.patches for sample in samples)
    return run.planner.footprint.per_patch * patches <= run.planner.room() / 2


def one_prompt(together: Rollout, i: int) -> Rollout:
    """The i-th prompt's part of a rollout."""
    fields = ("tokens", "logps", "full_logps", "texts", "finished", "vision")
    return replace(together, **{name: [getattr(together, name)[i]] for name in fields})


def score_completions(run: Run, samples: list[Sample], drawn: list[Rollout]) -> list[Scored]:
    """Rewards of all completions, groups in order."""
    think = run.config.data.think
    return [
        score(sample, text, len(tokens), finished, think)
        for sample, one in zip(samples, drawn, strict=True)
        for text, tokens, finished in zip(one.texts[0], one.tokens[0], one.finished[0], strict=True)
    ]


def own_advantages(run: Run, scored: list[Scored], everyone: list[Scored]) -> torch.Tensor:
    """(N,) advantages of this process's completions. They are computed over those of all, since
    some estimators normalise over the batch."""
    settings = run.config.advantage
    if not everyone:
        return torch.zeros(0)
    advantages = group_advantages(
        reward_matrix(everyone),
        run.config.rollout.group_size,
        scale=settings.scale,
        estimator=settings.estimator,
        eps=settings.eps,
        lengths=torch.tensor([one.length for one in everyone]),
        nan="ignore",
    )
    counts = gather_object([len(scored)])
    first = sum(counts[: run.rank])
    return advantages[first : first + len(scored)]


def make_groups(
    samples: list[Sample], drawn: list[Rollout], advantages: torch.Tensor
) -> list[PolicyGroup]:
    """What the policy is trained on."""
    size = len(advantages) // max(len(samples), 1)
    return [
        PolicyGroup(
            Group(sample.prompt, one.tokens[0], one.vision[0]),
            advantages[i * size : (i + 1) * size],
            torch.cat(one.full_logps[0]),
        )
        for i, (sample, one) in enumerate(zip(samples, drawn, strict=True))
    ]


def log_step(
    run: Run, step: int, everyone: list[Scored], metrics: dict[str, float], watch: Stopwatch
) -> None:
    """One row of metrics.jsonl."""
    seconds, drawn = sum(watch.seconds.values()), sum(one.length for one in everyone)
    renamed = {"clip_region": "clip_fraction"}
    run.log.step(
        {
            "step": step,
            **task_metrics(everyone),
            **{renamed.get(name, name): value for name, value in metrics.items()},
            "tokens_per_second": drawn / max(seconds, 1e-9),
            "tokens_per_second/rollout": drawn / max(watch.seconds.get("rollout", 0.0), 1e-9),
            **{f"seconds/{name}": value for name, value in watch.seconds.items()},
        }
    )


def log_rollouts(
    run: Run,
    step: int,
    samples: list[Sample],
    drawn: list[Rollout],
    scored: list[Scored],
    advantages: torch.Tensor,
) -> None:
    """One row of rollouts.jsonl a completion."""
    size = run.config.rollout.group_size
    rows = [
        {
            "step": step,
            "task": sample.record.task,
            "id": sample.record.id,
            "prompt": TASKS[sample.record.task].prompt(sample.record, run.config.data.think),
            "target": sample.record.answer,
            "completion": one.texts[0][j],
            "rewards": scored[i * size + j].rewards,
            "advantage": float(advantages[i * size + j]),
            "tokens": len(one.tokens[0][j]),
            "finished": one.finished[0][j],
        }
        for i, (sample, one) in enumerate(zip(samples, drawn, strict=True))
        for j in range(size)
    ]
    run.log.rollouts(gather_object(rows))
