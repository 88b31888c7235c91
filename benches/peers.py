"""What the benches compare with: the peers' own functions, or the reason why one cannot run here.

Each loader returns a callable, or a string ("not installed", "needs CUDA", "does not import: …")
that `Bench.run` takes in its place and prints. Nothing here computes: a peer is called as its own
package calls it, at the setting that is its default in training; arguments that a bench may want to
tune are passed on. `make bench` installs the peers (the `bench` extra); they are never needed by
the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

Peer = Callable[..., Any] | str
_DISTRIBUTIONS = {
    "triton": "triton",
    "transformers": "transformers",
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "flash_attn": "flash-attn",
    "torchvision": "torchvision",
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
}
_declared: list[torch.library.Library] = []  # declarations live as long as their Library object


def versions() -> dict[str, str]:
    """Versions of the peers that this process has imported."""
    found = {}
    for module, distribution in _DISTRIBUTIONS.items():
        if module in sys.modules:
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[distribution] = getattr(sys.modules[module], "__version__", "unknown")
    return found


def load_module(module: str) -> Any:
    """The module, or a string that says why there is none."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        return f"does not import: {str(error).splitlines()[0]}"


def load(module: str, name: str, *, device: str = "cpu", needs_cuda: bool = False) -> Any:
    """`module.name`, or a string that says why there is none."""
    if needs_cuda and torch.device(device).type != "cuda":
        return "needs CUDA"
    found = load_module(module)
    if isinstance(found, str):
        return found
    return getattr(found, name, f"has no {name}")


def trl_logprobs() -> Peer:
    """fn(logits, index, temperature=1.0): TRL's loop on a CPU, its Triton kernel on a GPU."""
    return load("trl.trainer.utils", "selective_log_softmax")


def trl_logprobs_entropy() -> Peer:
    """fn(logits, index, entropy_requires_grad=True, temperature=1.0) -> (log-probs, entropy)."""
    return load("trl.trainer.utils", "selective_log_softmax_and_entropy")


def trl_entropy() -> Peer:
    """fn(logits, chunk_size=128)."""
    return load("trl.trainer.utils", "entropy_from_logits")


def trl_fused_head() -> Peer:
    """fn(hidden (N, H), weight (V, H), labels (N,), outputs=("log_probs",)) -> (log-probs, entropy
    or None): the chunked head as TRL's trainers call it (Triton on a GPU, torch elsewhere)."""
    function = load("trl.trainer.utils", "_ChunkedLogProbFunction")
    columns = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    if isinstance(function, str):
        return function

    def head(hidden, weight, labels, outputs=("log_probs",), temperature=1.0, bias=None):
        return function.apply(
            hidden, weight, bias, labels, temperature, columns, None, 1.0, outputs
        )[:2]

    return head


def trl_grpo_loss(**settings: Any) -> Peer:
    """fn(logps, old, advantages, mask, ref, entropy) -> loss: GRPOTrainer._compute_loss from the
    log-probs on, logged metrics included, for one process.

    settings: attributes of the trainer other than its defaults (beta, loss_type, epsilon_low,
    importance_sampling_level, …). mask: (B, T) int64, as the trainer has it.
    """
    trainer = load("trl.trainer.grpo_trainer", "GRPOTrainer")
    if isinstance(trainer, str):
        return trainer
    single = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    options = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    state = {
        "beta": 0.0,
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "max_completion_length": 256,
        **settings,
    }

    def loss(logps, old, advantages, mask, ref, entropy):
        stub = SimpleNamespace(
            accelerator=single,
            args=options,
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
            **state,
        )
        none = mask[:, :0]
        inputs = {
            "prompt_ids": none,
            "prompt_mask": none,
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        }
        return trainer._compute_loss(stub, None, inputs)

    return loss


def liger_fused_grpo(**settings: Any) -> Peer:
    """fn(hidden (B, T, H), weight, labels, mask, advantages, old) -> loss; settings: of
    LigerFusedLinearGRPOLoss (compiled, chunk_size, loss_type, …)."""
    module = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if isinstance(module, str):
        return module
    layer = module(**{"beta": 0.0, "use_ref_model": False, **settings})

    def loss(hidden, weight, labels, mask, advantages, old):
        return layer(hidden, weight, labels, mask, advantages, old_per_token_logps=old)[0]

    return loss


def liger_grpo_loss(device: str) -> Peer:
    """triton_grpo_loss(logits (B, T + 1, V), old, ref, ids, advantages, mask, …)."""
    return load(
        "liger_kernel.transformers.grpo_loss", "triton_grpo_loss", device=device, needs_cuda=True
    )


def liger_linear_cross_entropy(device: str) -> Peer:
    """fn(hidden (N, H), weight, labels, reduction="mean")."""
    return load(
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        device=device,
        needs_cuda=True,
    )


def cut_cross_entropy(device: str) -> Peer:
    """fn(hidden, weight, labels, reduction="mean", …): Apple's fused kernel."""
    return load("cut_cross_entropy", "linear_cross_entropy", device=device, needs_cuda=True)


def flash_cross_entropy(device: str) -> Peer:
    """fn(logits (N, V), labels, inplace_backward=…) -> (losses, z losses)."""
    return load(
        "flash_attn.ops.triton.cross_entropy",
        "cross_entropy_loss",
        device=device,
        needs_cuda=True,
    )


def torch_linear_cross_entropy() -> Peer:
    """fn(hidden (N, H), weight, labels, reduction="mean"): torch's own, chunked as it sees fit."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "not in this torch"
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda *args, **kwargs: F.linear_cross_entropy(*args, options=options, **kwargs)


def torchvision(name: str, folder: str | None = os.environ.get("VCR1_TORCHVISION")) -> Any:
    """The module torchvision.<name>; `folder` may hold it alone: where torchvision was built for
    another torch, it must not be importable by accident (transformers would break)."""
    if folder and folder not in sys.path:
        sys.path.append(folder)
    whole = load_module("torchvision")
    if isinstance(whole, str) and "torchvision::nms" in whole:
        # Its compiled half did not load, and its import asks for two operators by name.
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        whole = load_module("torchvision")
    return whole if isinstance(whole, str) else load_module(f"torchvision.{name}")


def transformers_video() -> Peer:
    """fn(frames (T, H, W, 3) uint8, size) -> pixel_values_videos, by Qwen2-VL's processor."""
    missing = torchvision("transforms")
    if isinstance(missing, str):
        return f"needs torchvision: {missing}"
    processor = load(
        "transformers.models.qwen2_vl.video_processing_qwen2_vl", "Qwen2VLVideoProcessor"
    )
    if isinstance(processor, str):
        return processor

    def run(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        pixels = size[0] * size[1]
        whole = processor(
            size={"shortest_edge": pixels, "longest_edge": pixels},
            do_sample_frames=False,
            cap_pixels_per_frame=False,
        )
        # A strided channels-first view: the fastest way to call it.
        video = frames.permute(0, 3, 1, 2)
        return whole(videos=[video], return_tensors="pt")["pixel_values_videos"]

    return run


def pillow() -> Any:
    """The module PIL.Image."""
    return load_module("PIL.Image")


def opencv() -> Any:
    """The module cv2, at torch's number of threads."""
    module = load_module("cv2")
    if not isinstance(module, str):
        module.setNumThreads(torch.get_num_threads())
    return module
