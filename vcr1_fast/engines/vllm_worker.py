"""What runs inside vLLM: weights of a policy into its model. Imported in vLLM's processes only.

`load_policy` is called in the trainer's process where the engine is colocated. A server is started
with `--worker-extension-cls vcr1_fast.engines.vllm_worker.Extension`, whose import registers the
weight-transfer backend `vcr1_shm`: safetensors files in memory that trainer and server share, one
a chunk, so that neither holds the model twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from vcr1_fast.engines.vllm import refuse_missing

BACKEND = "vcr1_shm"


def load_policy(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> int:
    """Load the weights into the model of vLLM's `worker`; how many tensors they were. ValueError
    for names that are missing: vLLM would keep the old ones without a word."""
    from vllm.config import set_current_vllm_config

    session = _Session(worker.model_runner.get_model(), worker.model_config)
    with set_current_vllm_config(worker.vllm_config):
        session.start()
        session.load(weights)
        session.finish()
    worker.model_runner.reset_lora_state()
    refuse_missing(session.missing())
    return len(session.given)


class _Session:
    """One update of all weights, in any number of parts."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config
        self.given: set[str] = set()

    def start(self) -> None:
        self.given = set()
        initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        def noted() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                self.given.add(name)
                yield name, tensor.detach()

        self.model.load_weights(noted())

    def finish(self) -> None:
        finalize_layerwise_reload(self.model, self.config)
        head: Any = getattr(self.model.language_model, "lm_head", None)
        if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
            # A tied head keeps a packed copy of the old embedding, which nothing else renews.
            head.quant_method.process_weights_after_loading(head)

    def missing(self) -> list[str]:
        """Weights that the engine was started with and was not given."""
        mapper = self.model.hf_to_vllm_mapper
        tied = getattr(self.config.hf_config, "tie_word_embeddings", False)

        def mapped(names: Iterable[str]) -> set[str]:
            found = set(mapper.apply_list(sorted(names)))
            return {n for n in found if not (tied and n.endswith("lm_head.weight"))}

        return sorted(mapped(_stored_names(self.config.model)) - mapped(self.given))


def _stored_names(folder: str) -> list[str]:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files to check the weights' names by")
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as stored:
            names += stored.keys()
    return names


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing: files are named in each update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file that the server can read, best in memory (/dev/shm)."""

    path: str = ""


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's life cycle of a weight update, on `_Session`."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.session = _Session(self.model, self.model_config)
        self.session.start()

    def update_weights(self, update_info: Any) -> None:
        # The base class waits for an accelerator, which a CPU has not.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.session.load(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        self.session.finish()

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


class Extension:
    """Methods that `--worker-extension-cls` adds to the worker."""

    weight_transfer_engine: Any

    def vcr1_missing(self) -> list[str]:
        """Weights that the last update did not bring. Asked for, not raised in the update: a worker
        whose update failed takes no other one."""
        return self.weight_transfer_engine.session.missing()
