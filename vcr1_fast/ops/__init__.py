"""Fused operators: they need torch alone, and work in any trainer."""

from vcr1_fast.ops.backend import use

__all__ = ["use"]
