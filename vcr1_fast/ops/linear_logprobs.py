"""Log-probabilities of tokens under an LM head, without its logits in memory.

    logits = hidden W^T + bias,  then logps, entropy and lse of `gather_logprobs`

Rows go through in chunks, and only rows inside the mask go through at all. The backward pass makes
a chunk's logits again (8 N H V operations in all), turns them into their gradient in place with the
statistics kept from the forward pass, and takes dhidden = dlogits W, dW = sum dlogits^T hidden. On
the CPU rows whose upstream gradients are all 0 are left out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops.backend import BACKENDS, Op
from vcr1_fast.ops.gather_logprobs import LogProbs, row_mask, row_temperatures
from vcr1_fast.ops.gather_logprobs import reference as gather_reference
from vcr1_fast.ops.linear_chunks import check_chunk_rows
from vcr1_fast.ops.linear_head import (
    Head,
    HeadGradients,
    RowStatistics,
    check_head,
    check_softcap,
    empty_gradients,
    under_autocast,
)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    **options,
) -> LogProbs:
    """The specification: all logits at once, and `gather_logprobs.reference` with `options`."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return gather_reference(logits, labels, **options)


def _valid_rows(mask: Tensor | None, count: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.arange(count, device=device)
    return mask.nonzero()[:, 0]


def _outputs(hidden: Tensor, labels: Tensor, entropy: bool, fill: bool) -> RowStatistics:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    make = hidden.new_zeros if fill else hidden.new_empty
    rows = labels.shape[0]
    shapes = (labels.shape, (rows if entropy else 0,), (rows,), (rows, 3))
    return RowStatistics(*(make(shape, dtype=dtype) for shape in shapes))


def _forward(
    hidden, weight, bias, labels, mask, row_temperature, temperature, softcap, entropy, chunk_rows
):
    head = Head(hidden, weight, bias, labels, row_temperature, temperature, softcap, entropy)
    out = _outputs(hidden, labels, entropy, fill=True)
    valid = _valid_rows(mask, len(hidden), hidden.device)
    chunks, buffer = head.chunks(valid, chunk_rows, gradient=False)
    for rows in chunks:
        statistics = head.forward(head.logits(rows, buffer, gradient=False))
        for whole, part in zip(out, statistics, strict=True):
            if whole.numel():
                whole.index_copy_(0, rows, part)
    return tuple(out)


def _backward(
    hidden, weight, bias, labels, logps, stats, mask, row_temperature, temperature, softcap,
    chunk_rows, needed, grad_logps, grad_entropy, grad_lse,
):  # fmt: skip
    head = Head(hidden, weight, bias, labels, row_temperature, temperature, softcap, False)
    rows = _valid_rows(mask, len(hidden), hidden.device)
    upstream = (grad_logps, grad_entropy, grad_lse)
    if hidden.device.type == "cpu":  # elsewhere finding them would wait for the device
        live = [(g != 0).view(*g.shape, 1).flatten(1).any(1) for g in upstream if g is not None]
        rows = rows[torch.stack(live).any(0)[rows]]
    chunks, buffer = head.chunks(rows, chunk_rows, gradient=True)
    gradients = HeadGradients(head, needed, len(chunks))
    none = logps.new_empty(0)
    for part in chunks:
        chunk = head.logits(part, buffer, gradient=True)
        rest = [g if g is None else g.index_select(0, part) for g in (logps, stats, *upstream)]
        statistics = RowStatistics(rest[0], none, none, rest[1])
        gradients.add(chunk, head.backward_(chunk, statistics, *rest[2:]))
    return gradients.results()


def _backward_fake(hidden, weight, bias, *arguments):
    return empty_gradients(hidden, weight, arguments[8])


# hidden (N, H), labels (N, K), mask and row_temperature (N,).
forward_op = Op(
    "linear_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, "
    "Tensor? row_temperature, float temperature, float softcap, bool entropy, int chunk_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, labels, mask, rows, temperature, softcap, entropy, _: tuple(
        _outputs(hidden, labels, entropy, fill=False)
    ),
)
backward_op = Op(
    "linear_logprobs_backward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logps, Tensor stats, "
    "Tensor? mask, Tensor? row_temperature, float temperature, float softcap, int chunk_rows, "
    "bool[] needed, Tensor grad_logps, Tensor? grad_entropy, Tensor? grad_lse) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
# Matrix products are torch's on every backend; the op on rows chooses its own.
for _backend in BACKENDS:
    forward_op.register(_backend, _forward)
    backward_op.register(_backend, _backward)


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, mask, row_temperature, options):
        temperature, softcap, entropy, chunk_rows = options
        logps, row_entropy, lse, stats = forward_op(
            hidden, weight, bias, labels, mask, row_temperature, *options
        )
        ctx.save_for_backward(hidden, weight, bias, labels, logps, stats, mask, row_temperature)
        ctx.options = (temperature, softcap, chunk_rows)
        ctx.needed = [bool(need) for need in ctx.needs_input_grad[:3]]
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logps, row_entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, grad_entropy, grad_lse):
        hidden, weight, bias, labels, logps, stats, *state = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        gradients = backward_op(
            hidden, weight, bias, labels, logps, stats, *state, *ctx.options, ctx.needed,
            grad_logps, grad_entropy, grad_lse,
        )  # fmt: skip
        inputs = (hidden, weight, bias)
        needed = zip(gradients, inputs, ctx.needed, strict=True)
        return (*(g.to(x.dtype) if need else None for g, x, need in needed), *(None,) * 4)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    chunk_rows: int | None = None,
) -> LogProbs:
    """`gather_logprobs(hidden @ weight.T + bias, labels)` without the logits in memory.

    hidden: (..., H); weight: (V, H) and bias: (V,) in hidden's dtype (under torch.autocast all
        three are cast to its dtype). Tied embeddings are no special case: pass the same weight.
    labels: (...) or (..., K) integers in [0, V) inside the mask.
    temperature, mask, entropy: as in `gather_logprobs`. Masked rows are left out of every matrix
        product; choosing rows waits once for a GPU.
    softcap: c of z = c tanh(x / c), which some models (Gemma) apply to the logits x before the
        temperature; None for none.
    chunk_rows: rows whose logits exist at a time; None chooses when the op runs: an eighth of the
        free memory, at most 256 MiB of logits on the CPU and 1 GiB on a GPU. Sums over chunks, and
        so the last bits of a weight's gradient, depend on it.

    Results are float32 (float64 for float64), and differentiable once in hidden, weight and bias.
    The gradient of the weight is summed over chunks in float32; a weight that needs none costs
    nothing. ValueError for shapes, dtypes, labels or temperatures that do not fit.
    """
    lead = hidden.shape[:-1]
    several = labels.ndim == hidden.ndim
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, labels[..., 0] if several else labels, bias)
    row_temperature, scalar = row_temperatures(temperature, lead, hidden.device)
    valid = row_mask(mask, lead)
    count = lead.numel()
    logps, row_entropy, lse = LinearLogprobs.apply(
        hidden.reshape(count, hidden.shape[-1]),
        weight,
        bias,
        labels.to(torch.int64).reshape(count, labels.shape[-1] if several else 1).contiguous(),
        valid if valid is None else valid.reshape(count),
        row_temperature if row_temperature is None else row_temperature.reshape(count),
        (scalar, check_softcap(softcap), entropy, check_chunk_rows(chunk_rows)),
    )
    return LogProbs(
        logps.reshape(labels.shape),
        row_entropy.reshape(lead) if entropy else None,
        lse.reshape(lead),
    )
