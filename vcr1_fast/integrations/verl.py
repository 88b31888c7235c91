"""verl on our ops: its log-prob, entropy and fused-head functions, and policy losses for its
registry.

    from vcr1_fast.integrations.verl import patch_verl
    patch_verl()

verl runs its workers in separate processes: name `vcr1_fast.integrations.verl_plugin`, which
patches when it is imported, as `actor_rollout_ref.model.external_lib`, and choose a loss with
`actor_rollout_ref.actor.policy_loss.loss_mode=vcr1_vanilla`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.integrations.rows import row_entropy, row_logprobs
from vcr1_fast.integrations.verl_losses import POLICY_LOSSES
from vcr1_fast.ops import linear_logprobs


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs (...) of `labels` under softmax of `logits` (..., V), in float32 as with the
    flash-attn kernel that verl takes on GPUs. `inplace_backward` writes the gradient over the
    logits; verl itself turns it off where it needs them for the entropy."""
    return row_logprobs(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy (...) in nats, in the logits' dtype; differentiable."""
    return row_entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy (...) in nats, in float32; nothing is copied, so that there is nothing to chunk."""
    return row_entropy(logits, torch.float32)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of an LM head without its logits in memory, both float32.

    hidden: (..., H), weight: (V, H), labels: (...). Results are flat, (N,); with reduction "sum" or
    "mean" the log-probs are one number. ValueError for another reduction, and for a weight split
    over several processes.
    """
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            "a weight split over the vocabulary is not supported: got a group of "
            f"{dist_process_group.size()} processes"
        )
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    out = linear_logprobs(hidden, weight, labels, temperature=temperature, entropy=True)
    assert out.entropy is not None
    # A copy: the backward pass keeps its own, and callers may write into the result.
    logps, entropy = out.logps.reshape(-1).clone(), out.entropy.reshape(-1)
    if reduction.lower() == "none":
        return logps, entropy
    return (logps.sum() if reduction.lower() == "sum" else logps.mean()), entropy


class LinearCrossEntropy:
    """`linear_cross_entropy` as verl names its function class."""

    apply = staticmethod(linear_cross_entropy)


class FusedLinearForPPO(torch.nn.Module):
    """Log-probs and entropy of an LM head, as a module without parameters.

    chunk_size, impl_backend: kept for the signature; rows are chunked by the free memory.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', got {impl_backend!r}")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log-probs in float32, entropy in the hidden states' dtype), both of `input_ids`'s
        shape. hidden_states: (..., H), vocab_weights: (V, H), input_ids: (...)."""
        out = linear_logprobs(
            hidden_states, vocab_weights, input_ids, temperature=temperature, entropy=True
        )
        assert out.entropy is not None
        return out.logps.clone(), out.entropy.to(hidden_states.dtype)


def _constant(loss: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda _: loss


_FUNCTIONS = "verl.utils.torch_functional"
_HEAD = "verl.utils.kernel.linear_cross_entropy"
_REGISTRY = "verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY"
_HEAD_ARGUMENTS = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
patch_verl = Patch(
    "verl",
    ("0.8.0", "0.9.0", "0.9.1", "0.10.0.dev0"),
    {
        "logprobs": [
            Swap(
                _FUNCTIONS,
                "logprobs_from_logits",
                lambda _: logprobs_from_logits,
                ("logits", "labels", "inplace_backward"),
            ),
            Swap(_FUNCTIONS, "entropy_from_logits", lambda _: entropy_from_logits, ("logits",)),
            Swap(
                _FUNCTIONS,
                "entropy_from_logits_with_chunking",
                lambda _: entropy_from_logits_with_chunking,
                ("logits", "chunk_size"),
            ),
        ],
        "fused_head": [
            Swap(
                "verl.utils.experimental.torch_functional",
                "FusedLinearForPPO",
                lambda _: FusedLinearForPPO,
                ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
            ),
            Swap(
                _HEAD, "LinearCrossEntropy", lambda _: LinearCrossEntropy, ("ctx", *_HEAD_ARGUMENTS)
            ),
            Swap(_HEAD, "linear_cross_entropy", lambda _: linear_cross_entropy),
        ],
        "policy_losses": [
            Swap(_REGISTRY, name, _constant(loss), new=True) for name, loss in POLICY_LOSSES.items()
        ],
    },
)
"""Replaces verl's functions at every by-value import and registers the policy losses."""
