"""The GRPO family of losses on log-probabilities, with its gradient, in one pass.

`grpo_reference.py` has the formulae and the reference, `grpo_config.py` the options. The op
returns the loss together with its derivatives in logps and entropy, so the backward pass is one
multiplication by the incoming gradient; metrics stay on the device, nothing waits for it.
"""

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op
from vcr1_fast.ops.grpo_config import GRPOLossConfig, LossParameters, denominator, parameters
from vcr1_fast.ops.grpo_reference import METRICS, reference
from vcr1_fast.ops.grpo_terms import LossInputs

_SCHEMA = (
    "(Tensor logps, Tensor? old_logps, Tensor advantages, Tensor? mask, Tensor? ref_logps, "
    "Tensor? entropy, Tensor? rollout_logps, Tensor? token_weights, Tensor? cu_seqlens, "
    "Tensor? weights, Tensor? denominator, int[] kinds, float[] values) "
    "-> (Tensor loss, Tensor grad_logps, Tensor grad_entropy, Tensor metrics)"
)


def _fake(*args):
    inputs, p = LossInputs(*args[:11]), LossParameters(tuple(args[11]), tuple(args[12]))
    logps = inputs.logps
    with_entropy = inputs.entropy is not None and p.value("entropy_coef")
    return (
        logps.new_empty(()),
        logps.new_empty(logps.shape),
        logps.new_empty(logps.shape if with_entropy else (0,)),
        logps.new_empty(len(METRICS)),
    )


def _reference(*args):
    return reference(LossInputs(*args[:11]), LossParameters(tuple(args[11]), tuple(args[12])))


grpo_loss_op = Op("grpo_loss", _SCHEMA, _fake)
grpo_loss_op.register("reference", _reference)


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, entropy, old_logps, advantages, mask, *rest):
        ref_logps, rollout_logps, token_weights, cu_seqlens, weights, count, kinds, values = rest
        loss, grad_logps, grad_entropy, metrics = grpo_loss_op(
            logps,
            old_logps,
            advantages,
            mask,
            ref_logps,
            entropy,
            rollout_logps,
            token_weights,
            cu_seqlens,
            weights,
            count,
            kinds,
            values,
        )
        ctx.save_for_backward(grad_logps, grad_entropy)
        ctx.entropy_counts = grad_entropy.shape == logps.shape and entropy is not None
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_metrics):
        nothing = (None,) * 11
        if grad_loss is None:
            return None, None, *nothing
        grad_logps, grad_entropy = ctx.saved_tensors
        need_logps, need_entropy = ctx.needs_input_grad[:2]
        return (
            grad_loss * grad_logps if need_logps else None,
            grad_loss * grad_entropy if need_entropy and ctx.entropy_counts else None,
            *nothing,
        )


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - immutable
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch of completions, and its metrics.

    A completion is a row of (B, T), or a segment cu_seqlens[b]:cu_seqlens[b + 1] of packed (N,)
    tensors. What stands outside the mask (or outside every segment) is never looked at, even if
    it is inf or nan. Differentiable in `logps` and, with `entropy_coef`, in `entropy`.

    Args:
        logps: log-probs of the policy, (B, T) or (N,). Half precision is computed in float32.
        old_logps: log-probs under the policy that the step started from; None where that is the
            policy itself (ratio 1 with the full gradient).
        advantages: (B,), or one per token. A packed vector of B values with N = B counts as (B,).
        mask: tokens that count (non-zero), any dtype; None for all.
        ref_logps: log-probs of the reference model for the KL term; needed if beta is not 0.
        entropy: entropy of each token's distribution; needed if entropy_coef is not 0.
        rollout_logps: log-probs the sampler reported, for the rollout correction and its metrics;
            nan where it gave none (then the token is taken as sampled from `old_logps`).
        token_weights: weights of the policy term and the entropy bonus of each token, for
            example 0/1 for its high-entropy tokens. Not applied to the KL term.
        cu_seqlens: (B + 1,) int32 or int64, increasing offsets of packed completions.

    Returns:
        The loss, 0-d, and a dict of 0-d tensors without gradient. "Mean" is over the tokens of
        this call:
        num_tokens, num_sequences (completions with a token);
        policy_loss: the policy term's part of the loss;
        ratio_mean, ratio_min, ratio_max: of r at the chosen level;
        approx_kl: mean of e^x - 1 - x, x = logp - old: how far the policy has moved;
        clip_low, clip_high, clip_region: share of tokens below the range with A < 0, above it
        with A > 0, either (clipped losses and cispo); clip_delta: above delta with A < 0;
        kl: mean estimator before bias correction (with ref_logps); entropy: mean (with entropy);
        vespo_phi: mean weight (vespo); off_policy_kept: share kept (off_policy_threshold);
        rollout_gap_mean, rollout_gap_max: of |old - rollout|; rollout_kl: mean of e^g - 1 - g with
        g = old - rollout; rollout_weight_mean: mean correction; rollout_clipped: share of tokens
        outside the bounds (with rollout_logps).

    Raises:
        ValueError: shapes that do not fit, or an input that the config needs and is missing.
    """
    _check(logps, advantages, cu_seqlens, config)
    tokens = {
        "old_logps": old_logps,
        "mask": mask,
        "ref_logps": ref_logps,
        "entropy": entropy,
        "rollout_logps": rollout_logps,
        "token_weights": token_weights,
    }
    for name, tensor in tokens.items():
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} has shape {_of(tensor)}, logps {_of(logps)}")
    check_needed(config, ref_logps, rollout_logps)
    if config.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {config.entropy_coef} needs entropy")
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    logps, entropy, old_logps, ref_logps, rollout_logps, token_weights = (
        tensor if tensor is None else tensor.to(dtype)
        for tensor in (logps, entropy, old_logps, ref_logps, rollout_logps, token_weights)
    )
    encoded = parameters(config)
    loss, metrics = _GRPOLoss.apply(
        logps,
        entropy,
        old_logps,
        advantages.to(dtype),
        mask,
        ref_logps,
        rollout_logps,
        token_weights,
        cu_seqlens,
        None,
        denominator(config),
        encoded.kinds,
        encoded.values,
    )
    present = reported_metrics(
        config, ref_logps is not None, entropy is not None, rollout_logps is not None
    )
    values = dict(zip(METRICS, metrics.unbind(), strict=True))
    return loss, {name: values[name] for name in present}


def reported_metrics(
    config: GRPOLossConfig, reference: bool, entropy: bool, rollout: bool
) -> tuple[str, ...]:
    """Names of the metrics that mean something for this call."""
    conditions = {
        "kl": reference,
        "entropy": entropy,
        "clip_low": config.loss_type not in ("sapo", "vespo"),
        "clip_delta": config.delta is not None,
        "vespo_phi": config.loss_type == "vespo",
        "off_policy_kept": config.off_policy_threshold is not None,
        "rollout_gap_mean": rollout,
    }
    conditions["clip_high"] = conditions["clip_region"] = conditions["clip_low"]
    for name in ("gap_max", "kl", "weight_mean", "clipped"):
        conditions[f"rollout_{name}"] = rollout
    return tuple(name for name in METRICS if conditions.get(name, True))


def check_needed(
    config: GRPOLossConfig, ref_logps: Tensor | None, rollout_logps: Tensor | None
) -> None:
    """ValueError if the config needs an input that is missing."""
    if config.beta and ref_logps is None:
        raise ValueError(f"beta = {config.beta} needs ref_logps")
    if config.rollout_correction and rollout_logps is None:
        raise ValueError(f"rollout_correction {config.rollout_correction!r} needs rollout_logps")


def _check(
    logps: Tensor, advantages: Tensor, cu_seqlens: Tensor | None, config: GRPOLossConfig
) -> None:
    if not logps.is_floating_point():
        raise ValueError(f"logps must be floating point, got {logps.dtype}")
    if cu_seqlens is None:
        if logps.ndim != 2:
            raise ValueError(
                f"logps must be (B, T), or (N,) with cu_seqlens, got shape {_of(logps)}"
            )
        allowed = {(logps.shape[0],), (logps.shape[0], 1), tuple(logps.shape)}
    else:
        if logps.ndim != 1:
            raise ValueError(f"with cu_seqlens, logps must be (N,), got shape {_of(logps)}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be (B + 1,) integers, got {cu_seqlens.dtype} {_of(cu_seqlens)}"
            )
        allowed = {(len(cu_seqlens) - 1,), tuple(logps.shape)}
    if tuple(advantages.shape) not in allowed:
        raise ValueError(
            f"advantages has shape {_of(advantages)}, expected one of {sorted(allowed)}"
        )
    for name in ("num_items", "num_sequences"):
        count = getattr(config, name)
        if isinstance(count, Tensor) and count.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {_of(count)}")


def _of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
