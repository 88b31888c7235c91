"""The interface of everything that samples completions, and the package's own engine behind it.

A run holds one `Sampler` and does not know which. Before a rollout the run brings the engine's
weights up to date (`sync`) under the number of steps taken; every answer comes from the weights of
that number, or the engine raises.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from vcr1_fast.model.processor import Processor
from vcr1_fast.model.prompt import Prompt
from vcr1_fast.model.rollout import Generators, Rollout, SamplingConfig, rollout

Weights = Iterable[tuple[str, Tensor]]
"""(name, tensor) of every parameter, adapters merged, under transformers' names. May be a generator
that gathers one layer of a sharded model at a time."""


class Sampler(ABC):
    """An engine. Use it in a `with` statement.

    version: of the weights that answers come from; None before the first `sync`.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    """Whether one engine serves all processes of a run: the first one syncs it for all."""
    version: int | None = None

    @abstractmethod
    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        seed: Generators,
        features: Sequence[Tensor | None] | None = None,
    ) -> Rollout:
        """`group_size` completions of every prompt; as `model.rollout.rollout`.

        Args:
            seed: CPU generators, one for all prompts or one for each, the only source of
                randomness. A prompt takes the same share whatever is sampled beside it.
            features: of the prompts' clips and images (vision tokens, levels * H) where they are
                known; others are encoded.

        Raises:
            ValueError: for a prompt, or sampling, that the engine cannot serve exactly.
        """

    @abstractmethod
    def sync(self, weights: Weights, version: int) -> None:
        """Answer by these weights from now on. ValueError where names are missing or unknown."""

    # Engines without anything to give back or to end leave these three as they are.
    def sleep(self) -> None:  # noqa: B027
        """Give the device's memory back until `wake`, where the engine can."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`."""

    def close(self) -> None:  # noqa: B027
        """End the engine; it cannot be used again."""

    def describe(self) -> str:
        """Name and version of the engine, for the run's log."""
        return self.name

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OwnSampler(Sampler):
    """`model.rollout` on the trainer's own model: its weights are never out of date."""

    name = "own"

    def __init__(self, model: nn.Module, processor: Processor) -> None:
        self.model, self.processor = model, processor

    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        seed: Generators,
        features: Sequence[Tensor | None] | None = None,
    ) -> Rollout:
        return rollout(
            self.model, self.processor, prompts, group_size, sampling, seed, vision=features
        )

    def sync(self, weights: Weights, version: int) -> None:
        self.version = version  # `weights` are the model's: not even listed
