"""The last layer without what nobody reads of it.

From the last layer on a prompt's tokens are read nowhere but in the last of them, from which the
completions' first tokens are predicted; before it they are read as keys and values. So the last
layer's MLP, the larger part of a layer, runs on those rows and on the completions alone, and its
attention does without the other queries (`attention.py`). The rows left out are zero, and so would
their gradients be.

The model's own modules run: hooks choose their rows.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Unread:
    """What the hooks of a layer share: the rows that its MLP runs on, out of how many."""

    rows: Tensor | None = None  # None: all
    size = 0


def skip_unread_rows(layer: nn.Module) -> None:
    """Let the decoder layer `layer`, the last one, do so in passes over a pack, which say where
    its groups lie by the keyword argument `spans`. Other passes stay whole.

    The hooks are those of the attention and of the MLP, none of the layer's own: where activations
    are recomputed, transformers runs the layer's `forward` past the layer's hooks, by then possibly
    after passes over other packs.
    """
    if hasattr(layer.mlp, "vcr1_unread"):
        return
    # One object for both, which a copy of the model has once too.
    layer.self_attn.vcr1_unread = layer.mlp.vcr1_unread = _Unread()
    # Plain functions on what they are given, so that a copy of the model has hooks of its own.
    layer.self_attn.register_forward_pre_hook(_note_rows, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(_take_rows)
    layer.mlp.register_forward_hook(_put_rows)


def _note_rows(attention: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """At every pass, one that recomputes activations too."""
    spans = kwargs.get("spans")
    rows = None if spans is None else torch.cat([span.read for span in spans])
    attention.vcr1_unread.rows = rows


def _take_rows(mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    unread = mlp.vcr1_unread
    if unread.rows is None:
        return None
    unread.size = inputs[0].shape[1]
    return (inputs[0].index_select(1, unread.rows),)


def _put_rows(mlp: nn.Module, _: tuple[Tensor], out: Tensor) -> Tensor | None:
    unread = mlp.vcr1_unread
    if unread.rows is None:
        return None
    whole = out.new_zeros(out.shape[0], unread.size, out.shape[2])
    return whole.index_copy(1, unread.rows, out)
