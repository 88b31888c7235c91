"""The language model's attention: over groups that share their prompts, or as transformers has it.

In a pack (`packing.py`) a token sees its group's prompt and the earlier tokens of its completion.
With queries Q, keys K and values V of the prompt (p) and of the completions (s):

    prompt        softmax(Q_p K_p^T, causal) V_p
    completions   two partial attentions, a = (Q_s on K_p, V_p), all of it, and
                  b = (Q_s on K_s, V_s), causal within each completion, merged by their
                  log-sum-exps: L = log(e^L_a + e^L_b), out = a e^(L_a - L) + b e^(L_b - L)

The prompt's keys and values are read where they lie, once for all completions: no copy of them, no
mask, and nothing of size (tokens x tokens) in memory. Backward, each part's kernel gets the merged
output and log-sum-exp: softmax probabilities are e^(score - L), whichever part a key is in, and the
parts' gradients add up.

Backends, which compute the same:
    fused     our kernel for the CPU (`ops/group_attention.py`), both parts in one pass
    merged    as above, with torch's kernels for the CPU, which return the log-sum-exp
    varlen    as above, by two calls of torch's varlen flash kernels for all groups of a pack
              (`varlen_attention.py`): CUDA, bfloat16 or float16; on the CPU plain operators stand
              in for the kernels, to test it
    masked    the completions as one masked call over the group's own stretch of keys, on any
              device; the mask takes S (P + S) bytes of a group
    flex      FlexAttention over the whole pack, blocks that nobody sees left out; needs a GPU for
              the backward pass, and compiles; a suffix (`prompt_state.py`) goes by masks
    auto      fused on the CPU; elsewhere varlen, or masked, with a warning, where the flash kernels
              do not run
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vcr1_fast.model.decode import SharedPrefix, shared_prefix_attention
from vcr1_fast.model.family import family_of
from vcr1_fast.model.flex_attention import flex_group_attention
from vcr1_fast.model.packing import Span
from vcr1_fast.model.partial_attention import (
    fold_heads,
    merge,
    missing_kernels,
    partial,
    partial_backward,
    partial_product,
    unfold_heads,
)
from vcr1_fast.model.prompt_state import PromptRecorder, Suffix
from vcr1_fast.model.varlen_attention import (
    missing_varlen,
    varlen_group_attention,
    varlen_suffix_attention,
)
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops.group_attention import group_attention

ATTENTION = "vcr1_shared_prompt"
Backend = Literal["auto", "fused", "merged", "varlen", "masked", "flex"]
_ON_CPU = ("fused", "merged")  # they decode with torch's kernels for the CPU, too


def dummy_mask(device: torch.device) -> Tensor:
    """The 4-D mask (1, 1, 1, 1) that `attention` reads as "no mask": causal, or by its arguments.

    Filled on the device, not copied there: a copy from the host cannot be part of a CUDA graph.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    spans: Sequence[Span] | None = None,
    shared_prefix: SharedPrefix | None = None,
    recorder: PromptRecorder | None = None,
    suffix: Suffix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that transformers calls in every layer; query (B, H, N, D), key and value
    (B, heads, N, D).

    `spans`: the sequence is a pack of groups. `shared_prefix` alone: one new token a completion,
    see `decode.py`. `suffix`: completions without their prompt, see `prompt_state.py`. None of
    them: transformers' own SDPA, causal if the mask is `dummy_mask`. `recorder` takes keys and
    values. Returns (B, N, H, D).

    Under autocast queries and keys come in float32, in which the rotation is computed: they take
    the values' dtype, that of the products.
    """
    kind = value.device.type
    ours = spans is not None or shared_prefix is not None or suffix is not None
    if torch.is_autocast_enabled(kind) and ours:
        query, key = query.to(value.dtype), key.to(value.dtype)
        with torch.autocast(kind, enabled=False):
            return attention(
                module,
                query,
                key,
                value,
                scaling=scaling,
                spans=spans,
                shared_prefix=shared_prefix,
                recorder=recorder,
                suffix=suffix,
            )
    if recorder is not None:
        recorder.record(module.layer_idx, key, value)
    if spans is not None:
        backend = _BACKENDS[resolve_backend(module.vcr1_backend, *_kind(query, key))]
        is_last = module.layer_idx == module.config.num_hidden_layers - 1
        return backend(query, key, value, scaling, spans, is_last), None
    if shared_prefix is not None:
        on_cpu = module.vcr1_backend in ("auto", *_ON_CPU) and kind == "cpu"
        prefix = shared_prefix.prefix[module.layer_idx]
        part = partial if on_cpu else partial_product
        out = shared_prefix_attention((query, key, value), prefix, shared_prefix, scaling, part)
        return out, None
    if suffix is not None:
        on_suffix = _ON_SUFFIX[resolve_backend(module.vcr1_backend, *_kind(query, key))]
        return on_suffix(query, key, value, scaling, suffix, module.layer_idx), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.numel() == 1:
        attention_mask = None  # SDPA is then causal for more than one query
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def prepare_attention(model: nn.Module, backend: Backend | None = None) -> None:
    """Let the language model of `model`, which was loaded with SDPA, use `attention`.

    It stays so: a backward pass that recomputes activations calls it a second time. backend: None
    keeps the choice of an earlier call, at first "auto".
    ValueError for other attention, for layers that cannot share prompts (`Family.kv_layers`), or
    for a backend that cannot run.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    family = family_of(model)
    language_model: Any = family.language_model(unwrap(model))
    config = language_model.config
    if config._attn_implementation not in ("sdpa", ATTENTION):
        raise ValueError(
            f"attention {config._attn_implementation!r} cannot share prompts; load with sdpa"
        )
    layers = [language_model.layers[index].self_attn for index in family.kv_layers(config)]
    if backend is None and hasattr(layers[0], "vcr1_backend"):
        backend = layers[0].vcr1_backend
    dtype = layers[0].q_proj.weight.dtype
    head = (config.num_attention_heads, config.num_key_value_heads, layers[0].head_dim)
    check_backend(backend or "auto", layers[0].q_proj.weight.device, dtype, head)
    for layer in layers:
        layer.vcr1_backend = backend or "auto"
    family.prepare_language_model(language_model)
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config._attn_implementation = ATTENTION


def _kind(query: Tensor, key: Tensor) -> tuple[torch.device, torch.dtype, tuple[int, int, int]]:
    """What the choice of a backend depends on: device, dtype, (heads, key heads, D)."""
    return query.device, query.dtype, (query.shape[1], key.shape[1], query.shape[3])


def resolve_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> str:
    """The backend that "auto" stands for; any other unchanged.

    heads: (query heads, key heads, D). RuntimeWarning where masks take the place of the flash
    kernels, ValueError for "varlen" there.
    """
    if backend not in ("auto", "varlen"):
        return backend
    if device.type == "cpu" and backend == "auto":
        return "fused"
    if (reason := missing_varlen(device, dtype, *heads)) is None:
        return "varlen"
    if backend == "varlen":
        raise ValueError(f"attention 'varlen' cannot run, {reason}: 'masked'")
    message = f"attention by masks of S x (P + S) bytes a group, slower: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return "masked"


def copies_prefix(layer: Any) -> bool:
    """Whether attention layers as `layer` copy a prompt's keys and values for every suffix."""
    chosen = getattr(layer, "vcr1_backend", "auto")
    weight, config = layer.q_proj.weight, layer.config
    if chosen != "auto":
        return chosen in ("masked", "flex")
    heads = (config.num_attention_heads, config.num_key_value_heads, layer.head_dim)
    return weight.device.type != "cpu" and bool(missing_varlen(weight.device, weight.dtype, *heads))


def check_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    """ValueError, with what to set instead, for a backend that cannot run for such queries and
    keys: on `device`, heads: (query heads, key heads, D).

    RuntimeWarning where torch lacks the private kernels that a backend calls: it then runs on
    plain operators or masks, slower and with all scores or masks in memory. Other than
    half-precision parameters of a GPU say nothing of the queries' dtype (autocast, mixed precision
    of FSDP, quantised weights): the first pass checks that.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"attention must be one of {get_args(Backend)}, got {backend!r}")
    if device.type != "cpu":
        if backend in _ON_CPU:
            raise ValueError(
                f"attention {backend!r} is for the CPU, the model is on {device}: 'auto'"
            )
        if dtype in (torch.bfloat16, torch.float16):
            resolve_backend(backend, device, dtype, heads)
        return
    on_cpu = resolve_backend(backend, device, dtype, heads) in _ON_CPU
    if on_cpu and (reason := missing_kernels()) is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)


def fused_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool = False,
) -> Tensor:
    """Attention within a pack. query (1, H, N, D), key and value (1, heads, N, D); (1, N, H, D).

    is_last: of a prompt only the last token's row is used afterwards; the others may hold anything,
    and are zero here (`Family.prepare_language_model`).
    """
    parts = [part for span in spans for part in span.parts(is_last)]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return group_attention(q, k, v, parts, scale=scaling)[0][None]


def merged_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool = False,
) -> Tensor:
    """`fused_group_attention` from torch's kernels for the CPU."""
    return _MergedParts.apply(query, key, value, scaling, spans, is_last)


def masked_group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    spans: Sequence[Span],
    is_last: bool = False,
) -> Tensor:
    """`fused_group_attention` from public functions alone, on any device. The completions' mask
    takes S (P + S) bytes a group, once for all layers."""
    share = query.shape[1] // key.shape[1]
    outputs = []
    for span in spans:
        prompt = slice(span.start, span.middle)
        q, k, v = (x[:, :, prompt] for x in (query, key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=share > 1
            )
        )
        if not span.lengths:
            continue
        q = fold_heads(query[:, :, span.middle : span.end], share, causal=True)
        k, v = (x[:, :, span.start : span.end].expand(share, -1, -1, -1) for x in (key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, scale=scaling)
        outputs.append(unfold_heads(out, share, causal=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _MergedParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        spans: Sequence[Span],
        is_last: bool,
    ) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        out = out.transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=exact)
        for span in spans:
            prompt, answers = slice(span.start, span.middle), slice(span.middle, span.end)
            q, k, v = (x[:, :, prompt] for x in (query, key, value))
            if is_last:
                prompt = slice(span.middle - 1, span.middle)
                out[:, :, span.start : span.middle] = 0
                q = q[:, :, -1:]
            part = partial(q, k, v, scaling, causal=not is_last)
            out[:, :, prompt], lse[:, :, prompt] = part
            if not span.lengths:
                continue
            own = tuple(x[:, :, answers] for x in (query, key, value))
            padded_q, padded_k, padded_v = (_to_batch(x, span) for x in own)
            padded = partial(padded_q, padded_k, padded_v, scaling, causal=True)
            on_own = [_from_batch(x, span) for x in padded]
            # The prompt's keys and values, to which every completion attends.
            on_prompt = partial(own[0], k, v, scaling)
            out[:, :, answers], lse[:, :, answers] = merge(on_prompt, on_own)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.spans, ctx.is_last = scaling, spans, is_last
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # (grad, query, key, value, out, lse) in this order, as `partial_backward` takes them.
        saved = [grad.transpose(1, 2), *ctx.saved_tensors]
        backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial_backward
        grads = [torch.empty_like(x) for x in saved[1:4]]
        for span in ctx.spans:
            prompt, answers = slice(span.start, span.middle), slice(span.middle, span.end)
            of_prompt = [x[:, :, prompt] for x in saved]
            read = prompt
            if ctx.is_last:
                read = slice(span.middle - 1, span.middle)
                grads[0][:, :, prompt] = 0
                of_prompt = [x if i in (2, 3) else x[:, :, -1:] for i, x in enumerate(of_prompt)]
            parts = backward(*of_prompt, ctx.scaling, causal=not ctx.is_last)
            for whole, part, where in zip(grads, parts, (read, prompt, prompt), strict=True):
                whole[:, :, where] = part
            if not span.lengths:
                continue
            of_answers = [x[:, :, answers] for x in saved]
            own = [_to_batch(x, span) for x in of_answers]
            if span.is_ragged:
                # Padding repeats a token: it must not send gradients to the keys before it.
                own[0] = own[0] * span.valid[:, None, :, None]
            parts = backward(*own, ctx.scaling, causal=True)
            for whole, part in zip(grads, parts, strict=True):
                whole[:, :, answers] = _from_batch(part, span)
            of_answers[2:4] = of_prompt[2:4]
            parts = backward(*of_answers, ctx.scaling)
            for whole, part, where in zip(grads, parts, (answers, prompt, prompt), strict=True):
                whole[:, :, where] += part
        return (*grads, None, None, None)


def _to_batch(x: Tensor, span: Span) -> Tensor:
    """(1, heads, S, ...) of a group's completion tokens to (G, heads, longest, ...)."""
    rows = x[0].transpose(0, 1)
    if span.is_ragged:
        rows = rows.index_select(0, span.padded.flatten())
    return rows.unflatten(0, (len(span.lengths), -1)).transpose(1, 2)


def _from_batch(x: Tensor, span: Span) -> Tensor:
    """The way back: (G, heads, longest, ...) to (1, heads, S, ...)."""
    rows = x.transpose(1, 2).flatten(0, 1)
    if span.is_ragged:
        rows = rows.index_select(0, span.places)
    return rows.transpose(0, 1)[None]


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "fused": fused_group_attention,
    "merged": merged_group_attention,
    "varlen": varlen_group_attention,
    "masked": masked_group_attention,
    "flex": flex_group_attention,
}


def fused_suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, suffix: Suffix, layer: int
) -> Tensor:
    """Attention of completions to their prompt's keys and values, which an earlier pass recorded in
    `layer`, and to their own. query (1, H, S, D), key and value (1, heads, S, D); (1, S, H, D)."""
    q, k, v, *prefix = (x[0].transpose(0, 1) for x in (query, key, value, *_prefix(suffix, layer)))
    out, _ = group_attention(q, k, v, suffix.parts, scale=scaling, prefix=(prefix[0], prefix[1]))
    return out[None]


def merged_suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, suffix: Suffix, layer: int
) -> Tensor:
    """`fused_suffix_attention` from torch's kernels for the CPU."""
    prefix = _prefix(suffix, layer)
    return _MergedSuffix.apply(query, key, value, *prefix, scaling, suffix.span)


def masked_suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, suffix: Suffix, layer: int
) -> Tensor:
    """`fused_suffix_attention` from public functions alone, on any device. Each layer keeps a copy
    of the prompt's keys and values for its backward pass."""
    share = query.shape[1] // key.shape[1]
    before = _prefix(suffix, layer)
    k, v = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    out = F.scaled_dot_product_attention(
        fold_heads(query, share, causal=True),
        k.expand(share, -1, -1, -1),
        v.expand(share, -1, -1, -1),
        attn_mask=suffix.span.mask,
        scale=scaling,
    )
    return unfold_heads(out, share, causal=True).transpose(1, 2)


def _prefix(suffix: Suffix, layer: int) -> tuple[Tensor, Tensor]:
    keys, values = suffix.state.layers[layer]
    return keys, values


class _MergedSuffix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        scaling: float,
        span: Span,
    ) -> Tensor:
        q, k, v = (_to_batch(x, span) for x in (query, key, value))
        padded = partial(q, k, v, scaling, causal=True)
        on_own = [_from_batch(x, span) for x in padded]
        on_prompt = partial(query, prefix_key, prefix_value, scaling)
        out, lse = merge(on_prompt, on_own)
        ctx.save_for_backward(query, key, value, out, lse, prefix_key, prefix_value)
        ctx.scaling, ctx.span = scaling, span
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *saved, prefix_key, prefix_value = ctx.saved_tensors
        # (grad, query, key, value, out, lse) in this order, as `partial_backward` takes them.
        whole = [grad.transpose(1, 2), *saved]
        own = [_to_batch(x, ctx.span) for x in whole]
        if ctx.span.is_ragged:
            # Padding repeats a token: it must not send gradients to the keys before it.
            own[0] = own[0] * ctx.span.valid[:, None, :, None]
        backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial_backward
        parts = backward(*own, ctx.scaling, causal=True)
        of_query, of_key, of_value = (_from_batch(x, ctx.span) for x in parts)
        whole[2:4] = prefix_key, prefix_value
        # Gradients of the merged softmax: those of the query add up over the parts.
        on_prompt = backward(*whole, ctx.scaling)
        return of_query + on_prompt[0], of_key, of_value, *on_prompt[1:], None, None


_ON_SUFFIX: dict[str, Callable[..., Tensor]] = {
    "fused": fused_suffix_attention,
    "merged": merged_suffix_attention,
    "varlen": varlen_suffix_attention,
    "masked": masked_suffix_attention,
    "flex": masked_suffix_attention,
}
