"""Does the engine sample from the policy that is trained? Measured on log-probs, and explained.

An engine that reads other tokens, counts other positions, sees other features or holds other
weights raises no error: its completions only look worse, and the gradient is wrong. So some
completions of the run's own prompts are asked for, the trainer's forward pass gives their
log-probs, and the gap is compared with a bound that only rounding stays below. The prompts are

    the run's own
    the same clip with times on integer boundaries, where float32 and float64 products part
    the same text without its clips: tells the weights from what is seen

and all are asked again after a sync of changed weights, which a stale cache or a weight that does
not arrive fails.

A gap is explained by trying causes: the trainer's forward pass with the fault in it (positions
without M-RoPE, one second a frame, patches normalised twice, ...) gives log-probs; the cause whose
log-probs are the engine's is named.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vcr1_fast.engines.inputs import (
    fitted_seconds,
    media_of,
    positions_by_times,
    times_by_position,
    vllm_times,
)
from vcr1_fast.engines.sampler import Sampler
from vcr1_fast.model.family import family_of
from vcr1_fast.model.forward import completion_hidden, lm_head, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.prompt import Prompt
from vcr1_fast.model.rollout import Rollout, SamplingConfig
from vcr1_fast.model.sampling import truncate
from vcr1_fast.model.wrapping import unwrap

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest gap of a token that rounding explains, by the weights' type."""
REDUCED_LIMIT = 0.5
"""The same for 16-bit weights. 0.09 was seen between bfloat16 and float32 on a tiny model; larger
models on a GPU have not been measured."""


class ParityError(ValueError):
    """The engine does not sample from the policy; the message names what differs."""


@dataclass(frozen=True)
class Gap:
    """Difference of log-probs over tokens: mean and max of |theirs - ours|; kl: estimate of
    KL(engine || trainer) on the sampled tokens (k3 of Schulman's note), in nats a token."""

    tokens: int
    mean: float
    max: float
    kl: float

    @classmethod
    def of(cls, theirs: Tensor, ours: Tensor) -> "Gap":
        """theirs, ours: (N,) log-probs of the same tokens. A nan counts as infinitely far."""
        log_ratio = (ours - theirs).double()
        distance = log_ratio.abs().nan_to_num(nan=math.inf)
        kl = (log_ratio.exp() - 1 - log_ratio).mean()
        return cls(len(theirs), float(distance.mean()), float(distance.max()), float(kl))

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, max {self.max:.2g}, KL {self.kl:.2g} on {self.tokens} tokens"


@dataclass(frozen=True, eq=False)
class Probe:
    """A prompt that the engine is asked about, with its features (vision tokens, levels * H)."""

    name: str
    prompt: Prompt
    features: Tensor | None


@dataclass(frozen=True, eq=False)
class Forward:
    """The trainer's forward pass, giving log-probs as an engine reports them."""

    model: nn.Module
    processor: Processor
    sampling: SamplingConfig

    @torch.no_grad()
    def logps(self, probe: Probe, completions: Sequence[Tensor], *, full: bool) -> Tensor:
        """(N,) log-probs of the completions' tokens: `full_logps` of a rollout, or `logps`."""
        group = Group(probe.prompt, completions, probe.features)
        hidden, labels, _ = completion_hidden(self.model, [group])
        weight, bias = lm_head(self.model)
        scores = nn.functional.linear(hidden, weight, bias).float()
        scores = scores / (self.sampling.temperature or 1.0)
        if not full:
            banned = self.processor.banned_ids(len(weight)).to(scores.device)
            scores = scores.index_fill(-1, banned, -torch.inf)
            scores = truncate(scores, self.sampling.top_k, self.sampling.top_p)
        return scores.log_softmax(-1).gather(1, labels[:, None])[:, 0].cpu()


def check_parity(
    sampler: Sampler,
    forward: Forward,
    prompts: Sequence[Prompt],
    *,
    limit: float | None = None,
    sync: Callable[[int], None] | None = None,
) -> Gap:
    """The gap of the engine on probes made of `prompts`; ParityError where it is above the limit.

    Args:
        forward: of the model whose weights the engine has, as of `sampler.version`.
        limit: largest |gap| of a token; None: `LIMITS`.
        sync: gives the engine the model's weights under a version: with it, the probes are asked
            again under changed weights, and once more when those are changed back.
    """
    model: Any = unwrap(forward.model)
    weight = lm_head(model)[0]
    bound = limit or LIMITS.get(weight.dtype, REDUCED_LIMIT)
    version = sampler.version
    assert version is not None
    gaps = [_ask(sampler, forward, _probes(model, prompts), bound, "")]
    if sync is not None:
        with changed_weights(model):
            sync(-1)
            probes = _probes(model, prompts)
            gaps.append(_ask(sampler, forward, probes, bound, " after a sync of changed weights"))
        sync(version)
        gaps.append(_ask(sampler, forward, _probes(model, prompts[:1]), bound, " after the next"))
    return max(gaps, key=lambda gap: gap.max)


def _ask(
    sampler: Sampler, forward: Forward, probes: Sequence[Probe], bound: float, when: str
) -> Gap:
    """The gap over all probes; ParityError, explained, where it is above the bound."""
    seed = torch.Generator().manual_seed(0)  # the run's random numbers stay untouched
    got = sampler.rollout(
        [probe.prompt for probe in probes],
        2,
        forward.sampling,
        seed,
        [probe.features for probe in probes],
    )
    full = not any(bool(one.isnan().any()) for group in got.full_logps for one in group)
    pairs = [
        (reported(got, i, full), forward.logps(probe, got.tokens[i], full=full))
        for i, probe in enumerate(probes)
    ]
    gaps = [Gap.of(theirs, ours) for theirs, ours in pairs]
    for i, (probe, gap) in enumerate(zip(probes, gaps, strict=True)):
        if gap.max > bound:
            text = next(
                (g for p, g in zip(probes, gaps, strict=True) if p.prompt.patches == 0), None
            )
            cause = explain(forward, probe, got.tokens[i], pairs[i][0], text, bound, full=full)
            raise ParityError(
                f"{sampler.describe()} does not sample from the policy{when}: on {probe.name} its "
                f"log-probs differ by {gap} (bound {bound:g}). {cause}"
            )
    return Gap.of(*(torch.cat(each) for each in zip(*pairs, strict=True)))


def reported(got: Rollout, prompt: int, full: bool) -> Tensor:
    """(N,) log-probs of one prompt's completions as the engine reports them."""
    return torch.cat((got.full_logps if full else got.logps)[prompt])


def explain(
    forward: Forward,
    probe: Probe,
    completions: Sequence[Tensor],
    theirs: Tensor,
    text: Gap | None,
    bound: float,
    *,
    full: bool,
) -> str:
    """What differs, where a known cause gives the engine's log-probs `theirs` (N,); text: the gap
    on a prompt without clips."""
    if text is not None and text.max > bound:
        return (
            f"weights: a prompt without clips differs too ({text}): the engine holds other weights "
            "or another precision, or answers from a cache of older ones"
        )
    before = Gap.of(theirs, forward.logps(probe, completions, full=full))
    found = []
    for cause, other in causes(forward, probe):
        gap = Gap.of(theirs, forward.logps(other, completions, full=full))
        found.append((gap.max, cause, gap))
    best, cause, gap = min(found, default=(math.inf, "", before))
    if best <= max(bound, before.max / 10):
        return f"{cause} (with this fault the trainer's gap is {gap})"
    return (
        "positions or vision features: prompts without clips agree, and no known cause gives the "
        "engine's log-probs"
    )


def causes(forward: Forward, probe: Probe) -> Iterator[tuple[str, Probe]]:
    """Known faults of engines, each with the probe as such an engine sees it."""
    prompt, features = probe.prompt, probe.features
    if features is None:
        return
    model: Any = unwrap(forward.model)
    plain = torch.arange(len(prompt)).expand(3, -1)
    yield (
        "positions: text positions for vision tokens (M-RoPE lost)",
        replace(probe, prompt=replace(prompt, positions=plain)),
    )
    if times_by_position(model.config) and len(prompt.second_per_grid_ts):
        media = media_of(prompt, features, model.config, 0)
        rate = float(model.config.vision_config.tokens_per_second)
        own = iter(prompt.second_per_grid_ts.tolist())
        seconds = [next(own) if medium.kind == "video" else 0.0 for medium in media]
        for cause, given in (
            ("positions: one second between temporal patches (seconds lost)", [1.0] * len(media)),
            ("positions: times multiplied in float64, not float32", seconds),
        ):
            times = [
                vllm_times(int(medium.grid[0]), interval, rate)
                for medium, interval in zip(media, given, strict=True)
            ]
            positions = positions_by_times(prompt, media, times, model.config)
            yield cause, replace(probe, prompt=replace(prompt, positions=positions))
    yield (
        "vision: no features reach the vision tokens",
        replace(probe, features=torch.zeros_like(features)),
    )
    pixels = prompt.pixel_values_videos
    if pixels is not None:
        twice = replace(prompt, pixel_values_videos=normalised(pixels, forward.processor))
        with torch.no_grad():
            (again,) = prompt_features(model, [twice])
        yield "vision: patches are normalised twice", replace(probe, features=again)
    if len(prompt.video_grid_thw) == 1 and prompt.pixel_values is None:
        reverse = features.flip(0)
        yield "vision: features are in another order", replace(probe, features=reverse)


def normalised(pixels: Tensor, processor: Processor) -> Tensor:
    """Pixel values (N, values of a patch), normalised once more."""
    layout = processor.video.layout
    mean, std = (torch.tensor(each) for each in (layout.mean, layout.std))
    # Values of a patch lie channel by channel.
    parts = pixels.unflatten(1, (len(mean), -1))
    return ((parts - mean[:, None]) / std[:, None]).flatten(1).to(pixels.dtype)


def _probes(model: Any, prompts: Sequence[Prompt]) -> list[Probe]:
    """Probes of the prompts and the model's weights as they are now."""
    with torch.no_grad():
        features = prompt_features(model, prompts)
    probes = [
        Probe(f"prompt {i}", prompt, own)
        for i, (prompt, own) in enumerate(zip(prompts, features, strict=True))
    ]
    first = prompts[0]
    if first.patches:
        kept = first.input_ids[~first.is_vision]
        empty = torch.zeros(0, 3, dtype=torch.int64)
        bare = Prompt(
            input_ids=kept,
            mm_token_type_ids=torch.zeros_like(kept),
            positions=torch.arange(len(kept)).expand(3, -1),
            pixel_values_videos=None,
            video_grid_thw=empty,
            second_per_grid_ts=torch.zeros(0),
            pixel_values=None,
            image_grid_thw=empty,
            text=first.text,
        )
        probes.append(Probe("prompt 0 without its clips", bare, None))
    for probe in probes[: len(prompts)]:
        if (edge := at_time_boundary(model, probe)) is not None:
            return [*probes, edge]
    return probes


def at_time_boundary(model: Any, probe: Probe) -> Probe | None:
    """The probe with seconds at which float32 and float64 times differ; None where the family has
    no times in its positions, or no such seconds are found."""
    config, prompt = model.config, probe.prompt
    if not times_by_position(config) or len(prompt.second_per_grid_ts) != 1:
        return None
    media = media_of(prompt, probe.features, config, 0)
    if len(media) != 1:
        return None
    rate = float(config.vision_config.tokens_per_second)
    count = int(media[0].grid[0])
    for tenths in range(1, 200):
        seconds = torch.tensor([tenths / 10])  # float32, as prompts hold them
        ours = (torch.arange(count, dtype=torch.float32) * seconds * rate).long().tolist()
        if vllm_times(count, seconds.item(), rate) == ours:
            continue
        try:
            fitted_seconds(ours, seconds.item(), config)
        except ValueError:
            continue
        positions = positions_by_times(prompt, media, [ours], config)
        edge = replace(prompt, second_per_grid_ts=seconds, positions=positions)
        return Probe(f"{probe.name} with {tenths / 10:g} s a frame", edge, probe.features)
    return None


@contextmanager
def changed_weights(model: Any) -> Iterator[None]:
    """The model with other weights, in place: norms of the first layer (keys and values change) and
    the last (logits change), and the embedding, which a tied head shares. Put back exactly."""
    language_model = family_of(model).language_model(model)
    changed = [
        parameter
        for name, parameter in language_model.named_parameters()
        if parameter.dim() == 1 and (name.startswith("layers.0.") or name == "norm.weight")
    ]
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = [parameter.clone() for parameter in changed]
        rows = embedding[: min(len(embedding), 4096)].clone()
        for parameter in changed:
            parameter.mul_(1.25)
        embedding[: len(rows)] *= 1.25
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(changed, kept, strict=True):
                parameter.copy_(before)
            embedding[: len(rows)] = rows
