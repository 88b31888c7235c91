"""Models inside wrappers, and what transformers calls by different names in different versions."""

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The bare transformers model inside a peft, DDP or compile wrapper."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module"):
            model = model.module
        else:
            return model


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    Takes effect in training mode (`model.train()`), in the language model and the vision encoder.
    Works with frozen parameters and adapters, because the non-reentrant form is used.
    """
    base = unwrap(model)
    # Renamed in transformers 5.2x, where the old name warns.
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
