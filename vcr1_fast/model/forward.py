"""One forward pass for prompts and all their completions.

The usual trainer runs G sequences prompt + completion, each with its own copy of the prompt and its
own pass of the vision tower. Here a group's prompt and completions are parts of one sequence, in
which a token sees the prompt and the tokens of its own completion before it, and completion tokens
carry the positions they would have alone. Attention, positions and everything else a token computes
are those of the plain form, so losses and gradients agree with it to rounding, at the price of
P + sum(C) tokens instead of G * P + sum(C) and one vision pass instead of G. Several groups make a
pack, one sequence without padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.packing import Group, pack_groups
from vcr1_fast.model.positions import SpecialIds, token_types
from vcr1_fast.model.processor import Prompt
from vcr1_fast.model.vision import encode_videos
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops import linear_logprobs


def completion_hidden(
    model: nn.Module, groups: Sequence[Group], *, convention: str = "trained"
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states from which each completion token is predicted.

    A completion's first token is predicted from the last prompt token, the others from the token
    before them, so a completion's last token is never run through the model.

    Args:
        model: Qwen2.5-VL loaded with SDPA, wrapped by peft or not.
        groups: all of them in one pass; the caller sees to it that they fit in memory.
        convention: of the positions, see `positions.py`.

    Returns:
        hidden (nnz, H), after the final norm, in the model's dtype; multiply by `lm_head`;
        labels (nnz,) int64, the tokens they predict, groups and completions in order;
        cu_seqlens (completions + 1,) int32, where each completion starts in them.

    Raises:
        ValueError: for an empty completion, no groups, or a model loaded without SDPA.
    """
    base = unwrap(model)
    prepare_attention(base)
    ids = SpecialIds.from_config(base.config)
    pack = pack_groups(groups, ids, convention, base.get_input_embeddings().weight.device)
    given = prompt_features(base, [g.prompt for g in groups], [g.vision for g in groups])
    features = [f for f in given if f is not None]
    embeddings = embed(base, pack.tokens, pack.is_prompt, features, ids)
    hidden = base.model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=pack.positions[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        spans=pack.spans,
    ).last_hidden_state
    return hidden[0].index_select(0, pack.sources), pack.labels, pack.cu_seqlens


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
    *,
    temperature: float = 1.0,
    convention: str = "trained",
) -> Tensor:
    """(N,) float32 log-probs of all completion tokens, groups and completions in order; with
    gradient where that is enabled. The logits are never whole in memory."""
    hidden, labels, _ = completion_hidden(model, groups, convention=convention)
    weight, bias = lm_head(model)
    return linear_logprobs(hidden, weight, labels, bias, temperature=temperature).logps


def prompt_features(
    model: nn.Module, prompts: Sequence[Prompt], given: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Features (vision tokens, H) of each prompt's clips and images; None for one without any.

    Those not `given` go through the tower together, with gradient if it is trained.
    """
    features = list(given) if given is not None else [None] * len(prompts)
    todo = [i for i, prompt in enumerate(prompts) if features[i] is None and prompt.patches]
    if todo:
        media = [prompts[i].media() for i in todo]
        pixels = torch.cat([patches for parts in media for patches, _ in parts])
        grids = torch.stack([grid for parts in media for _, grid in parts])
        encoded = iter(encode_videos(model, pixels, grids))
        for i, parts in zip(todo, media, strict=True):
            clips = [next(encoded) for _ in parts]
            features[i] = torch.cat(clips) if len(clips) > 1 else clips[0]
    return features


def embed(
    model: nn.Module,
    tokens: Tensor,
    is_prompt: Tensor,
    features: Sequence[Tensor],
    ids: SpecialIds,
) -> Tensor:
    """Embeddings (..., H) of tokens (...), those of the prompts' video and image tokens, in order,
    being `features`, each (vision tokens, H)."""
    embeddings = model.get_input_embeddings()(tokens)
    slots = (token_types(tokens, ids) > 0) & is_prompt
    count = sum(map(len, features))
    if int(slots.sum()) != count:
        raise ValueError(f"{int(slots.sum())} vision tokens but {count} vision features")
    if not features:
        return embeddings
    values = torch.cat(list(features)).to(embeddings.device, embeddings.dtype)
    return embeddings.masked_scatter(slots[..., None], values)
