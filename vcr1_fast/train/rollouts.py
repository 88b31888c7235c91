"""Sampling of a step's completions, planned by memory and retried on out-of-memory."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vcr1_fast.engines.parity import Forward, check_parity
from vcr1_fast.model.prompt import VIDEO
from vcr1_fast.model.rollout import Rollout, SamplingConfig
from vcr1_fast.model.vision import reorder_frames
from vcr1_fast.train.ahead import Ahead
from vcr1_fast.train.config import RolloutConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.log import Stopwatch
from vcr1_fast.train.planner import free_unused, is_out_of_memory
from vcr1_fast.train.reference import group_logps
from vcr1_fast.train.setup import Run


@dataclass(frozen=True)
class Chunk:
    """Prompts sampled together, each with its group's rollout; `shuffled`: completions on the
    clip's shuffled frames, None where T-GRPO compares nothing."""

    samples: Sequence[Sample]
    rollouts: list[Rollout]
    shuffled: list[Rollout | None]


def sample_completions(
    run: Run, samples: Sequence[Sample], step: int, watch: Stopwatch
) -> Iterator[Chunk]:
    """Sample a group of completions per prompt, chunk by chunk as memory allows.

    The random numbers depend on (run.seed, step, record, number of the completion) alone: the
    number of processes, chunking, an out-of-memory retry and the T-GRPO term change no completion.
    """
    settings, temporal = run.config.rollout, run.config.rewards.temporal
    run.gather()
    if run.ahead is not None:
        yield from sampled_ahead(run, run.ahead, samples, step, watch)
        return
    # Decided once for the step: chunks must agree, or some features would lack gradients.
    with_graph = keeps_vision_graph(run, samples)
    with watch.stage("rollout"):
        run.sampler.wake()
        run.sync_sampler(step)
        check_engine(run, samples, step)
    rest = samples
    while rest:
        run.check_overdue()
        fitting = run.planner.prompts(
            [len(sample.prompt) for sample in rest[: settings.batch_prompts]],
            settings.group_size,
            settings.max_new_tokens,
            truncated=bool(settings.top_k) or settings.top_p < 1,
        )
        part, rest = rest[:fitting], rest[fitting:]
        with watch.stage("vision"):
            vision = run.clip_features(part, with_graph=with_graph)
        with watch.stage("rollout"):
            seeds = [prompt_seed(run.config.run.seed, step, one) for one in part]
            sampled = sample_group(run, part, vision, settings.group_size, seeds)
            rollouts = with_full_logps(run, part, sampled)
        shuffled: list[Rollout | None] = [None] * len(part)
        if temporal.rollouts:
            with watch.stage("shuffled"):
                # Other seeds: completions on the clip as it is do not depend on the T-GRPO term.
                seeds = [prompt_seed(run.config.run.seed, step, one, "shuffled") for one in part]
                mixed = shuffled_features(part, vision, temporal.tasks, seeds)
                compared = sample_group(
                    run,
                    [part[i] for i in mixed],
                    list(mixed.values()),
                    temporal.rollouts,
                    [seeds[i] for i in mixed],
                )
                for i, one in zip(mixed, compared, strict=True):
                    shuffled[i] = one
        yield Chunk(part, rollouts, shuffled)
    run.sampler.sleep()


def sampled_ahead(
    run: Run, ahead: Ahead, samples: Sequence[Sample], step: int, watch: Stopwatch
) -> Iterator[Chunk]:
    """This step's completions, which the server sampled during the last update, in one chunk; then
    the next step's are begun. The first step of a run, or after a resume, samples its own."""
    settings = run.config.rollout

    def prepared(batch: Sequence[Sample], of_step: int) -> Callable[[], list[Rollout]]:
        vision = run.clip_features(batch)
        seeds = [prompt_seed(run.config.run.seed, of_step, one) for one in batch]
        return lambda: sample_group(run, batch, vision, settings.group_size, seeds)

    run.gather()
    with watch.stage("rollout"):
        rollouts = ahead.result()
        run.sync_sampler(step)
        check_engine(run, samples, step)
        if rollouts is None:
            rollouts = prepared(samples, step)()
        ahead.start(lambda batch: prepared(batch, step + 1))
    yield Chunk(samples, rollouts, [None] * len(samples))


def check_engine(run: Run, samples: Sequence[Sample], step: int) -> None:
    """ParityError where a check of the engine is due and it does not sample from the policy."""
    settings = run.config.rollout
    every = settings.checks_parity_every
    if not (every and samples and (step == run.done or step % every == 0)):
        return
    # Probes are short, and must not end before they tell anything.
    sampling = replace(
        sampling_of(settings), max_new_tokens=min(16, settings.max_new_tokens), stop=()
    )
    gap = check_parity(
        run.sampler,
        Forward(run.model, run.processor, sampling),
        [sample.prompt for sample in samples[:2]],
        limit=settings.parity_limit,
        # Changed weights at the start alone. Of several processes one may have no samples here,
        # and a sync takes all of them.
        sync=run.sync_sampler if step == run.done and run.ranks == 1 else None,
    )
    run.log.message(f"step {step}: {run.sampler.describe()} agrees with the policy, {gap}")


def sampling_of(settings: RolloutConfig) -> SamplingConfig:
    """How the run's completions are sampled."""
    return SamplingConfig(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        decoding=settings.decoding,
    )


def sample_group(
    run: Run,
    samples: Sequence[Sample],
    vision: Sequence[Tensor | None],
    count: int,
    seeds: Sequence[int],
) -> list[Rollout]:
    """`count` completions of each sample's prompt, whose clips have the features `vision`, from the
    random numbers of its seed.

    On out-of-memory, retries each half of the samples; a single prompt that does not fit raises.
    """
    if not samples:
        return []
    try:
        together = run.sampler.rollout(
            [sample.prompt for sample in samples],
            count,
            sampling_of(run.config.rollout),
            [torch.Generator().manual_seed(seed) for seed in seeds],
            vision,
        )
        return [together.part(i) for i in range(len(samples))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(samples) == 1:
            raise
    # Outside the handler: its traceback holds the tensors of the failed rollout.
    free_unused()
    run.planner.log(f"out of memory with rollouts of {len(samples)} prompts: retrying by halves")
    half = len(samples) // 2
    first = sample_group(run, samples[:half], vision[:half], count, seeds[:half])
    return first + sample_group(run, samples[half:], vision[half:], count, seeds[half:])


def prompt_seed(seed: int, step: int, sample: Sample, kind: str = "") -> int:
    """Seed of the random numbers of one prompt's completions. Not a sum: neighbouring seeds, steps
    and records must not share it."""
    name = f"{seed} {step} {sample.occurrence} {kind} {sample.record.id}"
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def with_full_logps(run: Run, samples: Sequence[Sample], rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of one prompt each, with `full_logps` of the policy where the engine left nan.

    They must be the policy's that sampled, so call it before the next optimiser step.
    """
    if not any(bool(one.isnan().any()) for each in rollouts for one in each.full_logps[0]):
        return rollouts
    groups = [
        PolicyGroup.from_rollout(sample, each)
        for sample, each in zip(samples, rollouts, strict=True)
    ]
    return [
        replace(each, full_logps=[list(logps.cpu().split(group.lengths))])
        for each, group, logps in zip(
            rollouts, groups, group_logps(run, run.model, groups), strict=True
        )
    ]


def keeps_vision_graph(run: Run, samples: Sequence[Sample]) -> bool:
    """Whether the rollout's vision pass keeps its graph for the policy update.

    It does if the encoder is trained, the first update takes all groups (later ones need features
    of the changed weights), and the activations of all clips fit in half the memory.
    """
    # A second optimiser step would need features of the changed encoder.
    if run.vision_is_frozen or run.config.optim.inner_steps > 1:
        return False
    patches = sum(sample.prompt.patches for sample in samples)
    return run.planner.footprint.per_patch * patches <= run.planner.available_bytes() / 2


def shuffled_features(
    samples: Sequence[Sample],
    features: Sequence[Tensor | None],
    tasks: Sequence[str] | None,
    seeds: Sequence[int],
) -> dict[int, Tensor]:
    """Features of clips with their temporal patches shuffled (T-GRPO), by index in `samples`,
    without a second pass of the vision encoder.

    Left out: tasks not in `tasks` (None: no task), and samples without an order to lose, whose
    clips have one temporal patch or which show still images. No clip of more than one temporal
    patch keeps its order.
    """
    found = {}
    for i, (sample, given, seed) in enumerate(zip(samples, features, seeds, strict=True)):
        grids = sample.prompt.video_grid_thw
        clips = int((sample.prompt.mm_token_type_ids == VIDEO).sum())
        if given is None or len(given) != clips or not bool((grids[:, 0] > 1).any()):
            continue
        if tasks is None or sample.record.task in tasks:
            generator = torch.Generator().manual_seed(seed)
            orders = [another_order(frames, generator) for frames in grids[:, 0].tolist()]
            # Detached: shuffled rollouts are scored, not trained on.
            found[i] = reorder_frames(given.detach(), grids, orders)
    return found


def another_order(count: int, generator: torch.Generator) -> list[int]:
    """A random order of 0 .. count - 1 other than the identity, where there is another."""
    order = list(range(count))
    # Rejection keeps the other orders equally likely.
    while count > 1 and order == list(range(count)):
        order = torch.randperm(count, generator=generator).tolist()
    return order


def check_rollout_gap(metrics: Mapping[str, float], settings: RolloutConfig) -> None:
    """ValueError where the log-probs of rollout and training differ by more than the limits.

    Before the first update of a step both are the same model on the same tokens, so all but
    rounding is a fault: other weights, positions, inputs or precision. With `rollout.ahead` they
    are not, and the probes of `check_engine` alone tell.
    """
    if settings.ahead:
        return
    for kind, limit in (("mean", settings.gap_mean_limit), ("max", settings.gap_max_limit)):
        gap = metrics.get(f"rollout_gap_{kind}", 0.0)
        if limit is not None and gap > limit:
            raise ValueError(
                f"the {kind} gap between the log-probs of rollout and training is {gap:.3g}, above "
                f"rollout.gap_{kind}_limit {limit}. The completions were not sampled from the "
                "policy being trained: weights, positions or precision differ between the two. "
                "Nothing was updated in this step; the last checkpoint is good"
            )
