"""The tensors that completions read of their prompt, as leaves between two autograd graphs.

A group whose activations do not fit in memory runs in passes of two kinds:

    prompt pass      the prompt alone; every layer records the tensors that later tokens read of it
                     (attention: its keys and values)
    suffix passes    some of the completions, on these tensors as leaves: forward, loss, backward;
                     the gradients of all passes are summed in the leaves

Then one backward pass through the prompt and the vision encoder takes the sums. The chain rule
makes this exact: completions depend on the prompt through the recorded tensors and through the
hidden state of the prompt's last token alone, and on each other not at all.

`forward.py` runs both kinds of passes; `train/planner.py` decides which groups need them.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vcr1_fast.model.packing import Span


class PromptRecorder:
    """Takes each layer's tensors in one prompt pass, as the keyword argument `recorder` that every
    layer gets.

    A layer may be called again in the backward pass, to recompute its activations; the recorder is
    closed by then and ignores it.
    """

    def __init__(self) -> None:
        self._recorded: dict[int, tuple[Tensor, ...]] | None = {}
        self._with_graph = torch.is_grad_enabled()

    def record(self, layer: int, *tensors: Tensor) -> None:
        """Record what later tokens read of the prompt in `layer`.

        ValueError inside reentrant activation checkpointing: it runs a layer without gradient, so
        that none would come back through these tensors.
        """
        if self._recorded is None:
            return
        if torch.is_grad_enabled() != self._with_graph:
            raise ValueError(
                f"layer {layer} runs under reentrant activation checkpointing, which drops the "
                "gradient of the prompt's keys and values; use the non-reentrant form "
                "(use_reentrant=False, as model.gradient_checkpointing does)"
            )
        self._recorded[layer] = tensors

    def close(self) -> dict[int, tuple[Tensor, ...]]:
        """All layers' tensors. They leave the recorder: the closures that recompute activations
        hold it, and with the tensors' graph in it that would be a cycle through autograd, which the
        garbage collector cannot see."""
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            raise ValueError("the recorder is closed")
        return recorded


class PromptState:
    """A prompt's recorded tensors by layer, and the hidden state (1, H) of its last token, as
    leaves that sum the gradients of all suffix passes.

    keep_graph: the tensors keep the prompt's graph for `backward`. Otherwise they came from a pass
    without one, and the gradients go to the state of a second pass.

    Gradients of half-precision leaves are summed in float32: a sum of many suffixes in bfloat16
    keeps 8 bits.
    """

    def __init__(
        self, recorded: Mapping[int, tuple[Tensor, ...]], hidden: Tensor, *, keep_graph: bool
    ) -> None:
        made = [hidden, *(x for tensors in recorded.values() for x in tensors)]
        self._made = made if keep_graph else []
        self._sums: dict[int, Tensor] = {}
        self._leaves = [self._leaf(i, x, keep_graph) for i, x in enumerate(made)]
        leaves = iter(self._leaves)
        self.hidden = next(leaves)
        self.layers = {
            layer: tuple(next(leaves) for _ in tensors) for layer, tensors in recorded.items()
        }

    def take_gradients(self) -> list[Tensor | None]:
        """The sums so far, in the order of the recorded tensors; the leaves are dropped."""
        gradients = [self._sums.pop(i, leaf.grad) for i, leaf in enumerate(self._leaves)]
        self._leaves.clear()
        self.layers.clear()
        return gradients

    def backward(self, gradients: list[Tensor | None]) -> None:
        """One backward pass through the prompt from the gradients that `take_gradients` gave, which
        are consumed. One pass for all tensors: a second one would need the graph retained, and
        would recompute checkpointed activations again."""
        made, self._made = self._made, []
        if len(made) != len(gradients):
            raise ValueError(f"{len(gradients)} gradients for {len(made)} tensors of a prompt pass")
        for i, x in enumerate(made):
            given = gradients[i]
            # Without adapters below it, a first layer's keys may need no gradient.
            gradients[i] = None if given is None or not x.requires_grad else given.to(x.dtype)
        pairs = [(x, g) for x, g in zip(made, gradients, strict=True) if g is not None]
        gradients.clear()
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])

    def _leaf(self, number: int, made: Tensor, keep_graph: bool) -> Tensor:
        leaf = made.detach()
        if torch.is_grad_enabled() and (made.requires_grad or not keep_graph):
            leaf.requires_grad_()
            if leaf.dtype in (torch.bfloat16, torch.float16):
                # The hook holds the sums and not this state: no cycle through the leaf.
                leaf.register_post_accumulate_grad_hook(
                    partial(_add_in_float32, self._sums, number)
                )
        return leaf


def _add_in_float32(sums: MutableMapping[int, Tensor], number: int, leaf: Tensor) -> None:
    gradient = leaf.grad
    assert gradient is not None  # a hook after accumulation
    if number in sums:
        sums[number].add_(gradient)
    else:
        sums[number] = gradient.float()
    leaf.grad = None


@dataclass(frozen=True, eq=False)
class Suffix:
    """Completions in a pass without their prompt, as the keyword argument `suffix` that every layer
    gets: `state` of the prompt, and the `span` that the group would have in a pack, so that row i
    of the pass is row `span.middle + i` of the pack."""

    state: PromptState
    span: Span

    @property
    def parts(self) -> list[tuple[int, int, int, int]]:
        """Parts of `ops.group_attention` with the prompt's keys and values as the prefix."""
        _, *completions = self.span.parts(is_last=False)
        middle = self.span.middle
        return [(row - middle, end - middle, 0, self.span.prompt) for row, end, _, _ in completions]
