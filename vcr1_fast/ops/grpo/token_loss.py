"""The GRPO loss token by token, for trainers that average the loss themselves.

    loss_t = F_t P_t + beta K_t [r_t]

with the terms of `reference.py`. The derivative of sum_t u_t loss_t, for upstream gradients u_t, is
the one written there with u_t in place of the aggregation's weights.

Plain torch on every backend: a few dozen launches on (B, T), which `grpo_loss` does in two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import check_one_device
from vcr1_fast.ops.gather_logprobs import accumulation_dtype
from vcr1_fast.ops.grpo.config import GRPOLossConfig, LossParameters, parameters_of
from vcr1_fast.ops.grpo.loss import check_inputs
from vcr1_fast.ops.grpo.reference import LossInputs, clipped_tokens, token_terms


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
