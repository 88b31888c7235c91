"""The GRPO loss of each token, before it is averaged: for trainers that average it themselves.

    loss_t = F_t P_t + beta K_t [r_t]

with the terms of `grpo_reference.py`. The derivative of sum_t u_t loss_t, for upstream gradients
u_t, is the one written there with u_t in place of the aggregation's weights. Plain torch on every
backend: a few dozen launches on (B, T), which `grpo_loss` does without.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import BACKENDS, Op
from vcr1_fast.ops.grpo_config import GRPOLossConfig, LossParameters, parameters
from vcr1_fast.ops.grpo_loss import check_inputs
from vcr1_fast.ops.grpo_reference import clipped_tokens, clips, token_terms
from vcr1_fast.ops.grpo_terms import LossInputs


class TokenLosses(NamedTuple):
    """What `grpo_token_loss` returns; all of the log-probs' shape, 0 outside the mask.

    loss: differentiable in the log-probs. kl: the estimator, times r with the bias correction.
    clipped: 1 where r is outside the range on the side where clipping bites, else 0.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def _inputs(logps, old_logps, advantages, mask, ref_logps, rollout_logps, token_weights):
    return LossInputs(
        logps,
        old_logps,
        advantages,
        mask,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        token_weights=token_weights,
    )


def _forward(*arguments):
    *tensors, kinds, values = arguments
    p = LossParameters(tuple(kinds), tuple(values))
    terms = token_terms(_inputs(*tensors), p)
    policy, kl = terms.loss(p, 1.0)
    clipped = torch.zeros_like(policy)
    if clips(p):
        low, high = clipped_tokens(p, terms)
        clipped = (low | high).to(policy.dtype)
    keep = terms.rows.keep
    return policy + kl, keep(terms.kl * terms.correction), keep(clipped)


def _backward(grad_loss, *arguments):
    *tensors, kinds, values = arguments
    p = LossParameters(tuple(kinds), tuple(values))
    terms = token_terms(_inputs(*tensors), p)
    return terms.gradient(p, terms.rows.keep(grad_loss))


_ARGUMENTS = (
    "Tensor logps, Tensor? old_logps, Tensor advantages, Tensor? mask, Tensor? ref_logps, "
    "Tensor? rollout_logps, Tensor? token_weights, int[] kinds, float[] values"
)
forward_op = Op(
    "grpo_token_loss",
    f"({_ARGUMENTS}) -> (Tensor loss, Tensor kl, Tensor clipped)",
    lambda logps, *_: tuple(logps.new_empty(logps.shape) for _ in range(3)),
)
backward_op = Op(
    "grpo_token_loss_backward",
    f"(Tensor grad_loss, {_ARGUMENTS}) -> Tensor",
    lambda grad_loss, logps, *_: logps.new_empty(logps.shape),
)
for _backend in BACKENDS:
    forward_op.register(_backend, _forward)
    backward_op.register(_backend, _backward)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, *arguments):
        *tensors, kinds, values = arguments
        loss, kl, clipped = forward_op(logps, *arguments)
        ctx.save_for_backward(logps, *tensors)
        ctx.encoded = kinds, values
        ctx.mark_non_differentiable(kl, clipped)
        ctx.set_materialize_grads(False)
        return loss, kl, clipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_kl, _grad_clipped):
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad_loss is None:
            return None, *nothing
        return backward_op(grad_loss.contiguous(), *ctx.saved_tensors, *ctx.encoded), *nothing


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

    Arguments as in `grpo_loss`. The config's aggregation and its counts play no part; an entropy
    bonus, which is not a token's own, raises. Differentiable in logps, once.

    Raises:
        ValueError: shapes that do not fit, an input that the config needs and is missing, or
            entropy_coef.
    """
    if not logps.is_floating_point():
        raise ValueError(f"logps must be floating point, got {logps.dtype}")
    if config.entropy_coef:
        raise ValueError(f"entropy_coef = {config.entropy_coef} has no part in a token's loss")
    tokens = {
        "old_logps": old_logps,
        "mask": mask,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "token_weights": token_weights,
    }
    check_inputs(config, logps.shape, advantages, tokens, None)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    old_logps, ref_logps, rollout_logps, token_weights = (
        x if x is None else x.detach().to(dtype)
        for x in (old_logps, ref_logps, rollout_logps, token_weights)
    )
    encoded = parameters(config)
    return TokenLosses(
        *_TokenLoss.apply(
            logps.to(dtype),
            old_logps,
            advantages.detach().to(dtype),
            mask,
            ref_logps,
            rollout_logps,
            token_weights,
            encoded.kinds,
            encoded.values,
        )
    )
