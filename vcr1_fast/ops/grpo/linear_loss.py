"""GRPO loss of an LM head's input, with the gradient computed in the forward pass.

    logits = hidden W^T + bias,  logp, entropy = those of softmax(logits / temperature)
    loss   = grpo_loss(logp, ...),  then for each row with g = dloss/dlogp, h = dloss/dentropy:
    dlogits from (g, h) as in `gather_logprobs`, dhidden = dlogits W, dW = sum dlogits^T hidden

Rows go through in chunks, so the logits never exist as a whole, and rows outside the mask are
skipped. If a token's gradient depends on its own log-prob alone, a chunk's logits are computed once
and overwritten with their gradient: 6 N H V operations instead of the 8 of a head that recomputes
them in the backward pass. Sequence ratios, vespo and the off-policy mask need the log-probs of
whole completions first, and take those 8. The backward pass multiplies by the incoming gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import opaque, schema_of
from vcr1_fast.ops.gather_logprobs import accumulation_dtype
from vcr1_fast.ops.grpo.config import GRPOLossConfig, decode
from vcr1_fast.ops.grpo.logits_loss import logits_token_gradients_op
from vcr1_fast.ops.grpo.loss import (
    LossArguments,
    grpo_loss_op,
    loss_arguments,
    name_metrics,
    times_upstream,
)
from vcr1_fast.ops.grpo.reference import METRICS, LossInputs
from vcr1_fast.ops.grpo.tokens import TokenInputs, as_tokens, couples_tokens, pack
from vcr1_fast.ops.lm_head import (
    Chunk,
    Head,
    HeadGradients,
    RowStatistics,
    check_chunk_rows,
    check_head,
    check_softcap,
    empty_gradients,
    gather_rows_op,
    scatter_rows_op,
    under_autocast,
)


class HeadArguments(NamedTuple):
    """What `linear_grpo_loss` takes besides `LossArguments`, in schema order.

    softcap 0: no cap. chunk_rows 0: chosen at run time. needed: whether hidden, weight and bias
    need a gradient.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    chunk_rows: int
    needed: list[bool]


_HEAD_FIELDS = len(HeadArguments._fields)


def _unpack_arguments(*arguments: Any) -> tuple[HeadArguments, LossArguments]:
    return HeadArguments(*arguments[:_HEAD_FIELDS]), LossArguments(*arguments[_HEAD_FIELDS:])


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """(loss, metrics, dhidden, dW, dbias); gradients that are not needed are (0,)."""
    given, args = _unpack_arguments(*arguments)
    hidden, needed = given.hidden.reshape(-1, given.hidden.shape[-1]), given.needed
    rows = None
    if args.mask is not None:
        # From here on there is no mask: a chunk is a slice, and nothing is gathered chunk by chunk.
        args, rows = pack(args)
        hidden = gather_rows_op(hidden, rows)
    p = decode(args.parameters)
    head = Head(
        hidden,
        given.weight,
        given.bias,
        args.labels.reshape(-1, 1),
        None if args.row_temperature is None else args.row_temperature.reshape(-1),
        args.temperature,
        given.softcap,
        args.entropy,
    )
    any_gradient = any(needed)
    chunks, buffer = head.chunks(given.chunk_rows, gradient=any_gradient)
    # Every chunk overwrites the same buffer, so gradients are taken before the next one.
    gradients = HeadGradients(head, needed, len(chunks))
    one_pass = any_gradient and not couples_tokens(args.old_logps, p)
    tokens = as_tokens(args) if one_pass else None
    forward = []
    for part in chunks:
        chunk = head.logits(part, buffer, gradient=one_pass)
        if tokens is None:
            forward.append(head.forward(chunk))
            continue
        statistics, inverse = _overwrite(head, chunk, tokens.part(part))
        forward.append(statistics)
        gradients.add(chunk, inverse)
    logps, entropy = _joined(head, forward, args.labels.shape)
    # All tokens at once, which cost little beside a chunk's logits: metrics need the whole batch.
    inputs = args.inputs(logps, entropy if args.entropy else None)
    loss, grad_logps, grad_entropy, metrics = grpo_loss_op(*inputs, args.parameters)
    if any_gradient and tokens is None:
        # The logits again: keeping them would take the memory that chunks save.
        flat, bonus = grad_logps.reshape(-1), grad_entropy.reshape(-1)
        for part, statistics in zip(chunks, forward, strict=True):
            chunk = head.logits(part, buffer, gradient=True)
            upstream = flat[part], bonus[part] if bonus.numel() else None
            gradients.add(chunk, head.backward_(chunk, statistics, *upstream))
    grad_hidden, grad_weight, grad_bias = gradients.results()
    if needed[0]:
        if rows is not None:
            grad_hidden = scatter_rows_op(grad_hidden, rows, given.hidden[..., 0].numel())
        grad_hidden = grad_hidden.reshape(given.hidden.shape)
    return loss, metrics, grad_hidden, grad_weight, grad_bias


def _overwrite(
    head: Head, chunk: Chunk, tokens: TokenInputs
) -> tuple[RowStatistics, Tensor | None]:
    """(statistics, inverse scale of float16) of a chunk whose logits become their gradient."""
    if chunk.slope is not None or chunk.logits.dtype == torch.float16:
        # The gradient is scaled by what is known after the log-probs, or once more multiplied.
        statistics = head.forward(chunk)
        upstream = tokens.gradients(statistics.logps[:, 0]), tokens.grad_entropy
        return statistics, head.backward_(chunk, statistics, *upstream)
    logps, entropy = logits_token_gradients_op(
        chunk.logits,
        *head.arguments(chunk.rows),
        *tokens.inputs,
        tokens.grad_entropy,
        head.entropy,
        tokens.parameters,
    )
    none = logps.new_empty(0)
    return RowStatistics(logps, entropy, none, none), None


def _joined(head: Head, chunks: list[RowStatistics], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of all chunks' rows; the latter means nothing unless it was asked for."""
    if not chunks:
        empty = head.hidden.new_empty(shape, dtype=accumulation_dtype(head.hidden))
        return empty, empty
    logps, entropy = ([getattr(x, name) for x in chunks] for name in ("logps", "entropy"))
    out = [
        x[0] if len(x) == 1 else torch.cat(x) for x in (logps, entropy if head.entropy else logps)
    ]
    return out[0].reshape(shape), out[1].reshape(shape)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    given, _ = _unpack_arguments(*arguments)
    # Shapes of the gradients depend on `needed` only, not on the mask's values.
    dtype = accumulation_dtype(given.hidden)
    return (
        given.hidden.new_empty((), dtype=dtype),
        given.hidden.new_empty(len(METRICS), dtype=dtype),
        *empty_gradients(given.hidden, given.weight, given.needed),
    )


_linear_grpo_loss = opaque(
    "linear_grpo_loss",
    f"({schema_of(HeadArguments)}, {schema_of(LossArguments)}) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _run,
    _fake,
)


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: tuple[float, int],
        arguments: LossArguments,
    ) -> tuple[Tensor, Tensor]:
        needed = [bool(need) for need in ctx.needs_input_grad[:3]]
        given = HeadArguments(hidden, weight, bias, *options, needed)
        loss, metrics, *gradients = _linear_grpo_loss(*given, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_metrics: None) -> Any:
        if grad_loss is None:
            return None, None, None, None, None
        gradients = [
            times_upstream(gradient, grad_loss).to(dtype) if need else None
            for gradient, dtype, need in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
            )
        ]
        return *gradients, None, None


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
    differentiable in hidden, weight and bias, once. The gradient of the weight is summed in float32
    and kept in the weight's dtype (float32 for float16); a weight without gradient costs nothing.

    Args:
        hidden: (B, T, H), or (N, H) packed with cu_seqlens: row t predicts labels[t]. Rows outside
            the mask are never read.
        weight, bias: (V, H) and (V,) of the head, in hidden's dtype.
        labels: (B, T) or (N,) integers in [0, V) inside the mask.
        advantages, old_logps, ref_logps, rollout_logps, token_weights, cu_seqlens, config: as in
            `grpo_loss`.
        mask: as in `grpo_loss`. Selecting its rows waits once for a GPU; None takes all rows
            without waiting, and cu_seqlens must then cover them.
        temperature: the logits are divided by it: a number, or a tensor with one per label.
        entropy: report the mean entropy (always done if entropy_coef is not 0).
        softcap: c of z = c tanh(x / c), applied to the logits before the temperature (Gemma).
        chunk_rows: rows whose logits exist at a time; None: chosen at run time, as in
            `linear_logprobs`.

    Returns and raises as `grpo_loss`; also ValueError for shapes or dtypes of the head that do
    not fit, or labels outside the vocabulary.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, labels, bias)
    given = LossInputs(
        logps=hidden,
        old_logps=old_logps,
        advantages=advantages,
        mask=mask,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
    )
    arguments = loss_arguments(
        config, labels, given, hidden, temperature=temperature, entropy=entropy
    )
    options = (check_softcap(softcap), check_chunk_rows(chunk_rows))
    if not torch.is_grad_enabled():
        # needs_input_grad is true for parameters even then, and the forward pass would compute
        # gradients that nobody can read.
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss, metrics = _LinearGRPOLoss.apply(hidden, weight, bias, options, arguments)
    return loss, name_metrics(metrics, config, given, arguments.entropy)
