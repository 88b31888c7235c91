"""Applies `patch_verl` when imported: for verl's `external_lib` and VERL_USE_EXTERNAL_MODULES."""

from vcr1_fast.integrations.verl import patch_verl

patch_verl()
