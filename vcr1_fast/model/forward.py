"""One forward pass for a prompt and all its completions.

The usual trainer runs G sequences prompt + completion, each with its own copy of the prompt and its
own pass of the vision tower. Here a group is one row

    prompt | completion 1 | completion 2 | ... | completion G

in which a token sees the prompt and the tokens of its own completion before it, and completion
tokens carry the positions they would have alone. Attention, positions and everything else a token
computes are those of the plain form, so losses and gradients agree with it to rounding, at the
price of P + sum(C) tokens instead of G * P + sum(C) and one vision pass instead of G.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vcr1_fast.model.positions import SpecialIds, mrope_positions, next_position
from vcr1_fast.model.processor import Prompt
from vcr1_fast.model.vision import encode_videos
from vcr1_fast.model.wrapping import unwrap

_PADDING = -1


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt with its completions, each (C_j,) int64 with C_j >= 1.

    `vision` (video tokens, hidden) is what the tower made of the prompt's clips; None has
    `completion_hidden` encode them, with gradient if the tower is trained.
    """

    prompt: Prompt
    completions: Sequence[Tensor]
    vision: Tensor | None = None


def completion_hidden(
    model: nn.Module, groups: Sequence[Group], *, convention: str = "trained"
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states from which each completion token is predicted.

    A completion's first token is predicted from the last prompt token, the others from the token
    before them, so a completion's last token is never run through the model.

    Args:
        model: Qwen2.5-VL with SDPA attention, wrapped by peft or not.
        groups: one row each; rows are padded to the longest.
        convention: of the positions, see `positions.py`.

    Returns:
        hidden (nnz, H), after the final norm, in the model's dtype; multiply by `lm_head`;
        labels (nnz,) int64, the tokens they predict, groups and completions in order;
        cu_seqlens (completions + 1,) int32, where each completion starts in them.

    Raises:
        ValueError: for an empty completion, no groups, or attention that takes no mask.
    """
    if not groups:
        raise ValueError("no groups given")
    base = unwrap(model)
    _check_attention(base)
    device = base.get_input_embeddings().weight.device
    ids = SpecialIds.from_config(base.config)
    rows = [_row(group, ids, convention) for group in groups]
    tokens = pad_sequence([row.tokens for row in rows], batch_first=True).to(device)
    segments = pad_sequence(
        [row.segments for row in rows], batch_first=True, padding_value=_PADDING
    ).to(device)
    positions = pad_sequence([row.positions.T for row in rows], batch_first=True)
    features = prompt_features(base, [g.prompt for g in groups], [g.vision for g in groups])
    features = [f for f in features if f is not None]
    embeddings = embed(base, tokens, segments == 0, torch.cat(features) if features else None, ids)
    hidden = base.model.language_model(
        inputs_embeds=embeddings,
        position_ids=positions.permute(2, 0, 1).to(device),
        attention_mask={"full_attention": group_mask(segments)},
        use_cache=False,
    ).last_hidden_state
    width = tokens.shape[1]
    sources = torch.cat([row.sources + i * width for i, row in enumerate(rows)])
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([0, *map(len, completions)])
    return (
        hidden.flatten(0, 1)[sources.to(device)],
        torch.cat(completions).to(device),
        lengths.cumsum(0, dtype=torch.int32).to(device),
    )


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


def prompt_features(
    model: nn.Module, prompts: Sequence[Prompt], given: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Features (video tokens, H) of each prompt's clips; None for a prompt without clips.

    Those not `given` go through the tower together, with gradient if it is trained.
    """
    features = list(given) if given is not None else [None] * len(prompts)
    todo = [
        i
        for i, prompt in enumerate(prompts)
        if features[i] is None and prompt.pixel_values_videos is not None
    ]
    if todo:
        pixels = torch.cat([prompts[i].pixel_values_videos for i in todo])
        grids = torch.cat([prompts[i].video_grid_thw for i in todo])
        encoded = iter(encode_videos(model, pixels, grids))
        for i in todo:
            clips = [next(encoded) for _ in prompts[i].video_grid_thw]
            features[i] = torch.cat(clips) if len(clips) > 1 else clips[0]
    return features


def embed(
    model: nn.Module, tokens: Tensor, is_prompt: Tensor, features: Tensor | None, ids: SpecialIds
) -> Tensor:
    """Token embeddings (B, L, H) with the features in place of the prompts' video tokens."""
    embeddings = model.get_input_embeddings()(tokens)
    slots = (tokens == ids.video) & is_prompt
    if features is None:
        features = embeddings.new_zeros(0, embeddings.shape[-1])
    if int(slots.sum()) != len(features):
        raise ValueError(f"{int(slots.sum())} video tokens but {len(features)} vision features")
    features = features.to(embeddings.device, embeddings.dtype)
    return embeddings.masked_scatter(slots[..., None], features)


def group_mask(segments: Tensor) -> Tensor:
    """Which tokens see which, bool (B, 1, L, L), from segments (B, L).

    Segment 0 is the prompt, 1 .. G are its completions, -1 is padding. A token sees the prompt and
    its own segment, itself and before. Padding sees itself, so that no softmax is empty.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    seen = ((key == 0) & (query > 0)) | (key == query)
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (seen & causal)[:, None]


@dataclass(frozen=True, eq=False)
class _Row:
    tokens: Tensor  # (L,)
    segments: Tensor  # (L,)
    positions: Tensor  # (3, L)
    sources: Tensor  # (nnz,) index in the row of the token that predicts each completion token


def _row(group: Group, ids: SpecialIds, convention: str) -> _Row:
    prompt = group.prompt
    if not group.completions or any(len(c) == 0 for c in group.completions):
        lengths = [len(c) for c in group.completions]
        raise ValueError(f"a group needs completions of at least one token, got lengths {lengths}")
    positions = prompt_positions(prompt, ids, convention)
    resume = next_position(positions)
    fed = torch.tensor([len(c) - 1 for c in group.completions])
    total, size = int(fed.sum()), len(prompt)
    starts = (fed.cumsum(0) - fed).repeat_interleave(fed)
    offsets = torch.arange(total) - starts
    # The last prompt token, then the completion's tokens but the last, for each completion.
    first = size + fed.cumsum(0) - fed
    sources = [
        torch.cat([torch.tensor([size - 1]), torch.arange(begin, begin + count)])
        for begin, count in zip(first.tolist(), fed.tolist(), strict=True)
    ]
    return _Row(
        tokens=torch.cat([prompt.input_ids, *(c[:-1].cpu() for c in group.completions)]),
        segments=torch.cat(
            [
                torch.zeros(size, dtype=torch.int64),
                torch.arange(1, len(fed) + 1).repeat_interleave(fed),
            ]
        ),
        positions=torch.cat([positions, (resume + offsets).expand(3, -1)], dim=1),
        sources=torch.cat(sources),
    )


def prompt_positions(prompt: Prompt, ids: SpecialIds, convention: str) -> Tensor:
    """(3, P) positions of a prompt."""
    return mrope_positions(
        prompt.input_ids,
        prompt.video_grid_thw,
        prompt.second_per_grid_ts,
        None,
        ids,
        convention=convention,
    )


def _check_attention(base) -> None:
    config = base.model.language_model.config
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"attention {config._attn_implementation!r} takes no mask of pairs; load with sdpa"
        )
    if any(kind != "full_attention" for kind in config.layer_types):
        raise ValueError(f"sliding-window layers are not supported: {set(config.layer_types)}")
