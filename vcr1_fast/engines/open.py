"""The engine that a run's settings name."""

from pathlib import Path

from torch import nn

from vcr1_fast.config.section import ConfigError
from vcr1_fast.engines.config import EngineConfig
from vcr1_fast.engines.sampler import OwnSampler, Sampler
from vcr1_fast.model.files import resolve
from vcr1_fast.model.processor import Processor


def open_sampler(
    settings: EngineConfig,
    path: str | Path,
    model: nn.Module,
    processor: Processor,
    *,
    temperature: float = 1.0,
    processes: int = 1,
) -> Sampler:
    """The engine of `settings`, for the checkpoint at `path` and the model that was loaded from it.

    Args:
        temperature: of all sampling to come.
        processes: of the run.

    Raises:
        ConfigError: for an engine that cannot serve this run, with the reason.
    """
    if settings.engine == "own":
        return OwnSampler(model, processor)
    if settings.url is not None:
        from vcr1_fast.engines.vllm_server import VllmServer

        return VllmServer(
            model,
            processor,
            settings.url,
            temperature=temperature,
            folder=settings.sync_folder,
        )
    if processes > 1:
        raise ConfigError("engine", f"vllm serves one process, the run has {processes}")
    from vcr1_fast.engines.vllm import LocalVllm, VllmSettings

    opened = VllmSettings(
        path=str(resolve(path)),
        memory_gib=settings.memory_gib,
        context=settings.context,
        temperature=temperature,
    )
    try:
        return LocalVllm(model, processor, opened)
    except ImportError as error:
        raise ConfigError("engine", f"vllm cannot be imported: {error}") from error
