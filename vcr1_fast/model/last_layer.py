"""Skip the unused rows of the last decoder layer.

After the last layer only the rows from which a token is predicted are read: a prompt's last token
and the completion tokens. So the layer's MLP, the larger part of a layer, runs on those rows alone,
and its attention skips the other queries (`attention.py`); as keys and values all tokens are still
read. The skipped rows are zero, and so would their gradients be.

The model's own modules run: hooks choose their rows.
"""

from typing import Any

import torch
from torch import Tensor


class _UsedRows:
    """State that the hooks of one layer share: the rows the MLP runs on, out of `size`."""

    rows: Tensor | None = None  # None: all
    size: int = 0


def skip_unused_rows(layer: Any) -> None:
    """Skip unused rows of `layer`, the last decoder layer, in passes over a pack: those that say
    where its groups lie by the keyword argument `spans`. Other passes run every row.

    The hooks are on the attention and the MLP, not on the layer: when activations are recomputed,
    transformers calls the layer's `forward` past the layer's own hooks, possibly after passes over
    other packs, so the rows must be noted by a hook that runs again.
    """
    if hasattr(layer.mlp, "vcr1_used_rows"):
        return
    # One object for both modules; deepcopy keeps that so in a copy of the model.
    layer.self_attn.vcr1_used_rows = layer.mlp.vcr1_used_rows = _UsedRows()
    # Module-level functions, not closures: a copy or a pickle of the model gets its own state.
    layer.self_attn.register_forward_pre_hook(_note_rows, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(_take_rows)
    layer.mlp.register_forward_hook(_put_rows)


def _note_rows(attention: Any, _: Any, kwargs: dict[str, Any]) -> None:
    """Runs in every pass, also in one that recomputes activations."""
    spans = kwargs.get("spans")
    rows = None if spans is None else torch.cat([span.read for span in spans])
    attention.vcr1_used_rows.rows = rows


def _take_rows(mlp: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    used: _UsedRows = mlp.vcr1_used_rows
    if used.rows is None:
        return None
    used.size = inputs[0].shape[1]
    return (inputs[0].index_select(1, used.rows),)


def _put_rows(mlp: Any, _: tuple[Tensor], out: Tensor) -> Tensor | None:
    used: _UsedRows = mlp.vcr1_used_rows
    if used.rows is None:
        return None
    whole = out.new_zeros(out.shape[0], used.size, out.shape[2])
    return whole.index_copy(1, used.rows, out)
