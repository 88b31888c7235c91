"""video_patches and resize_frames beside torch, Pillow, OpenCV and transformers' processor.

Bytes: the frames read once, the result written once. transformers gets its frames as a strided
channels-first view, which is the fastest way to call it, and writes fp32: it cannot do otherwise.
On a CPU each case is timed with one thread and with all of them; the limit is the copy bandwidth of
all threads either way.
"""

from collections.abc import Callable

import numpy as np
import peers
import torch
import torch.nn.functional as F
from harness import Bench, arguments

from vcr1_fast import ops

CASES = {"16x720p": ((16, 720, 1280, 3), (252, 448)), "60x360p": ((60, 360, 640, 3), (224, 392))}


def torch_u8(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)


def resizers() -> dict[str, Callable | str]:
    """name -> fn(frames, size), or why it cannot run."""
    image, cv2 = peers.pillow(), peers.opencv()

    def by_pillow(frames: torch.Tensor, size: tuple[int, int]) -> list[np.ndarray]:
        bicubic = image.Resampling.BICUBIC
        return [
            np.asarray(image.fromarray(frame).resize(size[::-1], bicubic))
            for frame in frames.numpy()
        ]

    def by_opencv(frames: torch.Tensor, size: tuple[int, int]) -> list[np.ndarray]:
        area = cv2.INTER_AREA
        return [cv2.resize(frame, size[::-1], interpolation=area) for frame in frames.numpy()]

    return {
        "torch u8": torch_u8,
        "Pillow": image if isinstance(image, str) else by_pillow,
        "cv2 area": cv2 if isinstance(cv2, str) else by_opencv,
    }


def bench_resize(bench: Bench, shape: str, frames: torch.Tensor, size: tuple[int, int]) -> None:
    fns: dict[str, Callable | str] = {
        name: fn if isinstance(fn, str) else lambda f=fn: f(frames, size)
        for name, fn in resizers().items()
    }
    fns["ours"] = lambda: ops.resize_frames(frames, size)
    written = len(frames) * size[0] * size[1] * 3
    bench.run("resize_frames", shape, "uint8", fns, frames.numel() + written)


def bench_patches(
    bench: Bench, shape: str, frames: torch.Tensor, size: tuple[int, int], dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    out, _ = ops.video_patches(frames, size, dtype=dtype)
    traffic = frames.numel() + out.numel() * out.element_size()
    fns: dict[str, Callable | str] = {"torch u8 (resize alone)": lambda: torch_u8(frames, size)}
    processor = peers.transformers_video()
    fns["transformers"] = (
        processor if isinstance(processor, str) else lambda: processor(frames, size).to(dtype)
    )
    fns["ours"] = lambda: ops.video_patches(frames, size, dtype=dtype)
    bench.run("video_patches", shape, name, fns, traffic)
    fns["ours"] = lambda: ops.video_patches(frames, size, dtype=dtype, out=out)
    bench.run("video_patches out=", shape, name, fns, traffic)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("video_patches", **vars(args)) as bench:
        torch.manual_seed(0)
        every = torch.get_num_threads()
        for case, (frames_shape, size) in CASES.items():
            frames = torch.randint(0, 256, frames_shape, dtype=torch.uint8)
            for threads in sorted({1, every}) if bench.device.type == "cpu" else [every]:
                torch.set_num_threads(threads)
                shape = f"{case}, 1 thread" if threads < every else case
                bench_resize(bench, shape, frames, size)
                for dtype in (torch.bfloat16, torch.float32):
                    bench_patches(bench, shape, frames, size, dtype)


if __name__ == "__main__":
    main()
