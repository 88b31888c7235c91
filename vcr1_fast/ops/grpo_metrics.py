"""The metrics of the GRPO losses by name: which of them mean something, in a dict filled late."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops.grpo_config import LOSS_TYPES, GRPOLossConfig
from vcr1_fast.ops.grpo_reference import METRICS

_Names = tuple[tuple[str, int], ...]  # with indices in the op's vector


class LossMetrics(dict[str, Tensor]):
    """Metrics by name, 0-d tensors: views of one vector, made when the dict is first looked at.

    Making them takes as long as the loss of a small batch, and most steps are not logged.
    """

    _pending: tuple[Tensor, _Names] | None = None

    @classmethod
    def of(cls, vector: Tensor, names: _Names) -> LossMetrics:
        out = cls()
        out._pending = (vector, names)
        return out

    def _fill(self) -> None:
        if self._pending is not None:
            (vector, names), self._pending = self._pending, None
            dict.update(self, _views(vector, names))


def _filled(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def call(self: LossMetrics, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        return method(self, *args, **kwargs)

    call.__name__ = name
    return call


# All that a dict does with its items. dict(m), {**m} and update(m) go through __iter__ and keys().
for _name in (
    "__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__",
    "__ne__", "__or__", "__reduce_ex__", "__repr__", "__reversed__", "__ror__", "__setitem__",
    "clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values",
):  # fmt: skip
    setattr(LossMetrics, _name, _filled(_name))


def name_metrics(
    metrics: Tensor, config: GRPOLossConfig, tokens: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The op's vector as a dict of those that mean something for this call."""
    key = (
        config.loss_type,
        tokens["ref_logps"] is not None,
        tokens["entropy"] is not None,
        tokens["rollout_logps"] is not None,
        config.delta is not None,
        config.off_policy_threshold is not None,
    )
    if torch.compiler.is_compiling():
        return _views(metrics, _NAMED[key])
    return LossMetrics.of(metrics, _NAMED[key])


def _views(vector: Tensor, names: _Names) -> dict[str, Tensor]:
    values = vector.unbind()
    return {name: values[index] for name, index in names}


def _meaningful(
    loss_type: str, ref: bool, entropy: bool, rollout: bool, delta: bool, threshold: bool
) -> _Names:
    """Names and indices of the metrics that say something with these inputs and options."""
    meaningful = {
        "kl": ref,
        "entropy": entropy,
        "clip_delta": delta,
        "vespo_phi": loss_type == "vespo",
        "off_policy_kept": threshold,
        **dict.fromkeys(
            ("clip_low", "clip_high", "clip_region"), loss_type not in ("sapo", "vespo")
        ),
        **{name: rollout for name in METRICS if name.startswith("rollout_")},
    }
    return tuple((name, i) for i, name in enumerate(METRICS) if meaningful.get(name, True))


_NAMED = {key: _meaningful(*key) for key in product(LOSS_TYPES, *[(False, True)] * 5)}
