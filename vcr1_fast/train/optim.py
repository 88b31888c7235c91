"""AdamW on float32 weights, its schedule, and gradients over processes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vcr1_fast.train.checkpoint import KINDS, copy_into, load_shards
from vcr1_fast.train.config import OptimConfig
from vcr1_fast.train.sharding import Sharding, Traffic

_BUCKET = 32 * 2**20
"""Bytes of gradients that are summed over processes by one collective."""


class MasterAdamW:
    """AdamW whose weights, moments and gradients are float32.

    Half-precision parameters keep a float32 master copy; the update is applied there and rounded
    back, since steps of 1e-6 are far below the spacing of bfloat16 numbers. Their gradients are
    added to the master's in float32 as soon as each is complete, and dropped, until `close`: a sum
    of many micro-batches in bfloat16 would lose all but 8 bits. Float32 parameters (and float64
    ones) are stepped in place.

    With `sharding` it steps the shards of the model's trained parameters, float32 masters
    themselves, and FSDP2 casts them where it gathers them.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        config: OptimConfig,
        *,
        sharding: Sharding | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.sharding, self.traffic = sharding, traffic or Traffic()
        given = parameters if sharding is None else sharding.shards
        self.parameters = [p for p in given if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no parameter to train")
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for p in self.parameters
        ]
        # Where passes run: with `cpu_offload` the shards are elsewhere.
        self.device = self.parameters[0].device
        if sharding is not None:
            self.device = torch.device(sharding.mesh.device_type)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(
                partial(accumulate_into_master, master=master)
            )
            for parameter, master in self._halves()
        ]
        self.adamw = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def step(self, lr: float) -> None:
        """One update from the masters' gradients, which are dropped afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in self._halves():
                parameter.copy_(master)
        self.zero_grad()

    def close(self) -> None:
        """Remove the hooks: gradients stay with the parameters again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero_grad(self) -> None:
        """Drop all gradients, also those of an interrupted backward pass."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None
        if self.sharding is not None:
            self.sharding.drop_gradients()

    def sum_gradients(self) -> None:
        """Sum the masters' gradients over all ranks; all of them call it."""
        if self.sharding is not None:
            self.sharding.reduce()
        else:
            sum_gradients(self.masters, self.traffic)

    def pending_bytes(self) -> int:
        """Bytes that gradients and the first update have yet to allocate."""
        gradients = sum(4 * local(m).numel() for m in self.masters if m.grad is None)
        if self.sharding is not None:  # whole, until they are reduced
            gradients += self.sharding.gradient_bytes
            if not self.sharding.is_gathered:
                gradients += self.sharding.gathered_bytes
        # One gradient at a time exists in half precision, until it is added to its master's.
        gradients += max((p.nbytes for p, _ in self._halves()), default=0)
        if self.adamw.state:
            return gradients
        moments = sum(8 * local(p).numel() for p in self.parameters)
        return gradients + moments

    def _halves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, master) of the half-precision parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                yield parameter, master

    def named_shards(self) -> dict[str, Tensor]:
        """With `sharding`: weights and moments by the names of a sharded checkpoint. Moments that
        no update has made yet are made here, as zeros."""
        assert self.sharding is not None
        found: dict[str, Tensor] = {}
        for name, master in zip(self.sharding.names, self.masters, strict=True):
            state = self.adamw.state[master]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)
            tensors = (master.detach(), state["exp_avg"], state["exp_avg_sq"])
            found |= {f"{kind}/{name}": one for kind, one in zip(KINDS, tensors, strict=True)}
        return found

    def sharded_state(self) -> dict[str, Any]:
        """With `sharding`: the rest of a sharded checkpoint, plain values."""
        assert self.sharding is not None
        return {
            "names": self.sharding.names,
            "updates": max((float(s["step"]) for s in self.adamw.state.values()), default=0.0),
            "param_groups": self.adamw.state_dict()["param_groups"],
        }

    def load_sharded(self, path: Path, state: Mapping[str, Any]) -> None:
        """Restore weights and moments from the checkpoint at `path`, in shards, whose plain state
        is `state`. ValueError where it trained other parameters."""
        shards = self.named_shards()
        assert self.sharding is not None
        if different := sorted(set(state["names"]) ^ set(self.sharding.names)):
            raise ValueError(
                f"the checkpoint trained other parameters: {len(different)} differ, "
                f"e.g. {different[0]}"
            )
        load_shards(path, shards)
        for moments in self.adamw.state.values():
            moments["step"].fill_(state["updates"])

    def state_dict(self) -> dict:
        masters = [
            None if master is parameter else master.detach()
            for parameter, master in zip(self.parameters, self.masters, strict=True)
        ]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`, under this run's betas, eps and weight decay. The parameters must
        be loaded first. Keeps nothing of `state`: its tensors may be views of a file."""
        if self.sharding is not None:
            saved = state["adamw"]["state"]
            if saved:
                shards = self.named_shards()
                for i, name in enumerate(self.sharding.names):
                    for kind in KINDS[1:]:
                        copy_into(shards[f"{kind}/{name}"], saved[i][kind])
                    self.adamw.state[self.masters[i]]["step"].fill_(saved[i]["step"])
            for master, whole in zip(self.masters, state["masters"], strict=True):
                if whole is not None:
                    copy_into(master, whole)
            return
        settings = [dict(group) for group in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        # torch restores the saved hyperparameters too; the run's configuration is what holds.
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for moments in self.adamw.state.values():
            moments.update({k: v.clone() for k, v in moments.items() if v.device.type == "cpu"})
        with torch.no_grad():
            for parameter, master, saved in zip(
                self.parameters, self.masters, state["masters"], strict=True
            ):
                # A float32 run saves no masters: its parameters, just loaded, are the masters.
                # Masters made from the base weights would undo all training at the next step.
                master.copy_(parameter if saved is None else saved)


def accumulate_into_master(parameter: Tensor, master: Tensor) -> None:
    """Add a backward pass's gradient of `parameter` to its master's, and drop it."""
    gradient = parameter.grad
    assert gradient is not None  # a hook after accumulation
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)
    parameter.grad = None


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up, then decay to final_lr_ratio * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left)


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor; another tensor itself."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def sum_gradients(parameters: Iterable[Tensor], traffic: Traffic | None = None) -> None:
    """Sum the gradients of all ranks. A parameter without one gets zeros, as if its skipped groups
    had run.

    Each rank's loss is already divided by the counts of all ranks, so gradients are summed, not
    averaged. Not by DistributedDataParallel: a rank whose groups are all skipped runs no backward
    pass, and the others would wait for it.
    """
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if not _several_ranks():
        return
    ranks = torch.distributed.get_world_size()
    # One collective for many gradients: a model has hundreds, most of them small, and each call
    # costs its latency.
    for bucket in buckets(gradients, _BUCKET):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        torch.distributed.all_reduce(flat)
        if traffic is not None:
            traffic.add(2 * flat.nbytes * (ranks - 1) / ranks, 1)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of up to `size` bytes and one dtype; a larger one alone."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and (filled + tensor.nbytes > size or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def clipped_step(
    optimizer: MasterAdamW, lr: float, config: OptimConfig, *, finite_loss: bool = True
) -> float:
    """One update from the gradients of all ranks, scaled down to a joint norm of at most
    `max_grad_norm`; the norm before clipping.

    Without a finite norm, or with `finite_loss` False on any rank, no update is made, the gradients
    are dropped and the result is not finite.
    """
    optimizer.sum_gradients()
    total: Any = torch.nn.utils.clip_grad_norm_(optimizer.masters, config.max_grad_norm)
    # Of shards, each rank has its part of the sum of squares.
    norm: Tensor = total.full_tensor() if isinstance(total, DTensor) else total
    finite = norm.isfinite().float() * float(finite_loss)
    if _several_ranks():
        # The norm is the same on all ranks, the losses are not. All must decide alike, or their
        # weights would differ from here on.
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    if bool(finite):
        optimizer.step(lr)
        return float(norm)
    optimizer.zero_grad()
    return math.nan
