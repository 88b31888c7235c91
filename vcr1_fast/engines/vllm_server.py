"""A vLLM server as the engine, over HTTP; the trainer's environment needs no vLLM.

The server takes token ids and the clips' features (`/inference/v1/generate`) and says by which
weights each completion was sampled; an answer by any others is an error. Weights go through
safetensors files in a folder that both can read, best in memory. docs/engines.md has the command
line that starts the server.

The wire form of features is internal to a vLLM release: `TESTED` bounds it. Features have the
model's type, 7 KB a vision token for a 7 B model: one node, or a fast network.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vcr1_fast.engines.inputs import Medium
from vcr1_fast.engines.sampler import Weights
from vcr1_fast.engines.vllm import (
    Answer,
    Request,
    VllmSampler,
    check_release,
    check_tokens,
    refuse_missing,
)
from vcr1_fast.model.processor import Processor

CHUNK = 2**30
"""Bytes of weights in one file: the most that trainer and server hold besides their models."""
_TENSOR = 3
"""Message-pack extension under which vLLM sends a tensor's bytes."""


class ServerError(OSError):
    """The server cannot be reached, or refuses a request; the message names the address."""


class VllmServer(VllmSampler):
    """A server at `url` that was started from the run's checkpoint."""

    name = "vllm-server"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        url: str,
        *,
        temperature: float = 1.0,
        folder: str = "/dev/shm",
        timeout: float = 600.0,
    ) -> None:
        """folder: where weights are handed over; timeout: seconds that a request may take.

        ServerError where nothing answers, ValueError for a release that is not known.
        """
        super().__init__(model, processor, temperature)
        self.url, self.timeout = url.rstrip("/"), timeout
        self.path = Path(folder) / f"vcr1-weights-{os.getpid()}.safetensors"
        self.release = str(self.get("/version")["version"])
        check_release(self.release)
        self._can_sync = False

    def _complete(self, requests: Sequence[Request]) -> list[list[Answer]]:
        # The server batches; each thread only waits for its answer.
        with ThreadPoolExecutor(min(64, len(requests))) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request: Request) -> list[Answer]:
        body: dict[str, Any] = {
            "token_ids": request.tokens,
            # JSON has no whole numbers as keys.
            "sampling_params": request.sampling
            | {"logit_bias": {str(k): v for k, v in request.sampling["logit_bias"].items()}},
            "return_token_ids": True,
        }
        if request.media:
            body["features"] = encoded(request.media)
        answer = self.post("/inference/v1/generate", body)
        check_tokens(answer.get("prompt_token_ids"), request.tokens)
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        if len(choices) != request.sampling["n"]:
            raise ServerError(f"{self.url}: {len(choices)} of {request.sampling['n']} completions")
        for one in choices:
            self._check_version(one.get("weight_versions"))
        return [
            Answer(
                one["token_ids"],
                [each["logprob"] for each in one["logprobs"]["content"]],
                one["finish_reason"] == "stop",
            )
            for one in choices
        ]

    def _check_version(self, spans: list[dict[str, Any]] | None) -> None:
        versions = {str(span.get("version")) for span in spans or [{}]}
        if versions != {str(self.version)}:
            raise ValueError(
                f"weights: {self.url} answered by version {', '.join(sorted(versions))}, the run "
                f"asked for {self.version}; does another run use this server?"
            )

    def sync(self, weights: Weights, version: int) -> None:
        from safetensors.torch import save_file

        self.version = None  # until it is done: half a sync answers nothing
        self.post("/pause?mode=wait", {})
        if not self._can_sync:
            self.post("/init_weight_transfer_engine", {"init_info": {}})
            self._can_sync = True
        self.post("/start_weight_update", {})
        try:
            part: dict[str, Tensor] = {}
            for name, tensor in weights:
                part[name] = tensor.detach().cpu().contiguous()
                if sum(one.nbytes for one in part.values()) >= CHUNK:
                    self._send(part, save_file)
                    part = {}
            self._send(part, save_file)
        finally:
            self.path.unlink(missing_ok=True)
        self.post("/finish_weight_update", {"weight_version": str(version)})
        for cache in ("prefix", "mm", "encoder"):
            self.post(f"/reset_{cache}_cache", {})
        self.post("/resume", {})
        for missing in self.post("/collective_rpc", {"method": "vcr1_missing"})["results"]:
            refuse_missing(missing)
        self.version = version

    def _send(self, part: dict[str, Tensor], save_file: Any) -> None:
        if part:
            save_file(part, str(self.path))
            self.post("/update_weights", {"update_info": {"path": str(self.path)}})

    def describe(self) -> str:
        return f"vllm {self.release} at {self.url}"

    def get(self, path: str) -> Any:
        """The JSON answer of a GET request."""
        return self._request(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of a POST request; None where it is empty."""
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, body: bytes | None) -> Any:
        address = self.url + path
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, body, header)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip().replace("\n", " ")
            raise ServerError(f"{address}: {error.code} {said[:500]}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{address}: {reason}") from error
        return json.loads(text) if text else None


def encoded(media: Sequence[Medium]) -> dict[str, Any]:
    """Clips and images as vLLM's generate request takes them. ValueError for a clip whose tokens
    have text between them: the request has no place for which of them are vision tokens."""
    hashes: dict[str, list[str]] = {}
    places: dict[str, list[dict[str, int]]] = {}
    data: dict[str, list[str]] = {}
    for one in media:
        if not bool(one.is_embed.all()):
            raise ValueError(
                "a vLLM server takes no clip with text between its frames: use "
                "rollout.engine vllm or own"
            )
        hashes.setdefault(one.kind, []).append(one.key)
        places.setdefault(one.kind, []).append({"offset": one.start, "length": one.length})
        data.setdefault(one.kind, []).append(_item(one))
    return {"mm_hashes": hashes, "mm_placeholders": places, "kwargs_data": data}


def _item(medium: Medium) -> str:
    """One item of vLLM's `MultiModalKwargsItem`, message-packed and in base 64."""
    import msgspec

    def tensor(value: Tensor) -> tuple[str, tuple[int, ...], Any]:
        raw = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        name = str(value.dtype).removeprefix("torch.")
        return name, tuple(value.shape), msgspec.msgpack.Ext(_TENSOR, raw)

    batched = ("batched", {"keep_on_cpu": True})
    whole = [[(0, len(medium.features), None)]]
    flat = ("flat", {"keep_on_cpu": False, "slices": whole, "dim": 0})
    item: dict[str, Any] = {}
    if medium.seconds is not None:
        seconds = torch.tensor(medium.seconds, dtype=torch.float64)
        item["second_per_grid_ts"] = {"data": tensor(seconds), "field": batched}
    item[f"{medium.kind}_grid_thw"] = {"data": tensor(medium.grid), "field": batched}
    item[f"{medium.kind}_embeds"] = {"data": tensor(medium.features), "field": flat}
    return base64.b64encode(msgspec.msgpack.encode(item)).decode()
