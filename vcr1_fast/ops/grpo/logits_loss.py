"""GRPO loss of logits in memory, with their gradient computed in the forward pass.

    logp, entropy = those of softmax(logits / temperature) at the labels, as in `gather_logprobs`
    loss          = grpo_loss(logp, ...),  then dlogits from dloss/dlogp and dloss/dentropy

One read of the logits for the log-probs, and one read and one write for the gradient, in place on
request: 2 + 4 bytes per logit in bfloat16, where an eager trainer moves about 50. Losses of whole
completions need no more, because the first read gives all statistics.

On CUDA one kernel does both if no token's gradient depends on another token's log-prob: then a
row's log-prob, its gradient in the loss and the logits' gradient follow from the row alone, and the
row stays on the chip between one read and one write: 2 + 2 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native, schema_of
from vcr1_fast.ops.gather_logprobs import (
    KERNEL_DTYPES,
    accumulation_dtype,
    allocate,
    backward_op,
    check_logits,
    forward_op,
    inplace_backward_op,
    overlaps,
)
from vcr1_fast.ops.gather_logprobs import reference as gather_reference
from vcr1_fast.ops.grpo.config import GRPOLossConfig, decode
from vcr1_fast.ops.grpo.loss import (
    LossArguments,
    grpo_loss,
    grpo_loss_op,
    loss_arguments,
    name_metrics,
    native_parameters,
    times_upstream,
)
from vcr1_fast.ops.grpo.reference import METRICS, LossInputs
from vcr1_fast.ops.grpo.tokens import TokenInputs, as_tokens, couples_tokens, grpo_tokens_op


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


class LogitsOutputs(NamedTuple):
    """Tensors of the CUDA kernel's results, and the entropy gradients that it reads.

    logps (..., 1), entropy and lse (...), stats (..., 3) as of `gather_logprobs`; grad: shape and
    dtype of the logits; grad_entropy (...): dloss/dentropy, only with entropy.
    """

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor
    stats: Tensor
    grad: Tensor
    grad_entropy: Tensor | None


class _Rows:
    """The arguments of the op as the ops on rows of logits take them."""

    def __init__(self, arguments: LossArguments, tokens: TokenInputs | None = None) -> None:
        """tokens: the loss's tokens one by one, if that is possible and wanted."""
        self.arguments, self.tokens = arguments, tokens
        self.labels = arguments.labels[..., None]
        self.mask = arguments.mask
        if arguments.cu_seqlens is not None:  # a token may be in no completion
            keep = grpo_tokens_op(*arguments)[0] if tokens is None else tokens.keep
            self.mask = keep.reshape(arguments.labels.shape)
        self.state = (self.mask, arguments.row_temperature, arguments.temperature)

    def loss(self, logps: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        """Results of `grpo_loss_op` for log-probs (..., 1) and entropies (...) of the rows."""
        given = entropy if self.arguments.entropy else None
        inputs = self.arguments.inputs(logps[..., 0], given)
        results: tuple[Tensor, ...] = grpo_loss_op(*inputs, self.arguments.parameters)
        return results


def _statistics(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """(loss, metrics, arguments of the gradient's pass after the logits), from one read."""
    logps, entropy, _, stats = forward_op(logits, rows.labels, *rows.state, rows.arguments.entropy)
    loss, grad_logps, grad_entropy, metrics = rows.loss(logps, entropy)
    grads = (grad_logps[..., None], grad_entropy if grad_entropy.numel() else None, None)
    return loss, metrics, (rows.labels, logps, stats, *rows.state, *grads)


def _two_passes(logits: Tensor, rows: _Rows, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, metrics, rest = _statistics(logits, rows)
    return loss, metrics, backward_op(logits, *rest) if gradient else logits.new_empty(0)


def _two_passes_(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    loss, metrics, rest = _statistics(logits, rows)
    # After the statistics, which read the logits that this overwrites.
    inplace_backward_op(logits, *rest)
    return loss, metrics


def _fits_one_pass(logits: Tensor, arguments: LossArguments) -> bool:
    """Whether the CUDA kernel takes these logits and this loss."""
    return (
        logits.dtype in KERNEL_DTYPES
        and logits.stride(-1) == 1
        and not couples_tokens(arguments.old_logps, decode(arguments.parameters))
    )


def _one_pass(logits: Tensor, rows: _Rows, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, metrics); writes the logits' gradient to `grad`, which may be the logits."""
    assert rows.tokens is not None
    state = (rows.labels, *rows.state)
    logps, entropy = _launch(logits, state, rows.tokens, grad, rows.arguments.entropy)
    # The kernel weights its tokens; the loss and its metrics are sums over all of them afterwards.
    loss, _, _, metrics = rows.loss(logps, entropy)
    return loss, metrics


def _launch(
    logits: Tensor, state: tuple[Any, ...], tokens: TokenInputs, grad: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of rows of logits; `state`: labels, mask, temperatures, temperature."""
    labels, mask, row_temperature, temperature = state
    logps, entropy, lse, stats = allocate(logits, labels, with_entropy)
    native.logits_grpo_loss(
        logits=logits,
        labels=labels,
        mask=mask,
        row_temperature=row_temperature,
        temperature=temperature,
        tokens=tokens.inputs,
        parameters=native_parameters(tokens.parameters),
        outputs=LogitsOutputs(
            logps=logps,
            entropy=entropy if with_entropy else None,
            lse=lse,
            stats=stats,
            grad=grad,
            grad_entropy=tokens.grad_entropy if with_entropy else None,
        ),
    )
    return logps, entropy


def _run(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, gradient = arguments
    return _two_passes(logits, _Rows(LossArguments(*rest)), gradient)


def _run_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _two_passes_(logits, _Rows(LossArguments(*arguments)))


def _cuda(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, gradient = arguments
    args = LossArguments(*rest)
    # Without a gradient there is nothing to write, and one read is all that is needed.
    if not gradient or not _fits_one_pass(logits, args):
        return _two_passes(logits, _Rows(args), gradient)
    # Contiguous, whatever the logits' strides: the kernel then writes whole sectors.
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_one_pass(logits, _Rows(args, as_tokens(args)), grad), grad


def _cuda_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    args = LossArguments(*arguments)
    if not _fits_one_pass(logits, args):
        return _two_passes_(logits, _Rows(args))
    return _one_pass(logits, _Rows(args, as_tokens(args)), logits)


def _unpack_rows(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], TokenInputs, bool]:
    """(labels, mask, temperatures and temperature; the tokens; whether to compute entropies)."""
    state, (*rest, grad_entropy, with_entropy, parameters) = arguments[:4], arguments[4:]
    inputs = LossInputs(*rest)
    return state, TokenInputs(state[0], inputs, grad_entropy, parameters), with_entropy


def _overwrite_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    state, tokens, with_entropy = _unpack_rows(arguments)
    labels, *rest = state
    logps, entropy, _, stats = forward_op(logits, labels, *rest, with_entropy)
    gradients = tokens.gradients(logps[:, 0])[:, None]
    inplace_backward_op(logits, labels, logps, stats, *rest, gradients, tokens.grad_entropy, None)
    return logps, entropy


def _overwrite_cuda_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if logits.dtype not in KERNEL_DTYPES:
        return _overwrite_(logits, *arguments)
    state, tokens, with_entropy = _unpack_rows(arguments)
    return _launch(logits, state, tokens, logits, with_entropy)


def _fake_(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty(len(METRICS), dtype=dtype)


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, gradient = arguments
    return *_fake_(logits), logits.new_empty(logits.shape if gradient else (0,))


logits_grpo_loss_op = Op(
    "logits_grpo_loss",
    f"(Tensor logits, {schema_of(LossArguments)}, bool gradient) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_logits)",
    _fake,
)
inplace_logits_grpo_loss_op = Op(
    "logits_grpo_loss_",
    f"(Tensor(a!) logits, {schema_of(LossArguments)}) -> (Tensor loss, Tensor metrics)",
    _fake_,
)
# Only CUDA has a kernel that does it all. Elsewhere the ops on rows and tokens choose their own
# backends, and these names say which choices are allowed.
for _backend in ("reference", "cpu", "triton"):
    logits_grpo_loss_op.register(_backend, _run)
    inplace_logits_grpo_loss_op.register(_backend, _run_)
# Rows of logits (n, V) that a head has just made, overwritten with their gradient.
logits_token_gradients_op = Op(
    "logits_token_gradients_",
    "(Tensor(a!) logits, Tensor labels, Tensor? mask, Tensor? row_temperature, float temperature, "
    f"{schema_of(LossInputs).replace('Tensor logps', 'Tensor? unused', 1)}, "
    "Tensor? grad_entropy, bool entropy, str parameters) -> (Tensor logps, Tensor entropy)",
    lambda logits, labels, *rest: allocate(logits, labels, rest[-2])[:2],
)
for _backend in ("reference", "cpu", "triton"):
    logits_token_gradients_op.register(_backend, _overwrite_)
logits_token_gradients_op.register("cuda", _overwrite_cuda_)
logits_grpo_loss_op.register("cuda", _cuda)
inplace_logits_grpo_loss_op.register("cuda", _cuda_)


class _LogitsGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inplace: bool, arguments: LossArguments
    ) -> tuple[Tensor, Tensor]:
        needed = bool(ctx.needs_input_grad[0])
        if inplace and needed:
            loss, metrics = inplace_logits_grpo_loss_op(logits, *arguments)
            # Makes the backward pass of any other op that saved the logits raise.
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
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_metrics: None) -> Any:
        if grad_loss is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return times_upstream(gradient, grad_loss).to(gradient.dtype), None, None


def logits_grpo_loss(
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
    differentiable in the logits, once. If the weight of the head is at hand, `linear_grpo_loss`
    needs no logits.

    Args:
        logits: (B, T, V), or (N, V) packed with cu_seqlens, float32, bfloat16 or float16 (float64
            by the reference): row t predicts labels[t]. Rows may be strided; those outside the
            mask are not read and get gradient 0.
        labels: (B, T) or (N,) integers in [0, V) inside the mask.
        advantages, mask, old_logps, ref_logps, rollout_logps, token_weights, cu_seqlens, config:
            as in `grpo_loss`.
        temperature: the logits are divided by it: a number, or a tensor with one per label.
        entropy: report the mean entropy (always done if entropy_coef is not 0).
        inplace: overwrite the logits with their gradient, which saves a second tensor of their
            size. Only when nothing else needs them, including a second backward pass. Ignored
            inside torch.compile and when no gradient is recorded.

    Returns and raises as `grpo_loss`; also ValueError for logits, labels or temperatures that do
    not fit.
    """
    check_logits(logits, labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    given = LossInputs(
        logps=logits,
        old_logps=old_logps,
        advantages=advantages,
        mask=mask,
        ref_logps=ref_logps,
        rollout_logps=rollout_logps,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
    )
    arguments = loss_arguments(
        config, labels, given, logits, temperature=temperature, entropy=entropy
    )
    if not torch.is_grad_enabled():  # the gradient is made in the forward pass: spare it
        logits = logits.detach()
    inplace = inplace and not torch.compiler.is_compiling() and not overlaps(logits)
    loss, metrics = _LogitsGRPOLoss.apply(logits, inplace, arguments)
    return loss, name_metrics(metrics, config, given, arguments.entropy)
