"""GRPO (DeepSeekMath) on video, as VideoChat-R1 trains: sample, score, advantage, loss, step.

What is different from the plain form, with the same gradient to rounding:
    a prompt is read once for its whole group, in the rollout and in the policy's forward pass;
    the vision tower encodes a clip once: a step where it is trained, a run where it is frozen (up
    to the size of the cache);
    what cannot move the model is not run (`update.py`);
    the reference is not there at beta 0, and is the model without its adapters under LoRA;
    rewards are worked out while the next completions are drawn and the reference runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import Rollout, SamplingConfig, rollout
from vcr1_fast.ops import group_advantages
from vcr1_fast.rewards.plugin import UserReward, load_reward
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.optim import learning_rate
from vcr1_fast.train.planner import free_unused, is_out_of_memory
from vcr1_fast.train.scoring import Scoring
from vcr1_fast.train.setup import Run, open_run
from vcr1_fast.train.shuffle import shuffled_features
from vcr1_fast.train.step import (
    PolicyGroup,
    Scored,
    reward_matrix,
    task_metrics,
    weight_matrix,
)
from vcr1_fast.train.update import update, with_reference


def train(config: TrainConfig) -> Path:
    """Run or resume GRPO; the folder of the trained model.

    Everything it writes lies in `config.run.output`. ValueError (ConfigError, CheckpointError,
    RecordError among them) names the setting or the file at fault.
    """
    functions = [load_reward(spec, config.rewards.timeout) for spec in config.rewards.functions]
    with (
        open_run(config, reference=config.loss.beta != 0) as run,
        open_scoring(run, functions) as scoring,
    ):
        for step, samples in enumerate(run.batches(), start=run.done):
            watch = Stopwatch()
            watch.seconds["decode"] = run.source.take_seconds()
            drawn: list[Rollout] = []
            for part, completions, shuffled in sample_completions(run, samples, step, watch):
                drawn += completions
                with watch.stage("reward"):  # which some kinds wait for there
                    scoring.submit(part, completions, shuffled)
            groups = make_groups(samples, drawn)
            if config.loss.beta != 0:
                with watch.stage("reference"):
                    groups = with_reference(run, groups)
            with watch.stage("reward"):
                scored = scoring.results()
                everyone: list[Scored] = gather_object(scored)
                advantages = own_advantages(run, scored, everyone)
                groups = with_advantages(groups, advantages)
            with watch.stage("policy"):
                metrics = update(run, groups, learning_rate(step, config.optim))
            metrics["quarantined"] = run.missing(samples)
            metrics |= scoring.take_metrics()
            log_step(run, step + 1, everyone, metrics, watch)
            if config.run.log_rollouts_every and step % config.run.log_rollouts_every == 0:
                log_rollouts(run, step + 1, samples, drawn, scored, advantages)
            run.finish_step(step + 1)
        return run.export()


def open_scoring(run: Run, functions: Sequence[UserReward]) -> Scoring:
    """What turns completions into rewards."""
    tasks = [record.task for record in run.source.records]
    return Scoring(run.config, functions, tasks, run.accelerator.device)


def sample_completions(
    run: Run, samples: list[Sample], step: int, watch: Stopwatch
) -> Iterator[tuple[Sequence[Sample], list[Rollout], list[Rollout | None]]]:
    """Part by part: some samples, a rollout for each, and one on its shuffled frames where T-GRPO
    compares with that; drawn from random numbers of this step and process alone."""
    settings, temporal = run.config.rollout, run.config.rewards.temporal
    seed = (run.config.run.seed * 1_000_003 + step) * run.ranks + run.rank
    generator = torch.Generator().manual_seed(seed % 2**63)
    # Numbers of its own: what is drawn from the clips as they are does not depend on the term.
    shuffler = torch.Generator().manual_seed(~seed % 2**63)
    with_graph = keeps_graph(run, samples)
    rest: Sequence[Sample] = samples
    while rest:
        lengths = [len(sample.prompt) for sample in rest[: settings.batch_prompts]]
        fitting = run.planner.prompts(
            lengths,
            settings.group_size,
            settings.max_new_tokens,
            truncated=bool(settings.top_k) or settings.top_p < 1,
        )
        part, rest = rest[:fitting], rest[fitting:]
        with watch.stage("vision"):
            vision = run.clip_features(part, with_graph=with_graph)
        with watch.stage("rollout"):
            completions = draw(run, part, vision, settings.group_size, generator)
        shuffled: list[Rollout | None] = [None] * len(part)
        if temporal.rollouts:
            with watch.stage("shuffled"):
                mixed = shuffled_features(part, vision, temporal.tasks, shuffler)
                drawn = draw(
                    run,
                    [part[i] for i in mixed],
                    list(mixed.values()),
                    temporal.rollouts,
                    shuffler,
                )
                for i, one in zip(mixed, drawn, strict=True):
                    shuffled[i] = one
        yield part, completions, shuffled


def draw(
    run: Run,
    samples: Sequence[Sample],
    vision: Sequence[torch.Tensor | None],
    count: int,
    generator: torch.Generator,
) -> list[Rollout]:
    """`count` completions of each sample's prompt, its clips having the features `vision`. Where
    memory runs out all the same, the same completions are drawn for one half after the other."""
    if not samples:
        return []
    settings = run.config.rollout
    chance = generator.get_state()
    try:
        together = rollout(
            run.model,
            run.processor,
            [sample.prompt for sample in samples],
            count,
            SamplingConfig(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_new_tokens=settings.max_new_tokens,
                stop=settings.stop,
                decoding=settings.decoding,
            ),
            generator,
            convention=run.config.model.mrope,
            vision=vision,
        )
        return [one_prompt(together, i) for i in range(len(samples))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(samples) == 1:
            raise
    # Outside the handler, whose traceback holds the tensors of the rollout.
    free_unused()
    run.planner.tell(f"out of memory with rollouts of {len(samples)} prompts: going on by halves")
    generator.set_state(chance)
    half = len(samples) // 2
    first = draw(run, samples[:half], vision[:half], count, generator)
    return first + draw(run, samples[half:], vision[half:], count, generator)


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


def own_advantages(run: Run, scored: list[Scored], everyone: list[Scored]) -> torch.Tensor:
    """(N,) advantages of this process's completions. They are computed over those of all, since
    some estimators normalise over the batch."""
    settings = run.config.advantage
    if not everyone:
        return torch.zeros(0)
    scale, stds = settings.scale, None
    if scale == "task_ema":
        # Every process sees all completions, so all of them keep the same moments.
        run.scales.update((one.task, one.total) for one in everyone)
        stds = torch.tensor([run.scales.std(one.task) for one in everyone], dtype=torch.float64)
        scale = "given"
    advantages = group_advantages(
        reward_matrix(everyone),
        run.config.rollout.group_size,
        scale=scale,
        estimator=settings.estimator,
        eps=settings.eps,
        weights=weight_matrix(everyone),
        lengths=torch.tensor([one.length for one in everyone]),
        stds=stds,
        guard=settings.ema_guard if stds is not None else None,
        nan="ignore",
    )
    counts = gather_object([len(scored)])
    first = sum(counts[: run.rank])
    return advantages[first : first + len(scored)]


def make_groups(samples: list[Sample], drawn: list[Rollout]) -> list[PolicyGroup]:
    """What the policy is trained on, with advantages of 0 until they are known."""
    return [
        PolicyGroup(
            Group(sample.prompt, one.tokens[0], one.vision[0]),
            torch.zeros(len(one.tokens[0])),
            torch.cat(one.full_logps[0]),
        )
        for sample, one in zip(samples, drawn, strict=True)
    ]


def with_advantages(groups: list[PolicyGroup], advantages: torch.Tensor) -> list[PolicyGroup]:
    """The groups with advantages (N,), groups in order."""
    parts = advantages.split([len(one.lengths) for one in groups])
    return [replace(one, advantages=part) for one, part in zip(groups, parts, strict=True)]


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
            "reward": scored[i * size + j].total,
            "advantage": float(advantages[i * size + j]),
            "tokens": len(one.tokens[0][j]),
            "finished": one.finished[0][j],
        }
        for i, (sample, one) in enumerate(zip(samples, drawn, strict=True))
        for j in range(size)
    ]
    run.log.rollouts(gather_object(rows))
