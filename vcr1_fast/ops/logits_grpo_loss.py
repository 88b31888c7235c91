"""GRPO loss of logits in memory, with their gradient computed in the forward pass.

    logp, entropy = those of softmax(logits / temperature) at the labels, as in `gather_logprobs`
    loss          = grpo_loss(logp, ...),  then dlogits from dloss/dlogp and dloss/dentropy

One read of the logits for the log-probs, and one read and one write for the gradient, in place if
asked for: 2 + 4 bytes a logit in bfloat16, where an eager trainer moves about 50. Losses that weigh
whole completions need no more, for their statistics come from the first read. On CUDA, a row of a
loss that weighs tokens one by one stays on the chip between the two: 2 + 2 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op
from vcr1_fast.ops.gather_logprobs import (
    backward_op,
    check_logits,
    forward_op,
    inplace_backward_op,
    overlaps,
    row_temperatures,
)
from vcr1_fast.ops.gather_logprobs import reference as gather_reference
from vcr1_fast.ops.grpo_config import GRPOLossConfig, denominator, parameters
from vcr1_fast.ops.grpo_loss import check_inputs, grpo_loss
from vcr1_fast.ops.grpo_metrics import name_metrics
from vcr1_fast.ops.grpo_reference import METRICS
from vcr1_fast.ops.logits_one_pass import arrange, fits_one_pass, one_pass
from vcr1_fast.ops.upstream import times_upstream


def reference(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    old_logps: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - immutable
    **tokens: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification: `gather_logprobs.reference`, then `grpo_loss`. Rows outside the mask must
    hold valid labels and finite logits; `tokens` as in `grpo_loss`."""
    rows = None if mask is None else mask != 0
    out = gather_reference(logits, labels, temperature=temperature, mask=rows, entropy=True)
    return grpo_loss(
        out.logps, old_logps, advantages, mask, entropy=out.entropy, config=config, **tokens
    )


def _statistics(logits, given):
    """(loss, metrics, what the gradient's pass takes) from one read of the logits."""
    logps, entropy, _, stats = forward_op(logits, given.labels, *given.state, given.entropy)
    loss, grad_logps, grad_entropy, metrics = given.loss(logps, entropy)
    grads = (grad_logps[..., None], grad_entropy if grad_entropy.numel() else None, None)
    return loss, metrics, (given.labels, logps, stats, *given.state, *grads)


def _apart(logits, given, gradient):
    loss, metrics, rest = _statistics(logits, given)
    return loss, metrics, backward_op(logits, *rest) if gradient else logits.new_empty(0)


def _apart_(logits, given):
    loss, metrics, rest = _statistics(logits, given)
    inplace_backward_op(logits, *rest)
    return loss, metrics


def _run(logits, *arguments):
    return _apart(logits, arrange(logits, *arguments[:-1]), arguments[-1])


def _run_(logits, *arguments):
    return _apart_(logits, arrange(logits, *arguments))


def _cuda(logits, *arguments):
    *arguments, gradient = arguments
    given = arrange(logits, *arguments)
    if not gradient or not fits_one_pass(logits, given):
        return _apart(logits, given, gradient)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *one_pass(logits, given, grad), grad


def _cuda_(logits, *arguments):
    given = arrange(logits, *arguments)
    if not fits_one_pass(logits, given):
        return _apart_(logits, given)
    return one_pass(logits, given, logits)


def _fake_(logits, *_):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=dtype), logits.new_empty(len(METRICS), dtype=dtype)


def _fake(logits, *arguments):
    shape = logits.shape if arguments[-1] else (0,)
    return *_fake_(logits), logits.new_empty(shape)


_ARGUMENTS = (
    "Tensor labels, Tensor? row_temperature, Tensor? old_logps, Tensor advantages, Tensor? mask, "
    "Tensor? ref_logps, Tensor? rollout_logps, Tensor? token_weights, Tensor? cu_seqlens, "
    "Tensor? denominator, float temperature, bool entropy, int[] kinds, float[] values"
)
logits_grpo_loss_op = Op(
    "logits_grpo_loss",
    f"(Tensor logits, {_ARGUMENTS}, bool gradient) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_logits)",
    _fake,
)
inplace_logits_grpo_loss_op = Op(
    "logits_grpo_loss_",
    f"(Tensor(a!) logits, {_ARGUMENTS}) -> (Tensor loss, Tensor metrics)",
    _fake_,
)
# The ops on rows and tokens choose their own backends.
for _backend in ("reference", "cpu", "triton"):
    logits_grpo_loss_op.register(_backend, _run)
    inplace_logits_grpo_loss_op.register(_backend, _run_)
logits_grpo_loss_op.register("cuda", _cuda)
inplace_logits_grpo_loss_op.register("cuda", _cuda_)


class _LogitsGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, inplace, *arguments):
        needed = bool(ctx.needs_input_grad[0])
        if inplace and needed:
            loss, metrics = inplace_logits_grpo_loss_op(logits, *arguments)
            # So that whoever saved the logits for a backward pass of its own hears of it.
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            loss, metrics, gradient = logits_grpo_loss_op(logits, *arguments, needed)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_metrics):
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad_loss is None:
            return None, *nothing
        (gradient,) = ctx.saved_tensors
        return times_upstream(gradient, grad_loss).to(gradient.dtype), *nothing


def grpo_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    inplace: bool = False,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - immutable
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of the tokens that logits predict, and the logits' gradient in the same call.

    The same loss, gradient and metrics as `gather_logprobs` followed by `grpo_loss`, to rounding;
    differentiable in the logits, once. Where the weight of the head is at hand, `linear_grpo_loss`
    does without the logits.

    Args:
        logits: (B, T, V), or (N, V) packed with cu_seqlens, float32, bfloat16 or float16 (float64
            by the reference): row t predicts labels[t]. Rows may be strided; those outside the
            mask are not read and get gradient 0.
        labels: (B, T) or (N,) integers in [0, V) inside the mask.
        advantages, mask, old_logps, ref_logps, rollout_logps, token_weights, cu_seqlens, config:
            as in `grpo_loss`.
        temperature: the logits are divided by it: a number, or a tensor with one per label.
        entropy: report the mean entropy (always done if entropy_coef is not 0).
        inplace: write the gradient over the logits at once, which spares a second tensor of their
            size. Only when nothing else needs them, a second backward pass included. Without a
            gradient to make, and inside torch.compile, they are left alone.

    Returns and raises as `grpo_loss`; also ValueError for logits, labels or temperatures that do
    not fit.
    """
    check_logits(logits, labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    tokens = {
        "old_logps": old_logps,
        "mask": mask,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "token_weights": token_weights,
    }
    check_inputs(config, labels.shape, advantages, tokens, cu_seqlens)
    with_entropy = entropy or config.entropy_coef != 0
    row_temperature, temperature = row_temperatures(temperature, labels.shape, logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    old_logps, advantages, ref_logps, rollout_logps, token_weights = (
        x if x is None else x.detach().to(dtype)
        for x in (old_logps, advantages, ref_logps, rollout_logps, token_weights)
    )
    if not torch.is_grad_enabled():  # the gradient is made in the forward pass
        logits = logits.detach()
    encoded = parameters(config)
    loss, metrics = _LogitsGRPOLoss.apply(
        logits,
        inplace and not torch.compiler.is_compiling() and not overlaps(logits),
        labels.to(torch.int64),
        row_temperature,
        old_logps,
        advantages,
        mask,
        ref_logps,
        rollout_logps,
        token_weights,
        cu_seqlens,
        denominator(config),
        temperature,
        with_entropy,
        encoded.kinds,
        encoded.values,
    )
    return loss, name_metrics(
        metrics, config, {**tokens, "entropy": logits if with_entropy else None}
    )
