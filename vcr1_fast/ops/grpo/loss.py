"""The GRPO family of losses on log-probabilities, with its gradient, in one pass.

`reference.py` has the formulae and the reference, `config.py` the options. The op returns the loss
with its derivatives in logps and entropy, so the backward pass is one multiplication by the
incoming gradient. Losses of LM heads (`linear_loss.py`, `logits_loss.py`) call the same op.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops.backend import Op, from_triton, native, schema_of
from vcr1_fast.ops.gather_logprobs import accumulation_dtype, row_temperatures
from vcr1_fast.ops.grpo.config import LOSS_TYPES, GRPOLossConfig, decode, denominator, encode
from vcr1_fast.ops.grpo.reference import METRICS, LossInputs, reference


class LossOutputs(NamedTuple):
    """Results of the op `grpo_loss`, with the scratch memory of the native kernels.

    loss: 0-d. grad_logps: shape of logps. grad_entropy: shape of logps, or (0,) without an entropy
    bonus. metrics: in the order of `METRICS`. scratch: float64, `native.grpo_loss_scratch` per
    completion.
    """

    loss: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor
    metrics: Tensor
    scratch: Tensor


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, parameters = arguments
    inputs = LossInputs(*tensors)
    logps = inputs.logps
    with_entropy = inputs.entropy is not None and decode(parameters).entropy_coef
    return (
        logps.new_empty(()),
        logps.new_empty(logps.shape),
        logps.new_empty(logps.shape if with_entropy else (0,)),
        logps.new_empty(len(METRICS)),
    )


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, parameters = arguments
    return reference(LossInputs(*tensors), decode(parameters))


@lru_cache(maxsize=256)
def native_parameters(parameters: str) -> Any:
    """The C++ struct of encoded parameters, bound by name: built once per config, not per call."""
    return native.GrpoParameters(**vars(decode(parameters)))


def _native(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, parameters = arguments
    # Asking costs a tenth of a call that has nothing to copy.
    inputs = LossInputs(*[x if x is None or x.is_contiguous() else x.contiguous() for x in tensors])
    logps, offsets = inputs.logps, inputs.cu_seqlens
    if inputs.mask is not None and not _fits(inputs.mask, torch.bool, logps):
        inputs = inputs._replace(mask=inputs.mask.to(logps.device, torch.bool))
    if offsets is not None and not _fits(offsets, torch.int64, logps):
        inputs = inputs._replace(cu_seqlens=offsets.to(logps.device, torch.int64))
    if inputs.denominator is not None and not _fits(inputs.denominator, logps.dtype, logps):
        inputs = inputs._replace(denominator=inputs.denominator.to(logps.device, logps.dtype))
    sequences = len(logps) if offsets is None else len(offsets) - 1
    with_entropy = inputs.entropy is not None and decode(parameters).entropy_coef
    scratch = sequences * native.grpo_loss_scratch
    outputs = LossOutputs(
        loss=logps.new_empty(()),
        grad_logps=torch.empty_like(logps),
        grad_entropy=torch.empty_like(logps) if with_entropy else logps.new_empty(0),
        metrics=logps.new_empty(len(METRICS)),
        scratch=torch.empty(scratch, dtype=torch.float64, device=logps.device),
    )
    native.grpo_loss(inputs, native_parameters(parameters), outputs, torch.get_num_threads())
    return outputs.loss, outputs.grad_logps, outputs.grad_entropy, outputs.metrics


def _fits(x: Tensor, dtype: torch.dtype, like: Tensor) -> bool:
    return x.dtype == dtype and x.device == like.device


grpo_loss_op = Op(
    "grpo_loss",
    f"({schema_of(LossInputs)}, str parameters) "
    "-> (Tensor loss, Tensor grad_logps, Tensor grad_entropy, Tensor metrics)",
    _fake,
)
grpo_loss_op.register("reference", _reference)
for _backend in ("cpu", "cuda"):
    grpo_loss_op.register(_backend, _native)
grpo_loss_op.register("triton", from_triton("grpo_loss", "grpo_loss"))


# Whether the running backward pass keeps its graph for another one. Absent in some releases: then
# gradients are copied, which is always right.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _multiply(gradient: Tensor, upstream: Tensor) -> None:
    # Reading the value would wait for a GPU; on the CPU it saves a pass over the gradient.
    if upstream.device.type != "cpu" or upstream.item() != 1:
        gradient.mul_(upstream)


def _multiply_cuda(gradient: Tensor, upstream: Tensor) -> None:
    # The kernel reads the value on the device, and returns when it is 1: the pass over the gradient
    # would take as long as the loss's own kernel.
    if gradient.is_contiguous() or gradient.stride(-1) == 1:
        native.multiply(x=gradient, factor=upstream)
    else:
        gradient.mul_(upstream)


multiply_op = Op("multiply_", "(Tensor(a!) gradient, Tensor upstream) -> ()", lambda *_: None)
# Only CUDA has a kernel.
for _backend in ("reference", "cpu", "triton"):
    multiply_op.register(_backend, _multiply)
multiply_op.register("cuda", _multiply_cuda)


def times_upstream(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream (0-d), in gradient's own memory unless the graph is kept."""
    if torch.compiler.is_compiling() or _graph_is_kept():
        return gradient * upstream  # another pass will read the gradient again
    # In place: a new tensor of a weight's size costs more than the product.
    multiply_op.direct(gradient, upstream)
    return gradient


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of this name, without its cost unless create_graph records the backward."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


class _GRPOLoss(torch.autograd.Function):
    # Constants are one argument: each argument of a Function costs time in both passes. `logps` and
    # `entropy` are there for autograd; they are those of the inputs.
    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, entropy: Tensor | None, constants: tuple[LossInputs, str]
    ) -> tuple[Tensor, Tensor]:
        inputs, parameters = constants
        loss, grad_logps, grad_entropy, metrics = grpo_loss_op.direct(*inputs, parameters)
        ctx.save_for_backward(grad_logps, grad_entropy)
        ctx.has_entropy_bonus = entropy is not None and grad_entropy.shape == logps.shape
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_metrics: None) -> Any:
        if grad_loss is None:
            return None, None, None
        grad_logps, grad_entropy = ctx.saved_tensors
        need_logps, need_entropy, _ = ctx.needs_input_grad
        need_entropy = need_entropy and ctx.has_entropy_bonus
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
    tensors. Values outside the mask (or outside every segment) are never read, and may be inf or
    nan. Differentiable once in `logps` and, with `entropy_coef`, in `entropy`.

    Args:
        logps: log-probs of the policy, (B, T) or (N,). Half precision is computed in float32.
        old_logps: log-probs under the policy at the start of the step; None if that is the policy
            itself (ratio 1 with the full gradient).
        advantages: (B,), (B, 1) or one per token. If N = B, a packed vector of N values is (B,).
        mask: tokens that count (non-zero), any dtype; None for all.
        ref_logps: log-probs of the reference model for the KL term; needed if beta is not 0.
        entropy: entropy of each token's distribution; needed if entropy_coef is not 0.
        rollout_logps: log-probs that the sampler reported, for the rollout correction and its
            metrics; nan where it reported none (the token then counts as sampled from `old_logps`).
        token_weights: weights of the policy term and the entropy bonus of each token, for
            example 0/1 for its high-entropy tokens. Not applied to the KL term.
        cu_seqlens: (B + 1,) int32 or int64, increasing offsets of packed completions.

    Returns:
        The loss, 0-d, and a dict of 0-d tensors without gradient. They stay on the device: nothing
        waits for it. "Mean" is over the tokens of this call:
        num_tokens, num_sequences (completions with a token);
        policy_loss: the policy term's part of the loss;
        ratio_mean, ratio_min, ratio_max: of r at the chosen level;
        approx_kl: mean of e^x - 1 - x, x = logp - old: distance from the old policy;
        clip_low, clip_high, clip_region: share of tokens below the range with A < 0, above it
        with A > 0, either (clipped losses and cispo); clip_delta: above delta with A < 0;
        kl: mean estimator before bias correction (with ref_logps); entropy: mean (with entropy);
        vespo_phi: mean weight (vespo); off_policy_kept: share kept (off_policy_threshold);
        rollout_gap_mean, rollout_gap_max: of |old - rollout|; rollout_kl: mean of e^g - 1 - g with
        g = old - rollout; rollout_weight_mean: mean correction; rollout_clipped: share of tokens
        outside the bounds (with rollout_logps).

    Raises:
        ValueError: shapes that do not fit, or a missing input that the config needs.
    """
    if not logps.is_floating_point():
        raise ValueError(f"logps must be floating point, got {logps.dtype}")
    dtype = accumulation_dtype(logps)
    inputs = LossInputs(
        _as(dtype, logps),
        _as(dtype, old_logps),
        _as(dtype, advantages),
        mask,
        _as(dtype, ref_logps),
        _as(dtype, entropy),
        _as(dtype, rollout_logps),
        _as(dtype, token_weights),
        cu_seqlens,
        None,
        denominator(config),
    )  # by position: keywords would cost half a microsecond
    check_inputs(config, logps.shape, inputs)
    if config.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {config.entropy_coef} needs entropy")
    loss, metrics = _GRPOLoss.apply(inputs.logps, inputs.entropy, (inputs, encode(config)))
    return loss, name_metrics(metrics, config, inputs, entropy is not None)


def _as(dtype: torch.dtype, tensor: Any) -> Any:
    # Asking first: a conversion to the same dtype takes ten times as long.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# Inputs with one value per token, in the order in which they are checked.
_PER_TOKEN = ("old_logps", "mask", "ref_logps", "entropy", "rollout_logps", "token_weights")


def check_inputs(config: GRPOLossConfig, shape: torch.Size, inputs: LossInputs) -> None:
    """ValueError if inputs do not fit tokens of `shape`, or if one that the config needs is
    missing. Ignores `inputs.logps`, which losses of LM heads do not have yet."""
    advantages, cu_seqlens = inputs.advantages, inputs.cu_seqlens
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
    for name in _PER_TOKEN:
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {_of(tensor)}, expected {tuple(shape)}")
    if config.beta and inputs.ref_logps is None:
        raise ValueError(f"beta = {config.beta} needs ref_logps")
    if config.rollout_correction and inputs.rollout_logps is None:
        raise ValueError(f"rollout_correction {config.rollout_correction!r} needs rollout_logps")


def _of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def name_metrics(
    metrics: Tensor, config: GRPOLossConfig, inputs: LossInputs, entropy: bool
) -> dict[str, Tensor]:
    """The op's metrics by name, 0-d views, without those that mean nothing for this call.

    `entropy`: whether the op had entropies.
    """
    key = (
        config.loss_type,
        inputs.ref_logps is not None,
        entropy,
        inputs.rollout_logps is not None,
        config.delta is not None,
        config.off_policy_threshold is not None,
    )
    # A plain dict, filled at once, although that takes as long as the loss of a small batch: a lazy
    # one is empty for json, torch's pytrees and `torch.load`, which bypass a dict's methods.
    values = metrics.unbind()
    return {name: values[index] for name, index in _NAMED[key]}


def _meaningful(
    loss_type: str, ref: bool, entropy: bool, rollout: bool, delta: bool, threshold: bool
) -> tuple[tuple[str, int], ...]:
    """Names and indices of the metrics that mean something with these inputs and options."""
    meaningful = {
        "kl": ref,
        "entropy": entropy,
        "clip_delta": delta,
        "vespo_phi": loss_type == "vespo",
        "off_policy_kept": threshold,
        **dict.fromkeys(
            ("clip_low", "clip_high", "clip_region"), loss_type not in ("sapo", "vespo")
        ),
        **{name: rollout for name in METRICS if name.startswith("rollout_")},
    }
    return tuple((name, i) for i, name in enumerate(METRICS) if meaningful.get(name, True))


# All 256 combinations: a look-up per call instead of a dozen comparisons.
_FLAGS = (False, True)
_NAMED = {
    key: _meaningful(*key) for key in product(LOSS_TYPES, _FLAGS, _FLAGS, _FLAGS, _FLAGS, _FLAGS)
}


class LossArguments(NamedTuple):
    """Arguments that the ops `linear_grpo_loss` and `logits_grpo_loss` share, in schema order.

    They are those of `grpo_loss` without the log-probs and entropies, which the heads compute.
    labels: (B, T) or (N,) int64. temperature: used if row_temperature is None.
    """

    labels: Tensor
    row_temperature: Tensor | None
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    ref_logps: Tensor | None
    rollout_logps: Tensor | None
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    denominator: Tensor | None
    temperature: float
    entropy: bool
    parameters: str

    def inputs(self, logps: Tensor, entropy: Tensor | None) -> LossInputs:
        return LossInputs(
            logps=logps,
            old_logps=self.old_logps,
            advantages=self.advantages,
            mask=self.mask,
            ref_logps=self.ref_logps,
            entropy=entropy,
            rollout_logps=self.rollout_logps,
            token_weights=self.token_weights,
            cu_seqlens=self.cu_seqlens,
            denominator=self.denominator,
        )


def loss_arguments(
    config: GRPOLossConfig,
    labels: Tensor,
    inputs: LossInputs,
    like: Tensor,
    *,
    temperature: float | Tensor,
    entropy: bool,
) -> LossArguments:
    """Check a head's arguments; `like` has the device and the dtype of the head's input.

    `inputs.logps` and `inputs.entropy` are ignored. Raises as `check_inputs` and
    `row_temperatures` do, and ValueError for a tensor on another device.
    """
    check_inputs(config, labels.shape, inputs)
    row_temperature, scalar = row_temperatures(temperature, labels.shape, like.device)
    dtype = accumulation_dtype(like)

    for name, x in inputs._asdict().items():
        if x is not None and name not in ("logps", "entropy") and x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, but the head's input on {like.device}")

    # As the kernels read them, so that no conversion is made twice. The denominator alone may come
    # from the CPU: a trainer counts there.
    def constant(x: Tensor | None, dtype: torch.dtype = dtype) -> Any:
        return None if x is None else x.detach().to(like.device, dtype).contiguous()

    mask = inputs.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    return LossArguments(
        labels=labels.to(torch.int64).contiguous(),
        row_temperature=row_temperature,
        old_logps=constant(inputs.old_logps),
        advantages=constant(inputs.advantages),
        mask=constant(mask, torch.bool),
        ref_logps=constant(inputs.ref_logps),
        rollout_logps=constant(inputs.rollout_logps),
        token_weights=constant(inputs.token_weights),
        cu_seqlens=constant(inputs.cu_seqlens, torch.int64),
        denominator=constant(denominator(config)),
        temperature=scalar,
        entropy=entropy or config.entropy_coef != 0,
        parameters=encode(config),
    )
