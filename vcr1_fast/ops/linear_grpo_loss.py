"""GRPO loss of an LM head's input, with the gradient computed in the forward pass.

    logits = hidden W^T + bias,  logp, entropy = those of softmax(logits / temperature)
    loss   = grpo_loss(logp, ...),  then for each row with g = dloss/dlogp, h = dloss/dentropy:
    dlogits from (g, h) as in `gather_logprobs`, dhidden = dlogits W, dW = sum dlogits^T hidden

Rows go through in chunks, so that the logits never exist as a whole, and only rows inside the mask
go through at all. Where a token's gradient depends on its own log-prob alone, a chunk's logits are
made once and turned into their gradient in place: 6 N H V operations instead of the 8 of a head
that computes them again in the backward pass. Sequence ratios, vespo and the off-policy mask need
the log-probs of whole completions first, and take those 8. The backward pass multiplies by the
incoming gradient on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops.backend import BACKENDS, Op
from vcr1_fast.ops.gather_logprobs import row_temperatures
from vcr1_fast.ops.grpo_config import GRPOLossConfig, LossParameters, denominator, parameters
from vcr1_fast.ops.grpo_loss import check_inputs, grpo_loss_op
from vcr1_fast.ops.grpo_metrics import name_metrics
from vcr1_fast.ops.grpo_reference import METRICS
from vcr1_fast.ops.grpo_terms import Completions, LossInputs
from vcr1_fast.ops.grpo_tokens import as_tokens, couples_tokens, take
from vcr1_fast.ops.linear_chunks import check_chunk_rows
from vcr1_fast.ops.linear_head import (
    Head,
    HeadGradients,
    check_head,
    check_softcap,
    empty_gradients,
    under_autocast,
)
from vcr1_fast.ops.upstream import times_upstream


def _run(hidden, weight, labels, bias, row_temperature, *arguments):
    old, advantages, mask, ref, rollout, token_weights, cu_seqlens, count = arguments[:8]
    temperature, softcap, with_entropy, chunk_rows, needed, kinds, values = arguments[8:]
    p = LossParameters(tuple(kinds), tuple(values))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head = Head(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1, 1),
        None if row_temperature is None else row_temperature.reshape(-1),
        temperature,
        softcap,
        with_entropy,
    )
    logps = hidden.new_zeros(labels.shape, dtype=dtype)
    entropy = torch.zeros_like(logps) if with_entropy else None
    inputs = LossInputs(
        logps, old, advantages, mask, ref, entropy, rollout, token_weights, cu_seqlens, None, count
    )
    any_gradient = any(needed)
    chunks, buffer = head.chunks(_valid_rows(inputs), chunk_rows, gradient=any_gradient)
    gradients = HeadGradients(head, needed, len(chunks))
    one_pass = any_gradient and not couples_tokens(inputs, p)
    tokens = as_tokens(inputs, p) if one_pass else None
    for part in chunks:
        chunk = head.logits(part, buffer, gradient=one_pass)
        statistics = head.forward(chunk)
        logps.view(-1).index_copy_(0, part, statistics.logps[:, 0])
        if with_entropy:
            entropy.view(-1).index_copy_(0, part, statistics.entropy)
        if tokens is not None:
            upstream = tokens.upstream(part, statistics.logps)
            gradients.add(chunk, head.backward_(chunk, statistics, *upstream))
    loss, grad_logps, grad_entropy, metrics = grpo_loss_op(*inputs, p.kinds, p.values)
    if any_gradient and not one_pass:
        grad_entropy = grad_entropy.reshape(-1) if grad_entropy.numel() else None
        for part in chunks:
            chunk = head.logits(part, buffer, gradient=True)
            statistics = head.forward(chunk)
            upstream = take(grad_logps.reshape(-1), part), take(grad_entropy, part)
            gradients.add(chunk, head.backward_(chunk, statistics, *upstream))
    grad_hidden, *others = gradients.results()
    grad_hidden = grad_hidden.reshape(hidden.shape if needed[0] else (0,))
    return loss, metrics, grad_hidden, *others


def _valid_rows(inputs: LossInputs) -> Tensor:
    """Flat indices of the tokens that count; without a mask all do, and nothing is waited for."""
    if inputs.mask is None:
        return torch.arange(inputs.logps.numel(), device=inputs.logps.device)
    return Completions(inputs).mask.reshape(-1).nonzero()[:, 0]


def _fake(hidden, weight, labels, bias, row_temperature, *arguments):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(METRICS), dtype=dtype),
        *empty_gradients(hidden, weight, arguments[12]),
    )


linear_grpo_loss_op = Op(
    "linear_grpo_loss",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? row_temperature, "
    "Tensor? old_logps, Tensor advantages, Tensor? mask, Tensor? ref_logps, "
    "Tensor? rollout_logps, Tensor? token_weights, Tensor? cu_seqlens, Tensor? denominator, "
    "float temperature, float softcap, bool entropy, int chunk_rows, bool[] needed, int[] kinds, "
    "float[] values) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _fake,
)
# Matrix products are torch's on every backend; the ops on rows and tokens choose their own.
for _backend in BACKENDS:
    linear_grpo_loss_op.register(_backend, _run)


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, *arguments):
        needed = [bool(need) for need in ctx.needs_input_grad[:3]]
        *tensors, temperature, softcap, entropy, chunk_rows, kinds, values = arguments
        loss, metrics, *gradients = linear_grpo_loss_op(
            hidden, weight, labels, bias, *tensors,
            temperature, softcap, entropy, chunk_rows, needed, kinds, values,
        )  # fmt: skip
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_metrics):
        inputs = len(ctx.needs_input_grad)
        if grad_loss is None:
            return (None,) * inputs
        gradients = [
            times_upstream(gradient, grad_loss).to(dtype) if need else None
            for gradient, dtype, need in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return (*gradients, *(None,) * (inputs - 3))


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_rows: int | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - immutable
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of the tokens that an LM head predicts, without the logits in memory.

    The same loss, gradients and metrics as `linear_logprobs` followed by `grpo_loss`, to rounding;
    differentiable in hidden, weight and bias, once. The gradient of the weight is summed in
    float32 and kept in its own dtype (float32 for float16); a weight that needs none costs nothing.

    Args:
        hidden: (B, T, H), or (N, H) packed with cu_seqlens: row t predicts labels[t]. Rows outside
            the mask are never looked at.
        weight, bias: (V, H) and (V,) of the head, in hidden's dtype.
        labels: (B, T) or (N,) integers in [0, V) inside the mask.
        advantages, old_logps, ref_logps, rollout_logps, token_weights, cu_seqlens, config: as in
            `grpo_loss`.
        mask: as in `grpo_loss`. Choosing its rows waits once for a GPU; None takes all rows
            without waiting, and cu_seqlens must then cover them.
        temperature: the logits are divided by it: a number, or a tensor with one per label.
        entropy: report the mean entropy (always done if entropy_coef is not 0).
        softcap: c of z = c tanh(x / c), applied to the logits before the temperature (Gemma).
        chunk_rows: rows whose logits exist at a time; None chooses when the op runs, as
            `linear_logprobs` does.

    Returns and raises as `grpo_loss`; also ValueError for shapes or dtypes of the head that do
    not fit, or labels outside the vocabulary.
    """
    shape = labels.shape
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, labels, bias)
    with_entropy = entropy or config.entropy_coef != 0
    tokens = {
        "old_logps": old_logps,
        "mask": mask,
        "ref_logps": ref_logps,
        "rollout_logps": rollout_logps,
        "token_weights": token_weights,
    }
    check_inputs(config, shape, advantages, tokens, cu_seqlens)
    chunk_rows, softcap = check_chunk_rows(chunk_rows), check_softcap(softcap)
    row_temperature, temperature = row_temperatures(temperature, shape, hidden.device)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    old_logps, advantages, ref_logps, rollout_logps, token_weights = (
        x if x is None else x.detach().to(dtype)
        for x in (old_logps, advantages, ref_logps, rollout_logps, token_weights)
    )
    if not torch.is_grad_enabled():
        # The gradient is made in the forward pass, where parameters still ask for one.
        hidden, weight, bias = (x if x is None else x.detach() for x in (hidden, weight, bias))
    encoded = parameters(config)
    loss, metrics = _LinearGRPOLoss.apply(
        hidden,
        weight,
        bias,
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
        softcap,
        with_entropy,
        chunk_rows,
        encoded.kinds,
        encoded.values,
    )
    tokens["entropy"] = hidden if with_entropy else None
    return loss, name_metrics(metrics, config, tokens)
