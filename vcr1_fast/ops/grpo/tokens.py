"""The tokens of the GRPO loss one by one, for heads that make their logits row by row.

`as_tokens` turns a batch into single tokens whose losses add up to the batch's loss: each token
gets its weight W_t in the batch (`reference.py`), its completion's advantage and its rollout
correction. That is possible if no token's gradient takes another token's log-prob
(`couples_tokens`).

`pack` moves the tokens inside a mask together, so that the head and the loss see no mask any more.

Each op is one or two kernels, whatever the options: counts stay on the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, native, schema_of
from vcr1_fast.ops.grpo.config import LossParameters, decode
from vcr1_fast.ops.grpo.loss import LossArguments, native_parameters
from vcr1_fast.ops.grpo.reference import (
    Completions,
    LossInputs,
    aggregation_weights,
    entropy_weights,
    map_tensors,
    rollout_correction,
    token_terms,
)


class TokenOutputs(NamedTuple):
    """Results of the op `grpo_tokens`, (tokens) each; the last two are (0,) unless needed.

    keep: bool, in the mask and in a completion. weights: of the token in the loss. grad_entropy:
    dloss/dentropy. rollout_logps: the sampler's log-probs that give each token the correction of
    its whole completion. All but `keep` are 0 outside it.
    """

    keep: Tensor
    weights: Tensor
    advantages: Tensor
    grad_entropy: Tensor | None
    rollout_logps: Tensor | None


def _corrects_completions(p: LossParameters, old_logps: Tensor | None) -> bool:
    return p.rollout_correction.startswith("sequence") and old_logps is not None


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    args = LossArguments(*arguments)
    p, shape = decode(args.parameters), args.labels.shape
    new = args.advantages.new_empty
    return (
        new(shape, dtype=torch.bool),
        new(shape),
        new(shape),
        new(shape if p.entropy_coef else (0,)),
        new(shape if _corrects_completions(p, args.old_logps) else (0,)),
    )


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    args = LossArguments(*arguments)
    p = decode(args.parameters)
    inputs = args.inputs(args.advantages.new_zeros(args.labels.shape), None)
    rows = Completions(inputs)
    counts = rows.sum(rows.mask.to(inputs.logps.dtype))
    weights = rows.keep(rows.spread(aggregation_weights(inputs, p, counts)))
    outputs = [rows.mask, weights, rows.per_token(inputs.advantages)]
    bonus = inputs.logps.new_empty(0)
    if p.entropy_coef:
        bonus = -p.entropy_coef * entropy_weights(inputs, p, rows, weights)
    rollout = inputs.logps.new_empty(0)
    if _corrects_completions(p, args.old_logps):
        assert inputs.old_logps is not None
        old = rows.keep(inputs.old_logps)
        rollout = old - rollout_correction(inputs, p, rows, old).weight.log()
    return tuple(x.clone() for x in (*outputs, bonus, rollout))


def _native(*arguments: Any) -> tuple[Tensor, ...]:
    args = LossArguments(*arguments)
    outputs = _outputs(*arguments)
    offsets = args.cu_seqlens
    sequences = len(args.labels) if offsets is None else len(offsets) - 1
    scratch = sequences * native.grpo_loss_scratch
    keep, weights, advantages, *optional = outputs
    bonus, rollout = (x if x.shape == weights.shape else None for x in optional)
    native.grpo_tokens(
        inputs=args.inputs(weights, None),  # the weights, for the shape of the log-probs
        parameters=native_parameters(args.parameters),
        outputs=TokenOutputs(keep, weights, advantages, bonus, rollout),
        scratch=torch.empty(scratch, dtype=torch.float64, device=args.labels.device),
        num_threads=torch.get_num_threads(),
    )
    return outputs


grpo_tokens_op = Op(
    "grpo_tokens",
    f"({schema_of(LossArguments)}) -> (Tensor keep, Tensor weights, Tensor advantages, "
    "Tensor grad_entropy, Tensor rollout_logps)",
    _outputs,
)


def _gradients_reference(logps: Tensor, *arguments: Any) -> Tensor:
    *tensors, parameters = arguments
    columns = map_tensors(lambda x: x[:, None], LossInputs(*tensors))._replace(logps=logps[:, None])
    weights = columns.weights
    assert weights is not None
    p = decode(parameters)
    return token_terms(columns, p).gradient(p, weights)[:, 0]


def _gradients_native(logps: Tensor, *arguments: Any) -> Tensor:
    *tensors, parameters = arguments
    grad = torch.empty_like(logps)
    native.grpo_token_gradients(
        logps=logps,
        inputs=LossInputs(*tensors),
        parameters=native_parameters(parameters),
        grad_logps=grad,
        num_threads=torch.get_num_threads(),
    )
    return grad


# `inputs.logps` is the first argument, given by itself; the rest as in `TokenInputs`.
_GIVEN = schema_of(LossInputs).replace("Tensor logps", "Tensor? unused", 1)
gradients_op = Op(
    "grpo_token_gradients",
    f"(Tensor logps, {_GIVEN}, str parameters) -> Tensor",
    lambda logps, *_: torch.empty_like(logps),
)


def _pack_reference(
    rows: Tensor, vectors: list[Tensor], cu_seqlens: Tensor | None, length: int, sequences: int
) -> tuple[list[Tensor], Tensor]:
    if cu_seqlens is None:
        cu_seqlens = torch.arange(sequences + 1, device=rows.device) * length
    return [x.index_select(0, rows) for x in vectors], torch.searchsorted(rows, cu_seqlens)


def _pack_outputs(
    rows: Tensor, vectors: list[Tensor], cu_seqlens: Tensor | None, length: int, sequences: int
) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty(len(rows)) for x in vectors], rows.new_empty(sequences + 1)


def _pack_native(
    rows: Tensor, vectors: list[Tensor], cu_seqlens: Tensor | None, length: int, sequences: int
) -> tuple[list[Tensor], Tensor]:
    packed, offsets = _pack_outputs(rows, vectors, cu_seqlens, length, sequences)
    native.grpo_pack(
        rows=rows,
        vectors=vectors,
        packed=packed,
        offsets=cu_seqlens,
        length=length,
        packed_offsets=offsets,
        num_threads=torch.get_num_threads(),
    )
    return packed, offsets


pack_op = Op(
    "grpo_pack",
    "(Tensor rows, Tensor[] vectors, Tensor? cu_seqlens, int length, int sequences) "
    "-> (Tensor[] packed, Tensor offsets)",
    _pack_outputs,
)
for _op, _plain, _kernel in (
    (grpo_tokens_op, _reference, _native),
    (gradients_op, _gradients_reference, _gradients_native),
    (pack_op, _pack_reference, _pack_native),
):
    for _backend in ("reference", "triton"):  # of these Triton has no kernels
        _op.register(_backend, _plain)
    for _backend in ("cpu", "cuda"):
        _op.register(_backend, _kernel)


def couples_tokens(old_logps: Tensor | None, p: LossParameters) -> bool:
    """Whether a token's gradient depends on log-probs of its completion's other tokens."""
    return (
        p.level != "token"
        or p.loss_type == "vespo"
        or math.isfinite(p.off_policy_threshold)
        # The correction of a completion is known beforehand only from given old log-probs.
        or (p.rollout_correction.startswith("sequence") and old_logps is None)
    )


class TokenInputs(NamedTuple):
    """The loss's inputs as flat vectors (N,), for losses without `couples_tokens`.

    keep: bool, the tokens that count. inputs: without log-probs and mask, and with the weight that
    each token has in the whole batch. parameters: encoded, for these inputs.
    """

    keep: Tensor
    inputs: LossInputs
    grad_entropy: Tensor | None
    parameters: str

    def part(self, rows: slice) -> TokenInputs:
        """Those of consecutive tokens."""
        bonus = self.grad_entropy
        return self._replace(
            keep=self.keep[rows],
            inputs=map_tensors(lambda x: x[rows], self.inputs),
            grad_entropy=None if bonus is None else bonus[rows],
        )

    def gradients(self, logps: Tensor) -> Tensor:
        """dloss/dlogp (N,) at the log-probs (N,) of all these tokens."""
        gradients: Tensor = gradients_op(logps, *self.inputs, self.parameters)
        return gradients


def as_tokens(args: LossArguments) -> TokenInputs:
    """The single tokens whose losses add up to the loss of `args`, which must not couple them."""
    p = decode(args.parameters)
    out = TokenOutputs(*grpo_tokens_op(*args))
    corrected = _corrects_completions(p, args.old_logps)
    if corrected:
        # The weight of a completion is a constant of its old log-probs. Its tokens get it through a
        # sampler's log-prob that gives each of them that weight, without bounds.
        p = p.replace(
            rollout_correction="token_truncate", rollout_min=-math.inf, rollout_max=math.inf
        )
    inputs = LossInputs(
        logps=None,  # type: ignore[arg-type]  # comes row by row
        old_logps=args.old_logps,
        advantages=out.advantages,
        mask=None,
        ref_logps=args.ref_logps,
        rollout_logps=out.rollout_logps if corrected else args.rollout_logps,
        token_weights=args.token_weights,
        weights=out.weights,
    )
    bonus = out.grad_entropy if p.entropy_coef else None
    return TokenInputs(
        out.keep.reshape(-1),
        map_tensors(lambda x: x.reshape(-1), inputs),
        None if bonus is None else bonus.reshape(-1),
        p.encode(),
    )


_PACKED = (
    "labels",
    "row_temperature",
    "old_logps",
    "ref_logps",
    "rollout_logps",
    "token_weights",
    "advantages",
)


def pack(args: LossArguments) -> tuple[LossArguments, Tensor]:
    """`args`, which have a mask, packed without one; and the tokens' flat indices, ascending.

    Finding out how many there are waits for a GPU.
    """
    keep = args.mask
    assert keep is not None
    sequences, length = len(args.labels), 0
    if args.cu_seqlens is not None:
        # A token may be in the mask and in no completion.
        keep = grpo_tokens_op(*args)[0]
        sequences = len(args.cu_seqlens) - 1
    else:
        length = args.labels.shape[1]
    rows = keep.reshape(-1).nonzero()[:, 0]
    given = {name: getattr(args, name) for name in _PACKED}
    advantages = args.advantages
    each = advantages.shape == args.labels.shape and (
        args.cu_seqlens is None or len(advantages) != sequences
    )
    changes: dict[str, Any] = {}
    if not each:
        given["advantages"] = None
        changes["advantages"] = advantages.reshape(sequences)
    given = {name: x for name, x in given.items() if x is not None}
    packed, offsets = pack_op(
        rows, [x.reshape(-1) for x in given.values()], args.cu_seqlens, length, sequences
    )
    changes |= dict(zip(given, packed, strict=True))
    if each:
        changes["advantages"] = changes["advantages"][:, None]
    return args._replace(**changes, mask=None, cu_seqlens=offsets), rows
