"""Models inside wrappers, and what transformers calls by different names in different versions."""

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The bare transformers model inside a peft, DDP or compile wrapper."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "module"):
            inner = inner.module
        else:
            return inner


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    Takes effect in training mode (`model.train()`), in the language model and the vision encoder.
    Works with frozen parameters and adapters, because the non-reentrant form is used.
    """
    base = unwrap(model)
    # Renamed in transformers 5.2x, where the old name warns.
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
