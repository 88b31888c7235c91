"""The vision tower with its attention batched over windows, and clips encoded by it.

Qwen2.5-VL's tower attends within windows of a frame (in most layers) or within a frame. Without
FlashAttention transformers runs these one after another in Python, thousands for a clip of 32
frames. Here all windows of one size are one batch: the same products, softmax by softmax. On CUDA,
in half precision, torch's own attention over packed sequences takes them all in one call, where
this torch has it.

The model's own modules run unchanged; they take this attention because it is registered with
transformers under a name of its own.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    Returns (1, N, heads, D). `module`, the mask and the other arguments are not used: the tower has
    neither masks nor dropout.
    """
    if takes_varlen(query):
        return varlen_attention(query, key, value, scaling, cu_seq_lens_q), None
    plan = getattr(cu_seq_lens_q, "_vcr1_plan", None)
    if plan is None:
        # All blocks of a forward pass get the same tensor: the plan is made once and dropped with
        # it.
        plan = cu_seq_lens_q._vcr1_plan = _plan(cu_seq_lens_q, query.device)
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
    return query.is_cuda and half and query.shape[-1] % 8 == 0 and _varlen_kernel() is not None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, boundaries: Tensor
) -> Tensor:
    """`packed_attention` by `torch.nn.attention.varlen`; returns (1, N, heads, D)."""
    longest = getattr(boundaries, "_vcr1_longest", None)
    if longest is None:  # one wait for the device in a forward pass
        longest = boundaries._vcr1_longest = int(boundaries.diff().max())
    edges = boundaries.to(query.device, torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _varlen_kernel()(q, k, v, edges, edges, longest, longest, scale=scaling)[None]


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's, or None before it came, or came to take a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


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
        """(N, 3, 2, 14, 14) to (N, channels, 1, 1, 1)."""
        out = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[:, :, None, None, None]


def prepare_vision(model: nn.Module) -> None:
    """Let the vision tower of `model` use `packed_attention` and `PatchProjection`.

    Parameters and their names stay as they are; FlashAttention is left in place.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    visual = unwrap(model).model.visual
    if "flash" not in (visual.config._attn_implementation or ""):
        visual.config._attn_implementation = PACKED_ATTENTION
    projection = visual.patch_embed.proj
    if type(projection) is nn.Conv3d and projection.kernel_size == projection.stride:
        projection.__class__ = PatchProjection


def freeze_vision(model: nn.Module, *, merger: bool = True) -> None:
    """Take the vision tower out of training; `merger=False` leaves its projection trainable."""
    for name, parameter in unwrap(model).model.visual.named_parameters():
        if merger or not name.startswith("merger."):
            parameter.requires_grad_(False)


def encode_videos(model: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
    """Encode clips, and images as clips of one temporal patch, in one pass of the vision tower.

    Args:
        model: Qwen2.5-VL, wrapped or not.
        pixel_values: (N, 1176) patches of all clips, any float dtype, any device.
        grid_thw: (n, 3) patches along time, height and width of each clip.

    Returns:
        For each clip (tokens, hidden) in the tower's dtype, on its device: one row a video token.
        With gradient only if the tower has parameters to train.
    """
    visual = unwrap(model).model.visual
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
    grid_thw = grid_thw.to(visual.device)
    with torch.set_grad_enabled(trained):
        hidden = visual(
            pixel_values.to(visual.device, visual.dtype), grid_thw=grid_thw
        ).pooler_output
    counts = grid_thw.prod(dim=1) // visual.spatial_merge_size**2
    return torch.split(hidden, counts.tolist())
