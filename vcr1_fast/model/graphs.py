"""Decoding steps recorded as CUDA graphs, and kept for the rollouts to come.

A pass over one token a row is a thousand small kernels; launched one by one from Python they take
longer to launch than to run. A graph reads and writes the tensors that it was recorded with, so a
recording keeps them, and a later rollout of the same shapes copies its prompts' keys into them
(`SharedPrefix.move_to`): a copy of the keys instead of two runs of the step and a recording.

No graph has run on a GPU yet: decoding "graphs" is asked for by name.
"""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vcr1_fast.model.sampling import Sampled

PREFIX_STEP = 256
"""Prompts are padded to a multiple of this, so that rollouts meet again in one shape."""
_MOST = 16


class Recording(NamedTuple):
    """A graph, and the tensors that it reads and writes: of the memory (`SharedPrefix.tensors`),
    the step's inputs, the banned tokens, and its results."""

    graph: Any
    memory: list[Tensor]
    inputs: tuple[Tensor, ...]
    banned: Tensor
    sampled: Sampled


class Recordings:
    """The recordings of one model, by shape; the least recently used of more than 16 are dropped.

    All share one pool of memory, since no two run at a time. They hold for the model's parameters
    as they lie in memory and for its adapters as they are set; when that changes all are dropped.
    """

    def __init__(self) -> None:
        self._by_key: OrderedDict[Hashable, Recording] = OrderedDict()
        self._state: Hashable = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._by_key)

    def check(self, model: nn.Module) -> None:
        """Drop recordings of another state of the model."""
        state = _state_of(model)
        if state != self._state:
            self.clear()
            self._state = state

    def clear(self) -> None:
        self._by_key.clear()

    def pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def find(self, key: Hashable) -> Recording | None:
        if key in self._by_key:
            self._by_key.move_to_end(key)
        return self._by_key.get(key)

    def add(self, key: Hashable, recording: Recording) -> None:
        self._by_key[key] = recording
        while len(self._by_key) > _MOST:
            self._by_key.popitem(last=False)


_recordings: "weakref.WeakKeyDictionary[nn.Module, Recordings]" = weakref.WeakKeyDictionary()


def recordings_of(model: nn.Module) -> Recordings:
    """The model's recordings, which live as long as it does."""
    return _recordings.setdefault(model, Recordings())


def forget_recordings() -> None:
    """Drop all recordings, and with them the keys of the last rollouts: memory is short."""
    for recordings in _recordings.values():
        recordings.clear()


def _state_of(model: nn.Module) -> Hashable:
    """Where the parameters lie and which adapters take part: what a graph has taken for granted."""
    tensors = (*model.parameters(), *model.buffers())
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "merged_adapters")]  # peft's
    adapters = [
        (m.disable_adapters, tuple(m.merged_adapters), tuple(m.active_adapters)) for m in layers
    ]
    return tuple((x.data_ptr(), x.dtype) for x in tensors), tuple(adapters)


class GraphedStep:
    """`step` (a `TokenStep`) as a CUDA graph: replayed where the model has a recording of these
    shapes, and recorded otherwise.

    Recording runs the step once more, which writes the same keys to the same place; states, which a
    step advances, are put back. The next call overwrites what a call returns. The step draws no
    random numbers: `uniforms` are its input, so no generator's state is part of a recording.
    """

    def __init__(self, step: Any) -> None:
        self.step, self.version = step, -1
        self.recordings = recordings_of(step.model)
        self.recordings.check(step.model)
        self.recording: Recording | None = None

    def __call__(self, *inputs: Tensor) -> Sampled:
        """As `TokenStep`."""
        # Streams and graphs are those of the current device, which need not be the model's: the
        # graph of another device would stay empty.
        with torch.cuda.device(inputs[0].device):
            if self.version != self.step.memory.version:
                self.recording = self._find_or_record(inputs)
                self.version = self.step.memory.version
            assert self.recording is not None
            for held, given in zip(self.recording.inputs, inputs, strict=True):
                held.copy_(given)
            self.recording.graph.replay()
        return self.recording.sampled

    def _find_or_record(self, inputs: tuple[Tensor, ...]) -> Recording:
        memory, sampling = self.step.memory, self.step.sampling
        tensors = memory.tensors()
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (
            tuple((x.shape, x.dtype) for x in (*tensors, *inputs)),
            (sampling.temperature, sampling.top_k, sampling.top_p),
            tuple(self.step.banned.tolist()),
            memory.prompts,
            autocast,
        )
        found = self.recordings.find(key)
        if found is not None:
            memory.move_to(found.memory)
            return found
        recording = self._record(tensors, inputs)
        self.recordings.add(key, recording)
        return recording

    def _record(self, tensors: list[Tensor], inputs: tuple[Tensor, ...]) -> Recording:
        # Copied: they may be outputs of another graph.
        held = tuple(x.clone() for x in inputs)
        states = [x for state in self.step.memory.states.values() for x in state]
        kept = [x.clone() for x in states]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        # `torch.cuda.graph` would wait for the device, collect garbage and give the cached memory
        # back each time. Garbage that is collected meanwhile must not free another graph.
        gc.disable()
        try:
            with torch.cuda.stream(aside):
                self.step(*held)  # libraries make their workspaces in a first run
                for state, before in zip(states, kept, strict=True):
                    state.copy_(before)
                # By default a CUDA call of any thread spoils the recording: of data loaders, of
                # judges.
                graph.capture_begin(pool=self.recordings.pool(), capture_error_mode="thread_local")
                try:
                    sampled = self.step(*held)
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        here.wait_stream(aside)
        return Recording(graph, tensors, held, self.step.banned, sampled)
