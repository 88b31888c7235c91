"""Settings of engines, shared by training and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from vcr1_fast.config.section import section


@section
class EngineConfig:
    """What samples completions, see docs/engines.md."""

    engine: Literal["own", "vllm"] = "own"
    """"own": the model being trained; "vllm": vLLM in this process, which must be installed."""
    memory_gib: PositiveFloat = 4.0
    """GiB that vLLM takes for keys and values; "own" uses what is free."""
    context: PositiveInt | None = None
    """Tokens of the longest prompt and completion that vLLM makes room for; null: the model's
    limit."""
