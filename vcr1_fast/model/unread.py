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


def skip_unread_rows(layer: nn.Module) -> None:
    """Let the decoder layer `layer`, the last one, do so in passes over a pack, which say where
    its groups lie by the keyword argument `spans`. Other passes stay whole."""
    if hasattr(layer.mlp, "vcr1_rows"):
        return
    layer.mlp.vcr1_rows = None
    # Plain functions on what they are given, so that a copy of the model has hooks of its own.
    layer.register_forward_pre_hook(_note_rows, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(_take_rows)
    layer.mlp.register_forward_hook(_put_rows)


def _note_rows(layer: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """At every pass, one that recomputes activations too."""
    spans = kwargs.get("spans")
    layer.mlp.vcr1_rows = None if spans is None else torch.cat([span.read for span in spans])


def _take_rows(mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    if mlp.vcr1_rows is None:
        return None
    mlp.vcr1_size = inputs[0].shape[1]
    return (inputs[0].index_select(1, mlp.vcr1_rows),)


def _put_rows(mlp: nn.Module, _: tuple[Tensor], out: Tensor) -> Tensor | None:
    if mlp.vcr1_rows is None:
        return None
    whole = out.new_zeros(out.shape[0], mlp.vcr1_size, out.shape[2])
    return whole.index_copy(1, mlp.vcr1_rows, out)
