"""AdamW on float32 weights, its schedule, and gradients over processes."""

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from vcr1_fast.train.config import OptimConfig


class MasterAdamW:
    """AdamW whose weights, moments and gradients are float32.

    Of a half-precision parameter a float32 copy is stepped and rounded back: steps of 1e-6 are far
    below the spacing of bfloat16 numbers and would be lost one by one. So would a micro-batch's
    gradient in a sum of many, to the last of its 8 bits: the backward pass's gradient of such a
    parameter is added to its copy's as soon as it is whole, and dropped, until `close`. Others are
    stepped in place.
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
            parameter.register_post_accumulate_grad_hook(partial(_hand_over, master=master))
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
        """One update from the masters' gradients, which are then dropped."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in self._halves():
                parameter.copy_(master)
        self.zero_grad()

    def close(self) -> None:
        """Leave the parameters' gradients to others."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero_grad(self) -> None:
        """Drop all gradients, a backward pass's that broke off too."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None

    def pending_bytes(self) -> int:
        """What gradients and the first update have yet to allocate."""
        gradients = sum(4 * master.numel() for master in self.masters if master.grad is None)
        # One at a time is there in half precision, until it has been handed over.
        gradients += max((p.nbytes for p, _ in self._halves()), default=0)
        if self.adamw.state:
            return gradients
        moments = sum(8 * p.numel() for p in self.parameters)
        return gradients + moments

    def _halves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Half-precision parameters with their masters."""
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
        """Undo `state_dict`. Nothing of `state` is kept: its tensors may be views of a file."""
        self.adamw.load_state_dict(state["adamw"])
        for moments in self.adamw.state.values():
            moments.update({k: v.clone() for k, v in moments.items() if v.device.type == "cpu"})
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)


def _hand_over(parameter: Tensor, master: Tensor) -> None:
    """Add a backward pass's gradient of `parameter` to that of its `master`."""
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up, then down to final_lr_ratio * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all processes. A parameter without one gets zeros, as if the skipped
    groups had been run.

    The loss of each process is already divided by the counts of all of them, so gradients are
    summed, not averaged. By hand rather than by DistributedDataParallel, because a process whose
    groups are all skipped runs no backward pass at all.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if several:
            torch.distributed.all_reduce(parameter.grad)


def clipped_step(optimizer: MasterAdamW, lr: float, config: OptimConfig) -> float:
    """One update from the gradients of all processes, scaled down to a joint norm of at most
    `max_grad_norm`; the norm before that.

    A norm that is not finite means that no update was made, the gradients being dropped; without
    `skip_nonfinite` it is a ValueError.
    """
    sum_gradients(optimizer.masters)
    norm = float(torch.nn.utils.clip_grad_norm_(optimizer.masters, config.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step(lr)
    elif config.skip_nonfinite:
        optimizer.zero_grad()
    else:
        raise ValueError(f"the gradient's norm is {norm}; optim.skip_nonfinite would go on")
    return norm
