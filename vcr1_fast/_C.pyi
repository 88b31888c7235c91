from collections.abc import Sequence
from typing import overload

from torch import Tensor

has_cuda: bool

def cpu_isa() -> str: ...
def choose_cpu_isa(name: str) -> None: ...
def use_team(address: int) -> None: ...
def tensor_protocol() -> str: ...
def take_block(shape: Sequence[int], dtype: str) -> object: ...
def drop_kept_blocks() -> int: ...
def describe(tensor: Tensor) -> tuple[str, tuple[int, ...], tuple[int, ...], int]: ...
def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    logps: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    stats: Tensor,
    num_threads: int,
) -> None: ...
def gather_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad: Tensor,
    num_threads: int,
) -> None: ...
def group_attention_scratch(rows: int, kv_heads: int, dim: int, tasks: int) -> int: ...
def group_attention(
    inputs: Sequence[Tensor],
    parts: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor,
    num_threads: int,
) -> None: ...
def group_attention_backward(
    inputs: Sequence[Tensor],
    parts: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grads: Sequence[Tensor],
    scratch: Tensor,
    tasks: int,
    num_threads: int,
) -> None: ...

grpo_loss_scratch: int

class GrpoParameters:
    def __init__(self, **kwargs: str | bool | float) -> None: ...

def grpo_loss(
    inputs: object, parameters: GrpoParameters, outputs: object, num_threads: int
) -> None: ...
def logits_grpo_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    tokens: object,
    parameters: GrpoParameters,
    outputs: object,
) -> None: ...

class ResizePlan:
    scratch_bytes: int
    def __init__(
        self,
        mode: str,
        size_in: tuple[int, int],
        size_out: tuple[int, int],
        first: list[Tensor],
        weights: list[Tensor],
        bits: list[int],
    ) -> None: ...

class CudaResizePlan:
    shared_bytes: int
    def __init__(
        self,
        method: str,
        sizes: Sequence[tuple[int, int]],
        first: list[Tensor],
        weights: list[Tensor],
        numbers: list[tuple[int, int, int, int, int, int]],
    ) -> None: ...

@overload
def resize_frames(
    frames: Tensor, out: Tensor, plan: ResizePlan, scratch: Tensor, num_threads: int
) -> None: ...
@overload
def resize_frames(frames: Tensor, out: Tensor, plan: CudaResizePlan) -> None: ...
@overload
def video_patches(
    frames: Tensor,
    out: Tensor,
    plan: ResizePlan,
    offset: Sequence[float],
    scale: Sequence[float],
    scratch: Tensor,
    num_threads: int,
) -> None: ...
@overload
def video_patches(
    frames: Tensor,
    out: Tensor,
    plan: CudaResizePlan,
    offset: list[float],
    scale: list[float],
) -> None: ...
def box_iou(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    kind: str,
    pairwise: bool,
    torchvision: bool,
    num_threads: int,
) -> None: ...
def track_iou(
    pred: Tensor, target: Tensor, lengths: Tensor, out: Tensor, num_threads: int
) -> None: ...
def interval_set_iou(
    pred: Tensor,
    pred_offsets: Tensor,
    target: Tensor,
    target_offsets: Tensor,
    empty: float,
    out: Tensor,
    num_threads: int,
) -> None: ...
