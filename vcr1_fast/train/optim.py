"""AdamW on float32 weights, its schedule, and gradients over processes."""

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from vcr1_fast.train.config import OptimConfig


class MasterAdamW:
    """AdamW whose weights, moments and gradients are float32.

    Half-precision parameters keep a float32 master copy; the update is applied there and rounded
    back, since steps of 1e-6 are far below the spacing of bfloat16 numbers. Their gradients are
    added to the master's in float32 as soon as each is complete, and dropped, until `close`: a sum
    of many micro-batches in bfloat16 would lose all but 8 bits. Float32 parameters are stepped in
    place.
    """

    def __init__(self, parameters: Iterable[Tensor], config: OptimConfig) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no parameter to train")
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.parameters
        ]
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

    def pending_bytes(self) -> int:
        """Bytes that gradients and the first update have yet to allocate."""
        gradients = sum(4 * master.numel() for master in self.masters if master.grad is None)
        # One gradient at a time exists in half precision, until it is added to its master's.
        gradients += max((p.nbytes for p, _ in self._halves()), default=0)
        if self.adamw.state:
            return gradients
        moments = sum(8 * p.numel() for p in self.parameters)
        return gradients + moments

    def _halves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, master) of the half-precision parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                yield parameter, master

    def state_dict(self) -> dict:
        masters = [
            None if master is parameter else master.detach()
            for parameter, master in zip(self.parameters, self.masters, strict=True)
        ]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`, under this run's betas, eps and weight decay. The parameters must
        be loaded first. Keeps nothing of `state`: its tensors may be views of a file."""
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


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of all ranks. A parameter without one gets zeros, as if its skipped groups
    had run.

    Each rank's loss is already divided by the counts of all ranks, so gradients are summed, not
    averaged. Not by DistributedDataParallel: a rank whose groups are all skipped runs no backward
    pass, and the others would wait for it.
    """
    several = _several_ranks()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if several:
            torch.distributed.all_reduce(parameter.grad)


def clipped_step(
    optimizer: MasterAdamW, lr: float, config: OptimConfig, *, finite_loss: bool = True
) -> float:
    """One update from the gradients of all ranks, scaled down to a joint norm of at most
    `max_grad_norm`; the norm before clipping.

    Without a finite norm, or with `finite_loss` False on any rank, no update is made, the gradients
    are dropped and the result is not finite.
    """
    sum_gradients(optimizer.masters)
    norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, config.max_grad_norm)
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
