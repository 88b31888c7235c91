"""Text and clips to the inputs of Qwen2.5-VL.

Value for value what transformers' Qwen2_5_VLProcessor gives on CPU, without torchvision: the chat
template comes from the checkpoint, one `<|video_pad|>` of the rendered text becomes one token per
2 x 2 patches of the clip, and the sampling rate of the clip sets `second_per_grid_ts`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.data.sampling import smart_resize
from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.ops.video_patches import video_patches

PATCH, TEMPORAL_PATCH, MERGE = 14, 2, 2
_VIDEO_TOKEN, _IMAGE_TOKEN = "<|video_pad|>", "<|image_pad|>"
# transformers reads the video settings from the first of these that exists.
_VIDEO_FILES = (
    "video_preprocessor_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


class ClipLike(Protocol):
    """What the processor reads of a clip."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    fps: float  # frames a second, as sampled


@dataclass(frozen=True)
class VideoProcessorConfig:
    """How frames become patches. Pixels are counted per frame; `total_pixels` is a clip's budget.

    The defaults are those of transformers' Qwen2VLVideoProcessor; a checkpoint brings its own.
    `dtype` is that of the patches; the model casts them to its own anyway.
    """

    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    total_pixels: int | None = None
    resample: str = "bicubic"
    rounding: str = "u8"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                "expected 0 < min_pixels <= max_pixels, "
                f"got {self.min_pixels} and {self.max_pixels}"
            )


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt with its videos, on the CPU. P tokens, n videos, N patches in all.

    input_ids (P,) int64; mm_token_type_ids (P,) int64: 0 text, 1 image, 2 video;
    pixel_values_videos (N, 1176) or None; video_grid_thw (n, 3) int64, in patches;
    second_per_grid_ts (n,) float32, seconds from one temporal patch to the next;
    text: the rendered chat template, before the video tokens are repeated.
    """

    input_ids: Tensor
    mm_token_type_ids: Tensor
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor
    second_per_grid_ts: Tensor
    text: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def patches(self) -> int:
        return 0 if self.pixel_values_videos is None else len(self.pixel_values_videos)


@dataclass(frozen=True, eq=False)
class Processor:
    """Renders, tokenises and cuts into patches. `sources` are the settings files it came from."""

    tokenizer: Any
    chat_template: str
    video: VideoProcessorConfig = VideoProcessorConfig()
    sources: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Processor":
        """Read tokenizer, chat template and video settings of a checkpoint directory.

        Raises:
            CheckpointError: naming the missing or unusable file.
        """
        from transformers import AutoTokenizer

        directory = Path(directory)
        if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
            raise CheckpointError(directory / "tokenizer.json", "missing")
        read_json(directory / "tokenizer_config.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except Exception as error:  # the tokenizers library raises bare Exception on bad files
            raise CheckpointError(directory / "tokenizer.json", f"unusable ({error})") from error
        names = {name for name in _VIDEO_FILES if (directory / name).exists()}
        sources = {name: read_json(directory / name) for name in sorted(names)}
        return cls(
            tokenizer,
            _chat_template(directory, tokenizer),
            _video_config(directory, sources),
            sources,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` reads, the settings files unchanged."""
        directory = Path(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        for name, settings in (self.sources or {_VIDEO_FILES[-1]: self._settings()}).items():
            (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def with_video(self, **changes: Any) -> "Processor":
        """The same processor with other video settings, e.g. `with_video(max_pixels=200_704)`."""
        return replace(self, video=replace(self.video, **changes))

    def prompt(
        self, text: str, clips: Sequence[ClipLike] = (), *, system: str | None = None
    ) -> Prompt:
        """A user turn of `text` followed by `clips`, up to where the assistant starts.

        `system` is the system turn; None leaves it to the chat template. ValueError when the text
        itself holds vision tokens.
        """
        content = [{"type": "text", "text": text}, *({"type": "video"} for _ in clips)]
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = torch.tensor(self.tokenizer.encode(rendered, add_special_tokens=False))
        is_video = ids == self.video_id
        if int(is_video.sum()) != len(clips) or bool((ids == self.image_id).any()):
            raise ValueError(
                f"the prompt has {int(is_video.sum())} video tokens for {len(clips)} clips "
                f"(and may hold no image tokens): {rendered!r}"
            )
        parts = [self._patches(clip) for clip in clips]
        grids = torch.stack([grid for _, grid in parts]) if parts else torch.zeros(0, 3).long()
        repeats = torch.ones_like(ids)
        repeats[is_video] = grids.prod(dim=1) // MERGE**2
        ids = ids.repeat_interleave(repeats)
        return Prompt(
            input_ids=ids,
            mm_token_type_ids=2 * (ids == self.video_id).long(),
            pixel_values_videos=torch.cat([patches for patches, _ in parts]) if parts else None,
            video_grid_thw=grids,
            second_per_grid_ts=torch.tensor(
                [TEMPORAL_PATCH / clip.fps for clip in clips], dtype=torch.float32
            ),
            text=rendered,
        )

    def completion(self, text: str) -> Tensor:
        """Tokens (C,) int64 of an assistant's answer, its end-of-turn token included."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([*ids, self.stop_id])

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @property
    def video_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(_VIDEO_TOKEN)

    @property
    def image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)

    @property
    def stop_id(self) -> int:
        """The token that ends an assistant's turn, `<|im_end|>`."""
        return self.tokenizer.eos_token_id

    def banned_ids(self, vocab_size: int) -> Tensor:
        """Tokens that no completion may hold, int64, ascending.

        Vision and other control tokens, padding, and the rows by which the embedding (`vocab_size`)
        is larger than the tokenizer; not the stop token.
        """
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special |= set(range(len(self.tokenizer), vocab_size))
        return torch.tensor(sorted(special - {self.stop_id}), dtype=torch.int64)

    def _patches(self, clip: ClipLike) -> tuple[Tensor, Tensor]:
        video = self.video
        frames = clip.frames
        size = smart_resize(
            frames.shape[1],
            frames.shape[2],
            min_pixels=video.min_pixels,
            max_pixels=video.max_pixels,
            total_pixels=video.total_pixels,
            num_frames=len(frames),
        )
        return video_patches(
            frames,
            size,
            resample=video.resample,
            rounding=video.rounding,
            dtype=video.dtype,
            mean=video.mean,
            std=video.std,
        )

    def _settings(self) -> dict:
        video = self.video
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": video.min_pixels,
            "max_pixels": video.max_pixels,
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL_PATCH,
            "merge_size": MERGE,
            "resample": {name: number for number, name in _RESAMPLE.items()}[video.resample],
            "image_mean": list(video.mean),
            "image_std": list(video.std),
        }


def _chat_template(directory: Path, tokenizer: Any) -> str:
    """The processor's own template where there is one, else the tokenizer's."""
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if (directory / "chat_template.json").exists():
        template = read_json(directory / "chat_template.json").get("chat_template")
    else:
        template = tokenizer.chat_template
    if not isinstance(template, str):
        raise CheckpointError(directory / "chat_template.jinja", "missing (no chat template)")
    return template


def _video_config(directory: Path, sources: dict[str, dict]) -> VideoProcessorConfig:
    for name in _VIDEO_FILES:
        settings = sources.get(name, {})
        if name == "processor_config.json":
            settings = settings.get("video_processor", {})
        if settings:
            return _parse_video(directory / name, settings)
    raise CheckpointError(directory / _VIDEO_FILES[-1], "missing (no video settings)")


def _parse_video(path: Path, settings: dict) -> VideoProcessorConfig:
    expected = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL_PATCH, "merge_size": MERGE}
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise CheckpointError(path, f"{key} {settings[key]} is not supported, only {value}")
    default = VideoProcessorConfig()
    size = settings.get("size") or {}
    resample = settings.get("resample", 3)
    if resample not in _RESAMPLE:
        raise CheckpointError(path, f"resample {resample} is not one of {sorted(_RESAMPLE)}")

    def pixels(name: str, edge: str, otherwise: int) -> int:
        value = settings.get(name)
        return value if value is not None else size.get(edge, size.get(name, otherwise))

    return VideoProcessorConfig(
        min_pixels=pixels("min_pixels", "shortest_edge", default.min_pixels),
        max_pixels=pixels("max_pixels", "longest_edge", default.max_pixels),
        resample=_RESAMPLE[resample],
        mean=tuple(settings.get("image_mean", default.mean)),
        std=tuple(settings.get("image_std", default.std)),
    )
