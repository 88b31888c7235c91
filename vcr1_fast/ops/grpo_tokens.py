"""The GRPO loss token by token: for heads that make log-probs and their gradient chunk by chunk."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from vcr1_fast.ops.grpo_config import LEVELS, LOSS_TYPES, ROLLOUT_CORRECTIONS, LossParameters
from vcr1_fast.ops.grpo_loss import grpo_loss_op
from vcr1_fast.ops.grpo_reference import aggregation_weights, entropy_weights
from vcr1_fast.ops.grpo_terms import Completions, LossInputs, rollout_correction


def couples_tokens(inputs: LossInputs, p: LossParameters) -> bool:
    """Whether a token's gradient depends on log-probs of its completion's other tokens."""
    correction = ROLLOUT_CORRECTIONS[p.kind("rollout_correction")]
    return (
        LEVELS[p.kind("level")] != "token"
        or LOSS_TYPES[p.kind("loss_type")] == "vespo"
        or math.isfinite(p.value("off_policy_threshold"))
        or (correction.startswith("sequence") and inputs.old_logps is None)
    )


class TokenLoss(NamedTuple):
    """The loss's inputs as flat vectors with one value a token, for losses that allow it.

    A chunk of them is given to `grpo_loss` as completions of one token each, (n, 1), with the
    weight that each token has in the whole batch.
    """

    inputs: LossInputs
    grad_entropy: Tensor | None
    parameters: LossParameters

    def upstream(self, rows: Tensor, logps: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dloss/dlogp, dloss/dentropy) of the tokens named, whose logps are (n, 1)."""
        part = [take(x, rows) for x in self.inputs]
        columns = [x if x is None else x[:, None] for x in part]
        chunk = LossInputs(*columns)._replace(logps=logps, weights=part[_WEIGHTS])
        _, grad_logps, _, _ = grpo_loss_op(*chunk, self.parameters.kinds, self.parameters.values)
        return grad_logps[:, 0], take(self.grad_entropy, rows)


_WEIGHTS = LossInputs._fields.index("weights")


def as_tokens(inputs: LossInputs, p: LossParameters) -> TokenLoss:
    rows = Completions(inputs)
    counts = rows.sum(rows.mask.to(inputs.logps.dtype))
    weights = rows.keep(rows.spread(aggregation_weights(inputs, p, counts)))
    grad_entropy = None
    if p.value("entropy_coef"):
        grad_entropy = -p.value("entropy_coef") * entropy_weights(inputs, p, rows, weights)
    rollout = inputs.rollout_logps
    if ROLLOUT_CORRECTIONS[p.kind("rollout_correction")].startswith("sequence"):
        # The weight of a completion is known from the old log-probs: hand it to its tokens as the
        # sampler's log-prob that gives each of them the same weight.
        old = rows.keep(inputs.old_logps)
        rollout = old - rollout_correction(inputs, p, rows, old).weight.log()
        p = p.replace(
            rollout_correction=ROLLOUT_CORRECTIONS.index("token_truncate"),
            rollout_min=-math.inf,
            rollout_max=math.inf,
        )
    tokens = LossInputs(
        logps=None,
        old_logps=inputs.old_logps,
        advantages=rows.per_token(inputs.advantages),
        mask=None,
        ref_logps=inputs.ref_logps,
        rollout_logps=rollout,
        token_weights=inputs.token_weights,
        weights=weights,
    )
    flat = LossInputs(*(x if x is None else x.reshape(-1) for x in tokens))
    return TokenLoss(flat, None if grad_entropy is None else grad_entropy.reshape(-1), p)


def take(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return x if x is None else x.index_select(0, rows)
