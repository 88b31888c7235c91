"""vLLM as the engine, in the training process: our tokens, our features, the trainer's weights.

vLLM gets what the trainer has: expanded token ids, features of clips and images as embeddings,
grids, and seconds fitted to our positions (`inputs.py`). Nothing is decoded, resized, normalised or
encoded a second time.

vLLM reports one kind of log-prob an engine. At temperature 1 its raw log-probs are `full_logps`
(softmax of the logits); at others its processed ones are `logps`, with `full_logps` left to the
trainer. What it does not report is nan.
"""

import os
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vcr1_fast.engines.inputs import Medium, media_of
from vcr1_fast.engines.sampler import Sampler, Weights
from vcr1_fast.model.forward import lm_head, prompt_features
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.prompt import Prompt
from vcr1_fast.model.rollout import Generators, Rollout, SamplingConfig
from vcr1_fast.model.wrapping import unwrap

TESTED = ("0.31", "0.32")
"""Releases of vLLM whose inputs, positions and wire form this package follows."""

_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The sampler is compiled even in eager mode, which takes most of a minute.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_CI_ENV": "1",
}


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is opened. path: the checkpoint's folder; memory_gib: for keys and values; context:
    tokens of the longest prompt and completion, None for the model's own limit; temperature: that
    all sampling will use (0 goes with 1)."""

    path: str
    memory_gib: float = 4.0
    context: int | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """A prompt as the engine reads it, and how it is sampled (names of vLLM's SamplingParams)."""

    tokens: list[int]
    media: list[Medium]
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A completion: tokens, a log-prob for each, and whether it ended by itself."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class VllmSampler(Sampler):
    """What the colocated engine and a server have in common."""

    def __init__(self, model: nn.Module, processor: Processor, temperature: float) -> None:
        """model: the trainer's, wrapped or not, which encodes clips."""
        self.model, self.processor = model, processor
        self.is_raw = temperature in (0.0, 1.0)
        self.temperature = temperature
        self.banned = processor.banned_ids(len(lm_head(model)[0])).tolist()

    @property
    def logprobs_mode(self) -> str:
        """vLLM's name of the log-probs that this engine reports."""
        return "raw_logprobs" if self.is_raw else "processed_logprobs"

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingConfig,
        seed: Generators,
        features: Sequence[Tensor | None] | None = None,
    ) -> Rollout:
        if not prompts or group_size < 1:
            raise ValueError(f"got {len(prompts)} prompts and a group size of {group_size}")
        if self.version is None:
            raise ValueError(f"{self.name}: sync the weights before the first rollout")
        base = unwrap(self.model)
        found = prompt_features(base, prompts, features)
        requests = []
        shared = seed is None or isinstance(seed, torch.Generator)
        seeds: Any = [seed] * len(prompts) if shared else seed
        for prompt, own, generator in zip(prompts, found, seeds, strict=True):
            number = int(torch.randint(2**62, (), generator=generator))
            media = media_of(prompt, own, base.config, self.version)
            how = self._sampling(sampling, group_size, number)
            requests.append(Request(prompt.input_ids.tolist(), media, how))
        answers = self._complete(requests)
        if sampling.temperature == 0:  # sampled once: all completions of a prompt are the same
            answers = [group * group_size for group in answers]
        return self._gather(prompts, answers, found, sampling)

    @abstractmethod
    def _complete(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The completions of each request, by the weights of `version`."""

    def _sampling(self, sampling: SamplingConfig, group_size: int, seed: int) -> dict[str, Any]:
        temperature = sampling.temperature
        # vLLM raises lower temperatures to 0.01; and one engine reports one kind of log-prob.
        if 0 < temperature < 0.01 or (temperature not in (0.0, 1.0)) == self.is_raw:
            raise ValueError(
                f"temperature {temperature} of an engine opened for {self.temperature}: open one "
                "for each, at 0.01 or more"
            )
        return {
            "n": group_size if temperature else 1,
            "temperature": temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            "logprobs": 0,
            "logit_bias": {token: -100.0 for token in self.banned},
            # Ours is the only end; <|endoftext|> and the like are banned.
            "ignore_eos": True,
            "stop_token_ids": [self.processor.stop_id],
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),
        }

    def _gather(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Answer]],
        features: list[Tensor | None],
        sampling: SamplingConfig,
    ) -> Rollout:
        tokens = [[torch.tensor(one.tokens) for one in group] for group in answers]
        reported = [[torch.tensor(one.logprobs) for one in group] for group in answers]
        unknown = [[torch.full_like(one, torch.nan) for one in group] for group in reported]
        logps = reported if not self.is_raw else unknown
        if sampling.temperature == 0:
            logps = [[torch.zeros_like(one) for one in group] for group in reported]
        return Rollout(
            tokens=tokens,
            logps=logps,
            full_logps=reported if self.is_raw else unknown,
            texts=[
                [self.processor.turn(prompt, one) for one in group]
                for prompt, group in zip(prompts, tokens, strict=True)
            ],
            finished=[[one.finished for one in group] for group in answers],
            vision=features,
        )


class LocalVllm(VllmSampler):
    """vLLM in this process, its weights copied from the trainer's by reference."""

    name = "vllm"

    def __init__(self, model: nn.Module, processor: Processor, settings: VllmSettings) -> None:
        """ImportError where vLLM is not installed, ValueError for a release that is not known."""
        super().__init__(model, processor, settings.temperature)
        weight = lm_head(model)[0]
        self.on_cpu = weight.device.type == "cpu"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for key, value in _CPU.items() if self.on_cpu else ():
            os.environ.setdefault(key, value)
        with _same_randomness():
            import vllm

            check_release(vllm.__version__)
            self.release = vllm.__version__
            self.llm: Any = vllm.LLM(
                settings.path,
                dtype=str(weight.dtype).removeprefix("torch."),
                enforce_eager=self.on_cpu,
                enable_mm_embeds=True,
                limit_mm_per_prompt={"image": 64, "video": 16},
                skip_mm_profiling=True,
                max_model_len=settings.context,
                kv_cache_memory_bytes=int(settings.memory_gib * 2**30),
                generation_config="vllm",
                logprobs_mode=self.logprobs_mode,
                # The CPU's default of 128 is longer than short prompts, which then share nothing.
                **({"block_size": 32} if self.on_cpu else {"enable_sleep_mode": True}),
            )
        self._asked = 0

    def _complete(self, requests: Sequence[Request]) -> list[list[Answer]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        names = []
        for request in requests:
            names.append(str(self._asked))
            self._asked += 1
            # By default an answer holds whichever of the n completions has come on.
            how = SamplingParams(**request.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(names[-1], _engine_input(request), how)
        done = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
        for name, request in zip(names, requests, strict=True):
            check_tokens(done[name].prompt_token_ids, request.tokens)
            if len(done[name].outputs) != request.sampling["n"]:
                count = len(done[name].outputs)
                raise ValueError(f"vLLM gave {count} of {request.sampling['n']} completions")
        return [
            [
                Answer(
                    list(one.token_ids),
                    [
                        at[token].logprob
                        for token, at in zip(one.token_ids, one.logprobs, strict=True)
                    ],
                    one.finish_reason == "stop",
                )
                for one in sorted(done[name].outputs, key=lambda one: one.index)
            ]
            for name in names
        ]

    def sync(self, weights: Weights, version: int) -> None:
        from vcr1_fast.engines.vllm_worker import load_policy

        self.version = None  # until it is done: half a sync answers nothing
        # One worker in this process: the tensors arrive as they are, without a copy.
        self.llm.collective_rpc(load_policy, args=(weights,))
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.version = version

    def sleep(self) -> None:
        if not self.on_cpu:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        if not self.on_cpu:
            self.llm.wake_up()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def describe(self) -> str:
        return f"vllm {self.release}, in this process"


def check_release(version: str) -> None:
    """ValueError for a vLLM that this package has not been tried with: inputs and positions are
    internal to a release, and a changed one gives wrong numbers rather than an error."""
    if not version.startswith(tuple(f"{one}." for one in TESTED)):
        raise ValueError(f"vLLM {version} is not among the releases known, {', '.join(TESTED)}")


def refuse_missing(names: Sequence[str]) -> None:
    """ValueError where weights were not given: vLLM keeps their older values without a word."""
    if names:
        raise ValueError(
            f"weights: {len(names)} were not given and keep older values: {', '.join(names[:4])}"
        )


def check_tokens(theirs: Sequence[int] | None, ours: Sequence[int]) -> None:
    """ValueError where the engine read other tokens than the trainer's."""
    if theirs is not None and list(theirs) != list(ours):
        pairs = enumerate(zip(theirs, ours, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        raise ValueError(
            f"tokens: the engine read {len(theirs)} of a prompt, the trainer has {len(ours)}; they "
            f"differ from token {at} on"
        )


def _engine_input(request: Request) -> Any:
    from transformers import BatchFeature
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import (
        MultiModalFieldConfig,
        MultiModalKwargsItems,
        PlaceholderRange,
    )

    if not request.media:
        return tokens_input(request.tokens)
    data: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    batched = MultiModalFieldConfig.batched
    hashes: dict[str, list[str]] = {}
    places: dict[str, list[Any]] = {}
    for kind in sorted({medium.kind for medium in request.media}):
        own = [medium for medium in request.media if medium.kind == kind]
        data[f"{kind}_grid_thw"] = torch.stack([medium.grid for medium in own])
        fields[f"{kind}_grid_thw"] = batched(kind, keep_on_cpu=True)
        data[f"{kind}_embeds"] = torch.cat([medium.features for medium in own])
        sizes = torch.tensor([len(medium.features) for medium in own])
        fields[f"{kind}_embeds"] = MultiModalFieldConfig.flat_from_sizes(kind, sizes)
        if kind == "video":
            seconds = [medium.seconds for medium in own]
            # Float64: fitted seconds have no float32.
            data["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64)
            fields["second_per_grid_ts"] = batched(kind, keep_on_cpu=True)
        hashes[kind] = [medium.key for medium in own]
        places[kind] = [
            PlaceholderRange(
                offset=medium.start,
                length=medium.length,
                is_embed=None if bool(medium.is_embed.all()) else medium.is_embed,
            )
            for medium in own
        ]
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(data), fields)
    return mm_input(request.tokens, items, hashes, places)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """vLLM seeds every generator of the process when it starts: put the run's states back."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
