"""video_patches and resize_frames beside torch, Pillow, OpenCV and transformers' processor.

Bytes: the frames read once, the result written once. transformers gets its frames as a strided
channels-first view, which is the fastest way to call it, and writes fp32: it cannot do otherwise.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from harness import Bench, arguments

from vcr1_fast import ops

CASES = {"16x720p": ((16, 720, 1280, 3), (252, 448)), "60x360p": ((60, 360, 640, 3), (224, 392))}


def transformers_form() -> Callable | None:
    """frames -> pixel_values_videos by transformers, or None and a line that says why."""
    if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        # A torchvision whose operators do not load asks for these two names when imported.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        transformers_form.library = library
    try:
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except (ImportError, RuntimeError) as error:
        print(f"transformers: not compared, {str(error).splitlines()[0]}")
        return None

    def run(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        pixels = size[0] * size[1]
        processor = Qwen2VLVideoProcessor(
            size={"shortest_edge": pixels, "longest_edge": pixels}, do_sample_frames=False
        )
        video = frames.permute(0, 3, 1, 2)
        return processor(videos=[video], return_tensors="pt")["pixel_values_videos"]

    return run


def torch_u8(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)


def resizers() -> dict[str, Callable]:
    found: dict[str, Callable] = {"torch u8": torch_u8}
    try:
        from PIL import Image
    except ImportError:
        print("Pillow: not installed")
    else:
        found["Pillow"] = lambda frames, size: [
            np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
            for frame in frames.numpy()
        ]
    try:
        import cv2
    except ImportError:
        print("cv2: not installed")
    else:
        found["cv2 area"] = lambda frames, size: [
            cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA) for frame in frames.numpy()
        ]
    return found


def bench_resize(bench: Bench, shape: str, frames: torch.Tensor, size: tuple[int, int]) -> None:
    fns = {name: lambda f=fn: f(frames, size) for name, fn in resizers().items()}
    fns["ours"] = lambda: ops.resize_frames(frames, size)
    written = len(frames) * size[0] * size[1] * 3
    bench.run("resize_frames", shape, "uint8", fns, frames.numel() + written)


def bench_patches(
    bench: Bench, shape: str, frames: torch.Tensor, size: tuple[int, int], dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    out, _ = ops.video_patches(frames, size, dtype=dtype)
    traffic = frames.numel() + out.numel() * out.element_size()
    fns: dict[str, Callable] = {"torch u8 (resize alone)": lambda: torch_u8(frames, size)}
    processor = transformers_form()
    if processor is not None:
        fns["transformers"] = lambda: processor(frames, size).to(dtype)
    fns["ours"] = lambda: ops.video_patches(frames, size, dtype=dtype)
    bench.run("video_patches", shape, name, fns, traffic)
    fns["ours"] = lambda: ops.video_patches(frames, size, dtype=dtype, out=out)
    bench.run("video_patches out=", shape, name, fns, traffic)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("video_patches", **vars(args)) as bench:
        torch.manual_seed(0)
        for shape, (frames_shape, size) in CASES.items():
            frames = torch.randint(0, 256, frames_shape, dtype=torch.uint8)
            bench_resize(bench, shape, frames, size)
            for dtype in (torch.bfloat16, torch.float32):
                bench_patches(bench, shape, frames, size, dtype)


if __name__ == "__main__":
    main()
