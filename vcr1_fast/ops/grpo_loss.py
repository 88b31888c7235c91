"""The GRPO family of losses on log-probabilities, with its gradient, in one pass.

`grpo_reference.py` has the formulae and the reference, `grpo_config.py` the options. The op
returns the loss together with its derivatives in logps and entropy, so the backward pass is one
multiplication by the incoming gradient; metrics stay on the device, nothing waits for it.
"""

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, from_triton, native
from vcr1_fast.ops.grpo_config import (
    VALUES,
    GRPOLossConfig,
    LossParameters,
    denominator,
    parameters,
)
from vcr1_fast.ops.grpo_metrics import name_metrics
from vcr1_fast.ops.grpo_reference import METRICS, reference
from vcr1_fast.ops.grpo_terms import LossInputs
from vcr1_fast.ops.upstream import once_differentiable, times_upstream

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


def _native(*args):
    tensors, kinds, values = list(args[:11]), args[11], args[12]
    logps, offsets, dtype = tensors[0], tensors[_OFFSETS], args[0].dtype
    for index, wanted in ((_MASK, torch.bool), (_OFFSETS, torch.int64), (_DENOMINATOR, dtype)):
        x = tensors[index]
        if x is not None and (x.dtype != wanted or x.device != logps.device):
            tensors[index] = x.to(logps.device, wanted)
    dense = [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]
    sequences = len(logps) if offsets is None else len(offsets) - 1
    # Packed tensors may hold tokens outside every segment, which the kernel does not visit.
    new = torch.empty_like if offsets is None else torch.zeros_like
    with_entropy = tensors[_ENTROPY] is not None and values[_ENTROPY_COEF]
    outputs = (
        logps.new_empty(()),
        new(dense[0]),
        new(dense[0]) if with_entropy else logps.new_empty(0),
        logps.new_empty(len(METRICS)),
    )
    count = sequences * native.grpo_loss_scratch
    scratch = torch.empty(count, dtype=torch.float64, device=logps.device)
    native.grpo_loss(dense, kinds, values, [*outputs, scratch], torch.get_num_threads())
    return outputs


_MASK, _OFFSETS, _ENTROPY, _DENOMINATOR = (
    LossInputs._fields.index(name) for name in ("mask", "cu_seqlens", "entropy", "denominator")
)
_ENTROPY_COEF = VALUES.index("entropy_coef")

grpo_loss_op = Op("grpo_loss", _SCHEMA, _fake)
grpo_loss_op.register("reference", _reference)
for _backend in ("cpu", "cuda"):
    grpo_loss_op.register(_backend, _native)
grpo_loss_op.register("triton", from_triton("grpo_loss", "grpo_loss"))


class _GRPOLoss(torch.autograd.Function):
    # Constants come in one tuple: each argument of a Function costs in both passes.
    @staticmethod
    def forward(ctx, logps, entropy, constants):
        old_logps, advantages, mask, ref_logps, *rest = constants
        loss, grad_logps, grad_entropy, metrics = grpo_loss_op.direct(
            logps, old_logps, advantages, mask, ref_logps, entropy, *rest
        )
        ctx.save_for_backward(grad_logps, grad_entropy)
        ctx.entropy_counts = grad_entropy.shape == logps.shape and entropy is not None
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_metrics):
        if grad_loss is None:
            return None, None, None
        grad_logps, grad_entropy = ctx.saved_tensors
        need_logps, need_entropy, _ = ctx.needs_input_grad
        need_entropy = need_entropy and ctx.entropy_counts
        return (
            times_upstream(grad_logps, grad_loss) if need_logps else None,
            times_upstream(grad_entropy, grad_loss) if need_entropy else None,
            None,
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
        The loss, 0-d, and a dict of 0-d tensors without gradient, which are made when the dict is
        looked at. "Mean" is over the tokens of this call:
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
    if not logps.is_floating_point():
        raise ValueError(f"logps must be floating point, got {logps.dtype}")
    tokens = {
        "old_logps": old_logps,
        "mask": mask,
        "ref_logps": ref_logps,
        "entropy": entropy,
        "rollout_logps": rollout_logps,
        "token_weights": token_weights,
    }
    check_inputs(config, logps.shape, advantages, tokens, cu_seqlens)
    if config.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {config.entropy_coef} needs entropy")
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    encoded = parameters(config)
    constants = (
        _as(dtype, old_logps),
        _as(dtype, advantages),
        mask,
        _as(dtype, ref_logps),
        _as(dtype, rollout_logps),
        _as(dtype, token_weights),
        cu_seqlens,
        None,
        denominator(config),
        encoded.kinds,
        encoded.values,
    )
    loss, metrics = _GRPOLoss.apply(_as(dtype, logps), _as(dtype, entropy), constants)
    return loss, name_metrics(metrics, config, tokens)


def check_inputs(
    config: GRPOLossConfig,
    shape: torch.Size,
    advantages: Tensor,
    tokens: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    """ValueError if inputs do not fit tokens of `shape` or one that the config needs is missing."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"tokens must be (B, T), or (N,) with cu_seqlens, got {tuple(shape)}")
        allowed = {(shape[0],), (shape[0], 1), tuple(shape)}
    else:
        if len(shape) != 1:
            raise ValueError(f"with cu_seqlens, tokens must be (N,), got {tuple(shape)}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be (B + 1,) integers, got {cu_seqlens.dtype} {_of(cu_seqlens)}"
            )
        allowed = {(len(cu_seqlens) - 1,), tuple(shape)}
    if tuple(advantages.shape) not in allowed:
        raise ValueError(
            f"advantages has shape {_of(advantages)}, expected one of {sorted(allowed)}"
        )
    for name, tensor in tokens.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {_of(tensor)}, expected {tuple(shape)}")
    if config.beta and tokens["ref_logps"] is None:
        raise ValueError(f"beta = {config.beta} needs ref_logps")
    if config.rollout_correction and tokens["rollout_logps"] is None:
        raise ValueError(f"rollout_correction {config.rollout_correction!r} needs rollout_logps")


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    # Asking first: a conversion to the same dtype costs ten times as long.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
