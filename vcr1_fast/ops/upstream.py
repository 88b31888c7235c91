"""Gradients made in the forward pass, times the gradient that arrives in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of this name, but free where no graph of the backward pass is made: in
    every pass without create_graph."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run
