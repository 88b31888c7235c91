"""One forward pass for prompts and all their completions, with prefix sharing.

The usual trainer runs G sequences prompt + completion, each with its own copy of the prompt and its
own pass of the vision encoder. Here a group's prompt and completions are segments of one sequence,
in which a token sees the prompt and the tokens of its own completion before it, and completion
tokens carry the positions they would have alone. Attention, positions and everything else a token
computes are those of the unshared baseline, so losses and gradients agree with it to rounding, at
the price of P + sum(C) tokens instead of G * P + sum(C) and one vision pass instead of G. Several
groups make a pack, one sequence without padding. A group that does not fit in memory runs its
prompt in `prompt_pass`, then its completions part by part on what that recorded
(`prompt_state.py`).

`language_model_forward` is the one function that calls the language model: for prefill and decode
of rollouts, policy, reference, evaluation and chat.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vcr1_fast.model.attention import ATTENTION, dummy_mask, prepare_attention
from vcr1_fast.model.family import family_of
from vcr1_fast.model.packing import Group, Pack, Span, pack_groups
from vcr1_fast.model.prompt import Prompt
from vcr1_fast.model.prompt_state import PromptRecorder, PromptState, Suffix
from vcr1_fast.model.vision import encode_videos
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops import linear_logprobs


def language_model_forward(
    model: nn.Module,
    embeddings: Tensor,
    positions: Tensor,
    *,
    kv_cache: Any = None,
    mask: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Final hidden states (B, T, H), after the final norm, of embeddings (B, T, H).

    Args:
        model: the bare transformers model.
        embeddings: (B, T, H) of tokens and vision features.
        positions: (3, B, T) of time, height and width.
        kv_cache: keeps keys and values: a `SharedPrefix`, or a cache of transformers; None: none.
        mask: (B, 1, T, keys) bool; None: causal, or what the `inputs` for the attention say.
        inputs: keyword arguments that reach the attention (`spans`, `shared_prefix`, `recorder`,
            `suffix`), and those of the family's `vision_inputs`.
    """
    language_model: Any = family_of(model).language_model(model)
    if language_model.config._attn_implementation != ATTENTION:
        # Stock attention would read the dummy mask as "every token sees every token".
        prepare_attention(model)
    if mask is None:
        # A 4-D mask is passed on as it is. With None, transformers would ask our cache for sizes
        # that it does not have, and with a dict some text models fail.
        mask = dummy_mask(embeddings.device)
    if kv_cache is not None:
        inputs[cache_keyword(type(language_model).forward)] = kv_cache
    # Always three rows: with a fourth, transformers cuts the pack where positions jump.
    return language_model(
        inputs_embeds=embeddings,
        position_ids=positions,
        attention_mask=mask,
        use_cache=kv_cache is not None,
        **inputs,
    ).last_hidden_state


@cache
def cache_keyword(forward: Callable[..., Any]) -> str:
    """Name of the parameter of a text model's `forward` that takes the cache: `cache` from
    transformers 5.24 on, where the old name warns, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def prompt_pass(model: nn.Module, group: Group, *, keep_graph: bool = True) -> PromptState:
    """Run a group's prompt alone, for `completion_hidden` of its completions part by part.

    Args:
        model: as in `completion_hidden`.
        group: of its completions nothing is read.
        keep_graph: False runs without a graph; the gradients of the suffix passes then go to the
            state of a second prompt pass (`PromptState.backward`).

    Raises:
        ValueError: under reentrant activation checkpointing, or for a model with layers that do not
            record what later tokens read of them.
    """
    base = unwrap(model)
    prepare_attention(base)
    device, prompt = base.get_input_embeddings().weight.device, group.prompt
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()):
        recorder = PromptRecorder()
        features = prompt_features(base, [prompt], [group.vision])
        embeddings, inputs = embed(
            base, prompt.input_ids.to(device), prompt.is_vision.to(device), features
        )
        hidden = language_model_forward(
            base,
            embeddings[None],
            prompt.positions[:, None].to(device),
            spans=(Span(0, len(prompt), (), device),),
            recorder=recorder,
            **inputs,
        )
        recorded = recorder.close()
        # A copy: a view would keep all rows.
        last = hidden[0, -1:].clone()
    language_model: Any = family_of(base).language_model(base)
    layers = len(language_model.layers)
    if len(recorded) != layers:
        raise ValueError(
            f"{len(recorded)} of {layers} layers record what completions read of the prompt: the "
            "others cannot run a completion without its prompt"
        )
    return PromptState(recorded, last, keep_graph=keep_graph)


def completion_hidden(
    model: nn.Module, groups: Sequence[Group], prompt: PromptState | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states from which each completion token is predicted.

    A completion's first token is predicted from the last prompt token, the others from the token
    before them, so a completion's last token is never run through the model.

    Args:
        model: loaded with SDPA, wrapped by peft or not.
        groups: all of them in one pass; the caller makes sure that they fit in memory.
        prompt: of `prompt_pass`: the one group's completions run on it, without their prompt.

    Returns:
        hidden (nnz, H), after the final norm, in the model's dtype; multiply by `lm_head`;
        labels (nnz,) int64, the tokens they predict, groups and completions in order;
        cu_seqlens (completions + 1,) int32, where each completion starts in them.

    Raises:
        ValueError: for an empty completion, no groups, several with a `prompt`, or a model loaded
            without SDPA.
    """
    base = unwrap(model)
    prepare_attention(base)
    pack = pack_groups(groups, base.get_input_embeddings().weight.device)
    if prompt is not None:
        if len(groups) != 1:
            raise ValueError(f"a prompt's state is for one group, got {len(groups)} groups")
        return _suffix_hidden(base, pack, prompt), pack.labels, pack.cu_seqlens
    features = prompt_features(base, [g.prompt for g in groups], [g.vision for g in groups])
    embeddings, inputs = embed(base, pack.tokens, pack.is_vision, features)
    hidden = language_model_forward(
        base, embeddings[None], pack.positions[:, None], spans=pack.spans, **inputs
    )
    return hidden[0].index_select(0, pack.sources), pack.labels, pack.cu_seqlens


def _suffix_hidden(base: Any, pack: Pack, prompt: PromptState) -> Tensor:
    """`completion_hidden`'s hidden states from the rows behind the prompt alone."""
    (span,) = pack.spans
    own = slice(span.middle, None)
    rows = prompt.hidden
    if span.lengths:  # else all completions are one token, which the prompt predicts
        embeddings = base.get_input_embeddings()(pack.tokens[own])
        hidden = language_model_forward(
            base,
            embeddings[None],
            pack.positions[:, None, own],
            suffix=Suffix(prompt, span),
        )
        rows = torch.cat([rows, hidden[0]])
    # The first row is the prompt's last, number `middle - 1` of the pack.
    return rows.index_select(0, pack.sources - (span.middle - 1))


def lm_head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (V, H), bias (V,) or None) that turn hidden states into logits.

    With tied embeddings the weight is the embedding's parameter: gradients of both uses add up
    there.
    """
    head = unwrap(model).get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"lm_head is a {type(head).__name__}: an adapter on it is not one weight; "
            "leave lm_head out of the adapter's target modules"
        )
    return head.weight, head.bias


def completion_logps(
    model: nn.Module,
    groups: Sequence[Group],
    prompt: PromptState | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """(N,) float32 log-probs of all completion tokens, groups and completions in order; with
    gradient where that is enabled; `prompt` as in `completion_hidden`. The logits are never whole
    in memory."""
    hidden, labels, _ = completion_hidden(model, groups, prompt)
    weight, bias = lm_head(model)
    return linear_logprobs(hidden, weight, labels, bias, temperature=temperature).logps


def prompt_features(
    model: nn.Module, prompts: Sequence[Prompt], given: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Features (vision tokens, levels * H) of each prompt's clips and images; None for a prompt
    without any.

    Those not `given` go through the vision encoder together, with gradient if it is trained.
    """
    features: list[Tensor | None] = [None] * len(prompts) if given is None else list(given)
    todo = [i for i, prompt in enumerate(prompts) if features[i] is None and prompt.patches]
    if todo:
        media = [prompts[i].media() for i in todo]
        patches = [pixels for parts in media for pixels, _ in parts]
        if len({pixels.device for pixels in patches}) > 1:
            # Some were made on the device; for others it had no memory at that time.
            target = next(pixels for pixels in patches if not pixels.is_cpu)
            patches = [pixels.to(target) for pixels in patches]
        pixels = torch.cat(patches) if len(patches) > 1 else patches[0]
        grids = torch.stack([grid for parts in media for _, grid in parts])
        encoded = iter(encode_videos(model, pixels, grids))
        for i, parts in zip(todo, media, strict=True):
            clips = [next(encoded) for _ in parts]
            features[i] = torch.cat(clips) if len(clips) > 1 else clips[0]
    return features


def embed(
    model: Any, tokens: Tensor, is_vision: Tensor, features: Sequence[Tensor | None]
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings of tokens, with vision features in the places of vision tokens.

    Args:
        model: the bare transformers model.
        tokens: (N,) int64.
        is_vision: (N,) bool: which tokens stand for features.
        features: (vision tokens, levels * H) of each prompt in order, or None where it has none.

    Returns:
        embeddings (N, H), and keyword arguments for the language model in this pass.

    Raises:
        ValueError: where features and vision tokens differ in number, or features in width.
    """
    embeddings = model.get_input_embeddings()(tokens)
    given = [f for f in features if f is not None]
    count = sum(map(len, given))
    if int(is_vision.sum()) != count:
        raise ValueError(f"{int(is_vision.sum())} vision tokens but {count} vision features")
    if not given:
        return embeddings, {}
    family = family_of(model)
    width = family.feature_levels(model.config) * embeddings.shape[-1]
    values = torch.cat(given).to(embeddings.device, embeddings.dtype)
    if values.shape[1] != width:
        raise ValueError(f"vision features are {values.shape[1]} wide, expected {width}")
    levels = values.split(embeddings.shape[-1], dim=1)
    values, inputs = family.vision_inputs(levels, is_vision)
    return embeddings.masked_scatter(is_vision[..., None], values), inputs
