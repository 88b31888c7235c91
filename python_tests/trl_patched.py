"""A pytest plugin: what it is loaded into runs with TRL patched."""

from vcr1_fast.integrations.trl import patch_trl

patch_trl()
