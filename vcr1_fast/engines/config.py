"""Settings of engines, shared by training and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from vcr1_fast.config.section import ConfigError, section


@section
class EngineConfig:
    """What samples completions, see docs/engines.md."""

    engine: Literal["own", "vllm", "vllm-server"] = "own"
    """"own": the model being trained; "vllm": vLLM in this process, which must be installed;
    "vllm-server": a vLLM server at `url`."""
    url: str | None = None
    """Address of the server, http://HOST:PORT."""
    sync_folder: str = "/dev/shm"
    """Folder that this process and the server share, through which weights go."""
    memory_gib: PositiveFloat = 4.0
    """GiB that vLLM takes for keys and values; "own" uses what is free."""
    context: PositiveInt | None = None
    """Tokens of the longest prompt and completion that vLLM makes room for; null: the model's
    limit."""

    def __post_init__(self) -> None:
        if (self.engine == "vllm-server") != (self.url is not None):
            raise ConfigError("url", f"goes with engine: vllm-server, got {self.engine}")
