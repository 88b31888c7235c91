"""Qwen2.5-VL: the only part of the package that knows the model."""
