"""Gradients made in the forward pass, times the gradient that arrives in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

# Whether the running backward pass leaves its graph for another one.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def times_upstream(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream (0-d), in gradient's own memory unless the graph is kept for another
    pass: a fresh tensor of a weight's size costs more than the product. Never waits for a GPU."""
    if torch.compiler.is_compiling() or _graph_is_kept():
        return gradient * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient
    return gradient.mul_(upstream)
