"""Weights, gradients and optimiser state sharded over processes by torch's FSDP2.

Each process keeps 1 / n of every parameter: of a trained one a float32 master, of a frozen one the
model's dtype. A step enters collectives in three places, the same on every process whatever its
share of the step is:

    gather    all-gather of the weights, in the model's dtype, once before the rollout, and again
              after each optimiser step that is followed by more passes
    (passes)  rollout, reference and policy run on whole weights without any collective: processes
              may differ in prompts, micro-batches, skipped groups and retries
    reduce    reduce-scatter in float32 of the gradients that the micro-batches have accumulated
    norm      the joint norm, from each process's shards

So the number of collectives does not depend on the number of micro-batches, and no process waits
for one that another skips. The price is memory: between gather and reduce a process holds whole
weights (2 bytes a parameter in bfloat16) and whole float32 gradients (4 bytes a trained one).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

from vcr1_fast.model.family import family_of
from vcr1_fast.model.vision import vision_encoder
from vcr1_fast.model.wrapping import unwrap

_HALF = (torch.bfloat16, torch.float16)


@dataclass
class Traffic:
    """What a process sent to others since the last `take`, weights and gradients only."""

    bytes: float = 0.0
    collectives: int = 0

    def add(self, bytes: float, collectives: int) -> None:
        self.bytes += bytes
        self.collectives += collectives

    def take(self) -> dict[str, float]:
        """The counts as metrics, none where nothing was sent; they start again from 0."""
        taken = {"sent_bytes": self.bytes, "collectives": float(self.collectives)}
        if not self.collectives:
            return {}
        self.bytes, self.collectives = 0.0, 0
        return taken


@dataclass(eq=False)
class Sharding:
    """A model whose parameters are sharded, and its collectives.

    names: of the trained parameters; shards: these, as DTensors (whole shape, local part), in the
    order of `names`: what the optimiser steps and checkpoints hold.
    """

    model: nn.Module
    mesh: DeviceMesh
    traffic: Traffic
    cpu_offload: bool = False
    names: list[str] = field(init=False)
    shards: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        base = unwrap(self.model)
        dtype = base.get_output_embeddings().weight.dtype
        policy = MixedPrecisionPolicy()
        if dtype in _HALF:
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda")
        self._trained_units = 0
        # Innermost first: a unit takes the parameters that no unit inside it has. Layer by layer,
        # so that no more than one layer is whole in float32 on the device.
        for module in [*unit_modules(base), base]:
            own = [p for p in module.parameters() if not isinstance(p, DTensor)]
            trained = [p for p in own if p.requires_grad]
            self._trained_units += bool(trained)
            for parameter in trained:
                if parameter.dtype in _HALF:
                    parameter.data = parameter.data.float()
            fully_shard(
                module,
                mesh=self.mesh,
                # Between `gather` and `reduce` weights stay whole.
                reshard_after_forward=False,
                mp_policy=policy,
                offload_policy=offload,
            )
        self._root: Any = base
        self._units = [module for module in base.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            # Each rank's loss is divided by the counts of all ranks: gradients are summed.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        # The root's hooks make it the root of all units; a layer that ran first would take that.
        base._vcr1_pass = _same
        register_fsdp_forward_method(base, "_vcr1_pass")
        with torch.no_grad():
            base._vcr1_pass(torch.zeros((), device=self.mesh.device_type))
        self.reshard()
        self.names, self.shards = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.names.append(name)
                self.shards.append(parameter)
        parameters = list(base.parameters())
        whole = sum(p.numel() * (dtype if dtype in _HALF else p.dtype).itemsize for p in parameters)
        self.gathered_bytes = whole
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in self.shards)
        self.is_gathered = False

    def gather(self) -> None:
        """Make the weights whole on every process, where they are not. All ranks call it."""
        if self.is_gathered:
            return
        for unit in self._units:
            unit.set_requires_gradient_sync(False, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)
            unit.unshard()
        self.is_gathered = True
        for parameter in self._trained():
            if parameter.dtype in _HALF:
                # A sum of many micro-batches in bfloat16 would lose all but 8 bits.
                parameter.grad_dtype = torch.float32
        shard = self.mesh.size(self.mesh.ndim - 1)
        self.traffic.add(self.gathered_bytes * (shard - 1) / shard, len(self._units))

    def reduce(self) -> None:
        """Sum the accumulated gradients of all ranks into the shards' `grad`; weights are shards
        again. All ranks call it, with gradients or without."""
        self.gather()
        for parameter in self._trained():
            # None where this rank's groups had no clip, or zero advantages: other ranks may have
            # one, and all must reduce the same parameters.
            if parameter.grad is None:
                half = parameter.dtype in _HALF
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32 if half else None)
        for unit in self._units:
            unit.set_requires_gradient_sync(True, recurse=False)
            unit.set_reshard_after_backward(True, recurse=False)
        # A pass through the root that computes nothing: FSDP2 reduces every unit when a backward
        # pass of the root ends, in the same order on every rank.
        start = torch.zeros((), device=self.mesh.device_type, requires_grad=True)
        self._root._vcr1_pass(start).backward()
        self.reshard()
        shard = self.mesh.size(self.mesh.ndim - 1)
        sent = self.gradient_bytes * (shard - 1) / shard
        if self.mesh.ndim == 2:
            copies = self.mesh.size(0)
            sent += 2 * self.gradient_bytes / shard * (copies - 1) / copies
        self.traffic.add(sent, self._trained_units * self.mesh.ndim)

    def reshard(self) -> None:
        """Keep the shards alone; no collective."""
        for unit in self._units:
            unit.reshard()
        self.is_gathered = False

    def drop_gradients(self) -> None:
        """Drop what micro-batches have accumulated on this rank; no collective. A backward pass
        that an out-of-memory error has ended may have left parts."""
        if not self.is_gathered:
            return
        for parameter in self._trained():
            parameter.grad = None
        # FSDP2 ends a backward pass by a callback, which an error skips; with these marks left, the
        # next pass would not queue it, and `reduce` would reduce nothing. Its own
        # `reset_iter_state` drops the whole weights too, which no rank can gather alone.
        root = self._root._get_fsdp_state()
        root._state_ctx.post_backward_final_callback_queued = False
        root._state_ctx.iter_forward_root = None
        root._comm_ctx.post_forward_order.clear()
        for state in root._state_ctx.all_states:
            state._training_state = TrainingState.IDLE
            for group in state._fsdp_param_groups:
                group._training_state = TrainingState.IDLE
                group._post_forward_indices.clear()

    def _trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Weights are whole inside. All ranks enter together."""
        before = self.is_gathered
        self.gather()
        try:
            yield
        finally:
            if not before:
                self.reshard()


def _same(start: Tensor) -> Tensor:
    return start * 1


def unit_modules(base: Any) -> list[nn.Module]:
    """The modules that are sharded one by one: decoder layers, vision blocks. The rest of the model
    (embeddings, head, norms, projections) is one unit more."""
    layers: Any = family_of(base).language_model(base)
    encoder: Any = vision_encoder(base)
    return [*encoder.blocks, *layers.layers]
