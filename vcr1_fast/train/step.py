"""The parts of a step that are functions of their arguments: the loss of some groups, and how
rewards and metrics become those of the step."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group
from vcr1_fast.ops import GRPOLossConfig, linear_grpo_loss, linear_logprobs
from vcr1_fast.train.planner import Shaped

S = TypeVar("S", bound=Shaped)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PolicyGroup:
    """A prompt with its G completions of N tokens in all, and what the loss needs of them.

    advantages (G,); rollout_logps (N,), of the sampler at its temperature; ref_logps (N,), of the
    reference, None without a KL term.
    """

    group: Group
    advantages: Tensor
    rollout_logps: Tensor
    ref_logps: Tensor | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.group.prompt_tokens

    @property
    def lengths(self) -> list[int]:
        return self.group.lengths

    @property
    def patches(self) -> int:
        return self.group.patches

    def part(self, first: int, last: int) -> "PolicyGroup":
        """The same prompt with completions first .. last - 1."""
        before = sum(self.lengths[:first])
        tokens = slice(before, before + sum(self.lengths[first:last]))
        return PolicyGroup(
            self.group.part(first, last),
            self.advantages[first:last],
            self.rollout_logps[tokens],
            None if self.ref_logps is None else self.ref_logps[tokens],
        )

    def with_vision(self, vision: Tensor | None) -> "PolicyGroup":
        """The same with other features; None has its clips encoded in the pass."""
        return replace(self, group=replace(self.group, vision=vision))

    @property
    def plain_tokens(self) -> int:
        """What the plain form runs: every completion with a prompt of its own."""
        return len(self.lengths) * self.prompt_tokens + sum(self.lengths)

    @property
    def is_silent(self) -> bool:
        """All completions equally good: without a KL or entropy term there is no gradient."""
        return not bool(self.advantages.any())


@dataclass(frozen=True)
class Scored:
    """A completion's rewards by name, its task, its length in tokens, and its task's metrics."""

    task: str
    rewards: dict[str, float]
    metrics: dict[str, float]
    length: int
    finished: bool
    weights: dict[str, float] = field(default_factory=dict)
    """Of the rewards; 1 where none is given."""

    @property
    def total(self) -> float:
        return math.fsum(self.weights.get(name, 1.0) * r for name, r in self.rewards.items())


def reward_matrix(scored: Sequence[Scored]) -> Tensor:
    """(N, R) float64 rewards by completion and name; nan where a task has no such reward."""
    return _by_name(scored, [one.rewards for one in scored], math.nan)


def weight_matrix(scored: Sequence[Scored]) -> Tensor:
    """(N, R) float64 weights of `reward_matrix`'s rewards."""
    return _by_name(scored, [one.weights for one in scored], 1.0)


def _by_name(
    scored: Sequence[Scored], values: Sequence[dict[str, float]], default: float
) -> Tensor:
    names = sorted({name for one in scored for name in one.rewards})
    rows = [[row.get(name, default) for name in names] for row in values]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(scored), len(names))


def loss_config(config: GRPOLossConfig, sequences: int, tokens: int) -> GRPOLossConfig:
    """The config with the counts of the whole optimiser step, over all micro-batches and processes
    and with the groups that are skipped: so a part's loss is its share of the step's."""
    if config.resolved_aggregation == "token_mean":
        config = replace(config, aggregation="num_items")
    return replace(config, num_sequences=float(max(sequences, 1)), num_items=float(max(tokens, 1)))


def policy_loss(
    model: nn.Module,
    groups: Sequence[PolicyGroup],
    config: GRPOLossConfig,
    *,
    temperature: float,
    on_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of some groups in one forward pass, and `linear_grpo_loss`'s metrics.

    `on_policy`: no update has been made since the completions were drawn. Then the policy itself is
    the old policy, and its gap to the sampler's log-probs is rounding alone: it is measured.
    Afterwards the sampler's log-probs stand for the old policy.
    """
    hidden, labels, cu_seqlens = completion_hidden(model, [g.group for g in groups])
    weight, bias = lm_head(model)
    sampled = torch.cat([g.rollout_logps for g in groups]).to(hidden.device)
    refs = [g.ref_logps for g in groups if g.ref_logps is not None]
    correction = config.rollout_correction not in (None, "none")
    return linear_grpo_loss(
        hidden,
        weight,
        labels,
        torch.cat([g.advantages for g in groups]).to(hidden.device),
        None,
        old_logps=None if on_policy else sampled,
        ref_logps=torch.cat(refs).to(hidden.device) if refs else None,
        rollout_logps=sampled if on_policy or correction else None,
        bias=bias,
        cu_seqlens=cu_seqlens,
        temperature=temperature,
        entropy=True,
        config=config,
    )


def completion_logps(
    model: nn.Module, groups: Sequence[Group], *, temperature: float = 1.0
) -> Tensor:
    """(N,) float32 log-probs of all completion tokens; with gradient where that is enabled."""
    hidden, labels, _ = completion_hidden(model, groups)
    weight, bias = lm_head(model)
    return linear_logprobs(hidden, weight, labels, bias, temperature=temperature).logps


def longest_first(items: Iterable[S]) -> list[S]:
    """In the order that micro-batches are cut: what does not fit in memory comes first."""
    return sorted(items, key=lambda item: item.prompt_tokens + sum(item.lengths), reverse=True)


def equal_parts(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Consecutive parts whose sizes differ by one at most; some may be empty."""
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(edges)]


def merge_metrics(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Metrics of the parts of a step as one: losses and counts add up, extremes stay extreme, means
    are weighted by tokens. A metric that some parts lack is that of the others."""
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


def task_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over all completions, and over those of each task."""
    out: dict[str, float] = {}
    for name in ["", *sorted({one.task for one in scored})]:
        part = [one for one in scored if name in ("", one.task)]
        suffix = f"/{name}" if name else ""
        out[f"reward{suffix}"] = _mean(one.total for one in part)
        out[f"length{suffix}"] = _mean(float(one.length) for one in part)
        out[f"finished{suffix}"] = _mean(float(one.finished) for one in part)
        if name:
            # A user's reward may have nothing to say about some completions.
            for reward in dict.fromkeys(reward for one in part for reward in one.rewards):
                given = [one.rewards[reward] for one in part if reward in one.rewards]
                out[f"reward{suffix}/{reward}"] = _mean(given)
            for metric in part[0].metrics:
                out[f"metric{suffix}/{metric}"] = _mean(one.metrics[metric] for one in part)
    return out


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / max(len(values), 1)
