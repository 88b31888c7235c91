"""Vision encoders: prepared, frozen, and called; attention batched over their windows.

An encoder attends within windows of a frame or within a frame. Without FlashAttention transformers
runs these one after another in Python, thousands for a clip of 32 frames. Here all windows of one
size are one batch: the same products, softmax by softmax. On CUDA, in half precision, torch's own
attention over packed sequences takes them all in one call, where this torch has it.

The model's own modules run unchanged; they use this attention because it is registered with
transformers under a separate name. `model/family.py` says which module of a model is the encoder
and how it is called.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vcr1_fast.model.family import family_of
from vcr1_fast.model.wrapping import unwrap

# transformers hands packed sequences with their boundaries, instead of a piece at a time, to every
# attention whose name has "flash" in it.
PACKED_ATTENTION = "vcr1_packed_flash"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention within each piece of a packed sequence, all pieces of a length as one batch.

    query, key, value: (1, heads, N, D); cu_seq_lens_q: (pieces + 1,) boundaries 0 .. N.
    Returns (1, N, heads, D). `module`, the mask and the other arguments are not used: a vision
    encoder has neither masks nor dropout.
    """
    if takes_varlen(query):
        return varlen_attention(query, key, value, scaling, cu_seq_lens_q), None
    # All blocks of a forward pass get the same tensor: the plan is made once and dropped with it.
    boundaries: Any = cu_seq_lens_q
    plan = getattr(boundaries, "_vcr1_plan", None)
    if plan is None:
        plan = boundaries._vcr1_plan = _plan(cu_seq_lens_q, query.device)
    groups, order = plan
    heads, size, dim = query.shape[1:]
    if order is None:
        count, length = groups[0]
        q, k, v = (x.view(heads, count, length, dim).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return out.transpose(1, 2).reshape(1, size, heads, dim), None
    packed = torch.stack([query[0], key[0], value[0]])[:, :, order]
    outputs, start = [], 0
    for count, length in groups:
        part = packed[:, :, start : start + count * length]
        q, k, v = part.view(3, heads, count, length, dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dim))
        start += count * length
    back = torch.empty_like(order)
    back[order] = torch.arange(size, device=order.device)
    return torch.cat(outputs)[back][None], None


def takes_varlen(query: Tensor) -> bool:
    """Whether `varlen_attention` serves such queries (1, heads, N, D)."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and query.shape[-1] % 8 == 0):
        return False
    # Its flash kernels need compute capability 8.0.
    capable = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return capable and _varlen_kernel() is not None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, boundaries: Any
) -> Tensor:
    """`packed_attention` by `torch.nn.attention.varlen`; returns (1, N, heads, D)."""
    longest = getattr(boundaries, "_vcr1_longest", None)
    if longest is None:  # one wait for the device in a forward pass
        longest = boundaries._vcr1_longest = int(boundaries.diff().max())
    edges = boundaries.to(query.device, torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    kernel = _varlen_kernel()
    assert kernel is not None  # `takes_varlen`
    return kernel(q, k, v, edges, edges, longest, longest, scale=scaling)[None]


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's, or None before it came, or came to take a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Any = varlen_attn  # its other results come with arguments that are not given here
    return kernel if "scale" in inspect.signature(kernel).parameters else None


def _plan(boundaries: Tensor, device: torch.device) -> tuple[list[tuple[int, int]], Tensor | None]:
    """([(pieces, length), ...], order of the tokens by that); no order when all lengths agree."""
    edges = boundaries.tolist()
    pieces: dict[int, list[int]] = {}
    for start, end in pairwise(edges):
        pieces.setdefault(end - start, []).append(start)
    groups = [(len(starts), length) for length, starts in pieces.items()]
    if len(groups) == 1:
        return groups, None
    order = [
        (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        for length, starts in pieces.items()
    ]
    return groups, torch.cat(order).to(device)


class PatchProjection(nn.Conv3d):
    """A convolution over patches of exactly its kernel's size, as the matrix product it is.

    The convolution libraries take several times as long, forward and backward.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (N, 3, temporal, patch, patch) to (N, channels, 1, 1, 1)."""
        out = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[:, :, None, None, None]


def use_packed_attention(encoder: nn.Module) -> None:
    """Let a vision encoder of transformers use `packed_attention`; FlashAttention stays."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    config: Any = encoder.config
    if "flash" not in (config._attn_implementation or ""):
        config._attn_implementation = PACKED_ATTENTION


def use_patch_projection(patch_embed: Any) -> None:
    """Compute `patch_embed.proj` by `PatchProjection`; parameters and their names stay."""
    projection = patch_embed.proj
    if type(projection) is nn.Conv3d and projection.kernel_size == projection.stride:
        projection.__class__ = PatchProjection


def vision_encoder(model: nn.Module) -> nn.Module:
    """The module of a model, wrapped or not, that encodes clips and images."""
    return family_of(model).vision_encoder(unwrap(model))


def prepare_vision(model: nn.Module) -> None:
    """Put the family's faster attention and modules into the vision encoder of `model`."""
    family_of(model).prepare_vision(vision_encoder(model))


def vision_is_frozen(model: nn.Module) -> bool:
    """Whether no parameter of the vision encoder is trained, adapters included."""
    return not any(parameter.requires_grad for parameter in vision_encoder(model).parameters())


def freeze_vision(model: nn.Module, *, merger: bool = True) -> None:
    """Do not train the vision encoder; `merger=False` keeps its projection to the language model
    trainable."""
    projection = family_of(model).projection_prefixes
    for name, parameter in vision_encoder(model).named_parameters():
        if merger or not name.startswith(projection):
            parameter.requires_grad_(False)


def encode_videos(model: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    """Encode clips, and images as clips of one temporal patch, in one pass of the vision encoder.

    Args:
        model: wrapped or not.
        pixel_values: (N, values of a patch) patches of all clips, any float dtype, any device.
        grid_thw: (n, 3) patches along time, height and width of each clip.

    Returns:
        For each clip its features (vision tokens, levels * H), in the encoder's dtype, on its
        device. With gradient only if the encoder has parameters to train.
    """
    encoder: Any = vision_encoder(model)
    trained = torch.is_grad_enabled() and not vision_is_frozen(model)
    with torch.set_grad_enabled(trained):
        pixels = pixel_values.to(encoder.device, encoder.dtype)
        return family_of(model).encode(encoder, pixels, grid_thw.to(encoder.device))


def reorder_frames(features: Tensor, grid_thw: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Features of clips with their temporal patches in another order, computed from the features
    of the clips as they are.

    Exact for an encoder that never attends beyond a temporal patch and takes its positions from
    height and width alone: what it makes of a temporal patch does not depend on its place.

    Args:
        features: (tokens, levels * H) of one or more clips in a row, as `encode_videos` gives them.
        grid_thw: (n, 3) patches along time, height and width of each clip.
        orders: for each clip, which temporal patch comes first, second, ...

    Raises:
        ValueError: where an order is no permutation of its clip's temporal patches.
    """
    patches = int(grid_thw.prod(dim=1).sum())
    merged, rest = divmod(patches, len(features))  # patches that make a token
    if rest:
        raise ValueError(f"{len(features)} features do not divide {patches} patches")
    parts, start = [], 0
    for (frames, height, width), order in zip(grid_thw.tolist(), orders, strict=True):
        if sorted(order) != list(range(frames)):
            raise ValueError(f"{list(order)} is no order of {frames} temporal patches")
        size = height * width // merged
        clip = features[start : start + frames * size].unflatten(0, (frames, size))
        parts.append(clip[list(order)].flatten(0, 1))
        start += frames * size
    return torch.cat(parts)
