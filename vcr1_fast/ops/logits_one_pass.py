"""The arguments of `logits_grpo_loss`, and its CUDA kernel for losses that weigh tokens one by one.

Where no token's gradient depends on another token's log-prob, a row's log-prob, its gradient in the
loss and the logits' gradient follow from the row alone: the kernel keeps it on the chip between one
read and one write.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vcr1_fast.ops.backend import native
from vcr1_fast.ops.gather_reference import KERNEL_DTYPES, allocate
from vcr1_fast.ops.grpo_config import LossParameters
from vcr1_fast.ops.grpo_loss import grpo_loss_op
from vcr1_fast.ops.grpo_terms import Completions, LossInputs
from vcr1_fast.ops.grpo_tokens import as_tokens, couples_tokens


class Given(NamedTuple):
    """The op's arguments besides the logits; `inputs.logps` has the shape of log-probs only."""

    labels: Tensor  # (..., 1)
    state: tuple[Tensor | None, Tensor | None, float]  # rows that count, temperatures
    entropy: bool
    inputs: LossInputs
    parameters: LossParameters

    def loss(self, logps: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        """What `grpo_loss_op` returns for log-probs (..., 1) and entropies (...) of the rows."""
        inputs = self.inputs._replace(
            logps=logps[..., 0], entropy=entropy if self.entropy else None
        )
        return grpo_loss_op(*inputs, self.parameters.kinds, self.parameters.values)


def arrange(logits, labels, row_temperature, *arguments) -> Given:
    """The op's arguments, without its last where that is `gradient`, as rows take them."""
    old, advantages, mask, ref, rollout, token_weights, cu_seqlens, count = arguments[:8]
    temperature, entropy, kinds, values = arguments[8:]
    inputs = LossInputs(
        logits[..., 0], old, advantages, mask, ref, None, rollout, token_weights, cu_seqlens, None,
        count,
    )  # fmt: skip
    rows = None
    if mask is not None or cu_seqlens is not None:
        rows = Completions(inputs).mask.contiguous()
    state = (rows, row_temperature, temperature)
    p = LossParameters(tuple(kinds), tuple(values))
    return Given(labels[..., None].contiguous(), state, entropy, inputs, p)


def fits_one_pass(logits: Tensor, given: Given) -> bool:
    """Whether the kernel takes these logits and this loss."""
    return (
        logits.dtype in KERNEL_DTYPES
        and logits.stride(-1) == 1
        and not couples_tokens(given.inputs, given.parameters)
    )


def one_pass(logits: Tensor, given: Given, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, metrics), and the logits' gradient in `grad`, which may be the logits themselves."""
    logps, entropy, lse, stats = allocate(logits, given.labels, given.entropy)
    # The kernel weighs its tokens; the loss and its metrics are sums over all of them afterwards.
    tokens = as_tokens(given.inputs._replace(logps=logps[..., 0]), given.parameters)
    x = tokens.inputs
    columns = (
        x.old_logps, x.advantages, x.ref_logps, x.rollout_logps, x.token_weights, x.weights,
    )  # fmt: skip
    native.logits_grpo_loss(
        logits,
        given.labels,
        *given.state,
        [column if column is None else column.contiguous() for column in columns],
        tokens.parameters.kinds,
        tokens.parameters.values,
        tokens.grad_entropy if given.entropy else None,
        [logps, entropy if given.entropy else None, lse, stats, grad],
    )
    loss, _, _, metrics = given.loss(logps, entropy)
    return loss, metrics
