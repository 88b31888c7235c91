"""Log-probabilities of tokens under an LM head, without its logits in memory.

    logits = hidden W^T + bias,  then logps, entropy and lse of `gather_logprobs`

Rows go through in chunks, and rows outside the mask are skipped. The backward pass recomputes a
chunk's logits (8 N H V operations in all), overwrites them with their gradient using the statistics
kept from the forward pass, and takes dhidden = dlogits W, dW = sum dlogits^T hidden. On the CPU it
skips rows whose upstream gradients are all 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import opaque, schema_of
from vcr1_fast.ops.gather_logprobs import (
    LogProbs,
    accumulation_dtype,
    row_mask,
    row_temperatures,
)
from vcr1_fast.ops.gather_logprobs import reference as gather_reference
from vcr1_fast.ops.lm_head import (
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


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    **options: Any,
) -> LogProbs:
    """The specification: all logits at once, and `gather_logprobs.reference` with `options`."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    # Before the temperature, as Gemma samples.
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return gather_reference(logits, labels, **options)


class Arguments(NamedTuple):
    """Arguments that the forward and the backward pass share, in schema order.

    hidden (N, H), labels (N, K) int64, mask and row_temperature (N,); softcap 0: no cap;
    chunk_rows 0: chosen at run time.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    mask: Tensor | None
    row_temperature: Tensor | None
    temperature: float
    softcap: float
    entropy: bool
    chunk_rows: int

    def head(self, rows: Tensor | None) -> Head:
        """The head over these rows; None: all."""
        return Head(
            self.hidden if rows is None else gather_rows_op(self.hidden, rows),
            self.weight,
            self.bias,
            _taken(self.labels, rows),
            _taken(self.row_temperature, rows),
            self.temperature,
            self.softcap,
            self.entropy,
        )

    def valid_rows(self) -> Tensor | None:
        """Indices of the rows in the mask; None: all."""
        return None if self.mask is None else self.mask.nonzero()[:, 0]


def _taken(x: Any, rows: Tensor | None) -> Any:
    return x if x is None or rows is None else x.index_select(0, rows)


class Upstream(NamedTuple):
    """Arguments of the backward pass after `Arguments`, in schema order.

    logps and stats: results of the forward pass. needed: whether hidden, weight and bias need a
    gradient.
    """

    logps: Tensor
    stats: Tensor
    needed: list[bool]
    grad_logps: Tensor
    grad_entropy: Tensor | None
    grad_lse: Tensor | None


# Schemas are flat: the backward op takes both tuples one after the other.
_FIELDS = len(Arguments._fields)


def _outputs(arguments: Arguments, fill: bool) -> RowStatistics:
    hidden, labels = arguments.hidden, arguments.labels
    make = hidden.new_zeros if fill else hidden.new_empty
    rows = labels.shape[0]
    shapes = (labels.shape, (rows if arguments.entropy else 0,), (rows,), (rows, 3))
    return RowStatistics(*(make(shape, dtype=accumulation_dtype(hidden)) for shape in shapes))


def _forward(*args: Any) -> tuple[Tensor, ...]:
    arguments = Arguments(*args)
    # Masked rows keep the zeros of `_outputs`.
    rows = arguments.valid_rows()
    head = arguments.head(rows)
    out = _outputs(arguments, fill=True)
    chunks, buffer = head.chunks(arguments.chunk_rows, gradient=False)
    for part in chunks:
        statistics = head.forward(head.logits(part, buffer, gradient=False))
        for whole, values in zip(out, statistics, strict=True):
            if whole.numel():  # the entropy is (0,) unless requested
                whole[part if rows is None else rows[part]] = values
    return tuple(out)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """(dhidden, dW, dbias); those that are not needed are (0,)."""
    arguments, given = Arguments(*args[:_FIELDS]), Upstream(*args[_FIELDS:])
    rows = arguments.valid_rows()
    grads = (given.grad_logps, given.grad_entropy, given.grad_lse)
    if arguments.hidden.device.type == "cpu":  # a GPU would have to be waited for
        # Trainers mask or clip many tokens: their rows would cost three matrix products each.
        live = [(g != 0).view(*g.shape, 1).flatten(1).any(1) for g in grads if g is not None]
        wanted = torch.stack(live).any(0)
        if arguments.mask is not None:
            wanted &= arguments.mask
        rows = None if bool(wanted.all()) else wanted.nonzero()[:, 0]
    head = arguments.head(rows)
    chunks, buffer = head.chunks(arguments.chunk_rows, gradient=True)
    gradients = HeadGradients(head, given.needed, len(chunks))
    logps, stats = _taken(given.logps, rows), _taken(given.stats, rows)
    taken_grads = [_taken(g, rows) for g in grads]
    # The gradient needs neither entropy nor lse: `stats` carries what they are made of.
    unused = given.logps.new_empty(0)
    for part in chunks:
        chunk = head.logits(part, buffer, gradient=True)
        upstream = [g if g is None else g[part] for g in taken_grads]
        statistics = RowStatistics(logps[part], unused, unused, stats[part])
        gradients.add(chunk, head.backward_(chunk, statistics, *upstream))
    grad_hidden, *others = gradients.results()
    if rows is not None and given.needed[0]:
        grad_hidden = scatter_rows_op(grad_hidden, rows, len(arguments.hidden))
    return grad_hidden, *others


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    arguments, given = Arguments(*args[:_FIELDS]), Upstream(*args[_FIELDS:])
    return empty_gradients(arguments.hidden, arguments.weight, given.needed)


forward_op = opaque(
    "linear_logprobs",
    f"({schema_of(Arguments)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    lambda *args: tuple(_outputs(Arguments(*args), fill=False)),
)
backward_op = opaque(
    "linear_logprobs_backward",
    f"({schema_of(Arguments)}, {schema_of(Upstream)}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mask: Tensor | None,
        row_temperature: Tensor | None,
        options: tuple[float, float, bool, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """options: temperature, softcap, entropy and chunk_rows of `Arguments`."""
        arguments = Arguments(hidden, weight, bias, labels, mask, row_temperature, *options)
        logps, row_entropy, lse, stats = forward_op(*arguments)
        ctx.save_for_backward(hidden, weight, bias, labels, mask, row_temperature, logps, stats)
        ctx.options = options
        # A frozen head saves a product per chunk; the op itself does not see autograd's context.
        ctx.needed = [bool(need) for need in ctx.needs_input_grad[:3]]
        ctx.set_materialize_grads(False)
        if not arguments.entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logps, row_entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Any:
        *tensors, logps, stats = ctx.saved_tensors
        arguments = Arguments(*tensors, *ctx.options)
        # The op demands this gradient, which is None where only entropy or lse were used.
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        upstream = Upstream(logps, stats, ctx.needed, grad_logps, grad_entropy, grad_lse)
        gradients = backward_op(*arguments, *upstream)
        # hidden, weight and bias have one dtype; float16 gradients come in float32.
        dtype = arguments.hidden.dtype
        needed = zip(gradients, ctx.needed, strict=True)
        return (*(g.to(dtype) if need else None for g, need in needed), *(None,) * 4)


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
        three are cast to its dtype). With tied embeddings, pass the embedding's weight.
    labels: (...) or (..., K) integers in [0, V) inside the mask.
    temperature, mask, entropy: as in `gather_logprobs`. Masked rows are in no matrix product;
        selecting rows waits once for a GPU.
    softcap: c of z = c tanh(x / c), which some models (Gemma) apply to the logits x before the
        temperature; None: no cap.
    chunk_rows: rows whose logits exist at a time; None: chosen at run time, for an eighth of the
        free memory, at most 256 MiB of logits on the CPU and 1 GiB on a GPU. Sums over chunks, and
        so the last bits of a weight's gradient, depend on it.

    Results are float32 (float64 for float64), and differentiable once in hidden, weight and bias.
    The gradient of the weight is summed over chunks in float32; a weight without gradient costs
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
