"""The GRPO loss token by token: unreduced, and for heads that compute log-probs chunk by chunk.

    loss_t = F_t P_t + beta K_t [r_t]

with the terms of `reference.py`. The derivative of sum_t u_t loss_t, for upstream gradients u_t, is
the one written there with u_t in place of the aggregation's weights.

`grpo_token_loss` is for trainers that average the loss themselves. It is plain torch on every
backend: a few dozen launches on (B, T), which `grpo_loss` does in two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import check_one_device
from vcr1_fast.ops.gather_logprobs import accumulation_dtype
from vcr1_fast.ops.grpo.config import GRPOLossConfig, LossParameters, parameters_of
from vcr1_fast.ops.grpo.loss import check_inputs, grpo_loss_op
from vcr1_fast.ops.grpo.reference import (
    Completions,
    LossInputs,
    aggregation_weights,
    clipped_tokens,
    entropy_weights,
    map_tensors,
    rollout_correction,
    token_terms,
)


class TokenLosses(NamedTuple):
    """Results of `grpo_token_loss`; all have the shape of the log-probs and are 0 outside the mask.

    loss: differentiable in the log-probs. kl: the estimator, times r with the bias correction.
    clipped: 1 where r is outside the range on the side where the loss clips, else 0.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


class _TokenLoss(torch.autograd.Function):
    # Plain torch, but with the derivative of `reference.py`: autograd's would differ from the
    # kernels' on ties, and keep a few dozen tensors for the backward pass.
    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, constants: LossInputs, p: LossParameters
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = constants._replace(logps=logps)
        terms = token_terms(inputs, p)
        policy, kl = terms.loss(p, 1.0)
        clipped = torch.zeros_like(policy)
        if p.has_clip_range:
            low, high = clipped_tokens(p, terms)
            clipped = (low | high).to(policy.dtype)
        keep = terms.rows.keep
        kl_value, clipped = keep(terms.kl * terms.correction), keep(clipped)
        ctx.save_for_backward(*inputs)
        ctx.parameters = p
        ctx.mark_non_differentiable(kl_value, clipped)
        ctx.set_materialize_grads(False)
        return policy + kl, kl_value, clipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_kl: None, _grad_clipped: None) -> Any:
        if grad_loss is None:
            return None, None, None
        terms = token_terms(LossInputs(*ctx.saved_tensors), ctx.parameters)
        return terms.gradient(ctx.parameters, terms.rows.keep(grad_loss)), None, None


def grpo_token_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - immutable
) -> TokenLosses:
    """The loss of each token of (B, T) completions, which `grpo_loss` averages.

    Arguments as in `grpo_loss`. Ignores the config's aggregation and its counts. Differentiable in
    logps, once.

    Raises:
        ValueError: shapes that do not fit, a missing input that the config needs, or entropy_coef,
            because the entropy bonus is not a token's own.
    """
    if not logps.is_floating_point():
        raise ValueError(f"logps must be floating point, got {logps.dtype}")
    if config.entropy_coef:
        raise ValueError(f"entropy_coef = {config.entropy_coef} has no part in a token's loss")
    dtype = accumulation_dtype(logps)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    given = LossInputs(
        logps, old_logps, advantages, mask, ref_logps, None, rollout_logps, token_weights
    )
    check_inputs(config, logps.shape, given)
    check_one_device("logps", logps, **given._asdict())
    constants = LossInputs(
        logps=None,  # type: ignore[arg-type]  # the argument that autograd sees
        old_logps=constant(old_logps),
        advantages=advantages.detach().to(dtype),
        mask=mask,
        ref_logps=constant(ref_logps),
        rollout_logps=constant(rollout_logps),
        token_weights=constant(token_weights),
    )
    return TokenLosses(*_TokenLoss.apply(logps.to(dtype), constants, parameters_of(config)))


def couples_tokens(inputs: LossInputs, p: LossParameters) -> bool:
    """Whether a token's gradient depends on log-probs of its completion's other tokens."""
    return (
        p.level != "token"
        or p.loss_type == "vespo"
        or math.isfinite(p.off_policy_threshold)
        # The correction of a completion is known beforehand only from given old log-probs.
        or (p.rollout_correction.startswith("sequence") and inputs.old_logps is None)
    )


class TokenInputs(NamedTuple):
    """The loss's inputs as flat vectors, one value per token, for losses without `couples_tokens`.

    A chunk of tokens goes through the op `grpo_loss` as completions of one token each, (n, 1), with
    the weight that each token has in the whole batch.
    """

    inputs: LossInputs
    grad_entropy: Tensor | None
    parameters: str

    def upstream(self, tokens: Tensor, logps: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dloss/dlogp, dloss/dentropy), (n,) each, of the tokens (n,) with logps (n, 1)."""
        chunk = map_tensors(lambda x: x.index_select(0, tokens), self.inputs)
        columns = map_tensors(lambda x: x[:, None], chunk)
        # The weights are one per completion, (n,), and not one per token of it.
        columns = columns._replace(logps=logps, weights=chunk.weights)
        _, grad_logps, _, _ = grpo_loss_op(*columns, self.parameters)
        return grad_logps[:, 0], take(self.grad_entropy, tokens)


def as_tokens(inputs: LossInputs, p: LossParameters) -> TokenInputs:
    """The inputs of single tokens whose losses add up to the loss of `inputs`."""
    rows = Completions(inputs)
    counts = rows.sum(rows.mask.to(inputs.logps.dtype))
    weights = rows.keep(rows.spread(aggregation_weights(inputs, p, counts)))
    grad_entropy = None
    if p.entropy_coef:
        grad_entropy = -p.entropy_coef * entropy_weights(inputs, p, rows, weights)
    rollout = inputs.rollout_logps
    if p.rollout_correction.startswith("sequence"):
        assert inputs.old_logps is not None  # otherwise `couples_tokens`
        # The weight of a completion is a constant of its old log-probs. Its tokens get it through a
        # sampler's log-prob that gives each of them that weight, without bounds.
        old = rows.keep(inputs.old_logps)
        rollout = old - rollout_correction(inputs, p, rows, old).weight.log()
        p = p.replace(
            rollout_correction="token_truncate", rollout_min=-math.inf, rollout_max=math.inf
        )

    def flat(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.reshape(-1)

    tokens = LossInputs(
        logps=None,  # type: ignore[arg-type]  # comes chunk by chunk
        old_logps=flat(inputs.old_logps),
        advantages=rows.per_token(inputs.advantages).reshape(-1),
        mask=None,
        ref_logps=flat(inputs.ref_logps),
        rollout_logps=flat(rollout),
        token_weights=flat(inputs.token_weights),
        weights=weights.reshape(-1),
    )
    return TokenInputs(tokens, flat(grad_entropy), p.encode())


def take(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return x if x is None else x.index_select(0, rows)
