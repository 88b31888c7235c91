"""Which numbers the options of the GRPO loss may hold: no NaN, no infinity, nothing out of range.

A NaN weight or bound would not fail on its own: comparisons with it are false, and a term would be
left out or never clipped without a word.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

# What each option may be besides finite, and whether None stands for "no bound" or "not given".
_ANY, _NOT_NEGATIVE, _POSITIVE = "a finite number", "finite and not negative", "finite and positive"
_RANGES = {
    "eps_low": (_NOT_NEGATIVE, False),
    "eps_high": (_NOT_NEGATIVE, False),
    "delta": (_POSITIVE, True),
    "beta": (_NOT_NEGATIVE, False),
    "kl_input_clamp": (_POSITIVE, True),
    "kl_output_clamp": (_POSITIVE, True),
    "log_ratio_clamp": (_POSITIVE, True),
    "sapo_tau_pos": (_POSITIVE, False),
    "sapo_tau_neg": (_POSITIVE, False),
    "vespo_k_pos": (_NOT_NEGATIVE, False),
    "vespo_lambda_pos": (_NOT_NEGATIVE, False),
    "vespo_k_neg": (_NOT_NEGATIVE, False),
    "vespo_lambda_neg": (_NOT_NEGATIVE, False),
    "rollout_min": (_NOT_NEGATIVE, True),
    "rollout_max": (_POSITIVE, True),
    "off_policy_threshold": (_ANY, True),
    "entropy_coef": (_ANY, False),
    "max_length": (_POSITIVE, True),
    "num_items": (_POSITIVE, True),
    "num_sequences": (_POSITIVE, True),
}


def check_numbers(config: object) -> None:
    """ValueError naming the option and its value where `config` holds a number it may not."""
    for name, (wanted, optional) in _RANGES.items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, Tensor) and name in ("num_items", "num_sequences"):
            _check_count(name, value)
        elif not _fits(value, wanted):
            alternative = " or None" if optional else ""
            raise ValueError(f"{name} must be {wanted}{alternative}, got {value!r}")


def _fits(value: object, wanted: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    number = float(value)
    if not math.isfinite(number):
        return False
    return wanted == _ANY or number > 0 or (number == 0 and wanted == _NOT_NEGATIVE)


def _check_count(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    # Elsewhere looking at it would wait for the device. No tokens at all count as one in the loss.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        number = float(value)
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be {_NOT_NEGATIVE}, got {number}")
