"""Text and clips to the inputs of Qwen2.5-VL.

Value for value what transformers' Qwen2_5_VLProcessor gives on CPU, without torchvision: the chat
template comes from the checkpoint, one `<|video_pad|>` or `<|image_pad|>` of the rendered text
becomes one token per 2 x 2 patches of the clip or image, and the sampling rate of the clip sets
`second_per_grid_ts`. An image is cut like a clip of one frame, which fills both halves of its
temporal patch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.model.preprocessor import (
    IMAGE_FILE,
    MERGE,
    TEMPORAL_PATCH,
    VIDEO_FILE,
    Fit,
    ImageProcessorConfig,
    VideoProcessorConfig,
    parse_settings,
    read_sources,
)
from vcr1_fast.model.prompt import IMAGE, VIDEO, Prompt
from vcr1_fast.ops.video_patches import video_patches

__all__ = ["ImageProcessorConfig", "Processor", "Prompt", "VideoProcessorConfig"]

_VIDEO_TOKEN, _IMAGE_TOKEN = "<|video_pad|>", "<|image_pad|>"


class ClipLike(Protocol):
    """What the processor reads of a clip, or of an image: T = 1, without a rate."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    fps: float | None  # frames a second, as sampled; None: an image
    # `fitted`, where there is one: whether the frames have been resized already (by `Fit`)


@dataclass(frozen=True, eq=False)
class Processor:
    """Renders, tokenises and cuts into patches. `sources` are the settings files it came from;
    `media_first` puts clips before the text, as VideoChat-R1.5 does, VideoChat-R1 behind it."""

    tokenizer: Any
    chat_template: str
    video: VideoProcessorConfig = field(default_factory=VideoProcessorConfig)
    image: ImageProcessorConfig = field(default_factory=ImageProcessorConfig)
    sources: dict[str, dict] = field(default_factory=dict)
    media_first: bool = False

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Processor":
        """Read tokenizer, chat template, video and image settings of a checkpoint directory.

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
        sources = read_sources(directory)
        return cls(
            tokenizer,
            _chat_template(directory, tokenizer),
            parse_settings(directory, sources, VideoProcessorConfig),
            parse_settings(directory, sources, ImageProcessorConfig),
            sources,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` reads, the settings files unchanged."""
        directory = Path(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        own = {VIDEO_FILE: self.video.as_json(), IMAGE_FILE: self.image.as_json()}
        for name, settings in (self.sources or own).items():
            (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def with_video(self, **changes: Any) -> "Processor":
        """The same processor with other video settings, e.g. `with_video(max_pixels=200_704)`."""
        return replace(self, video=replace(self.video, **changes))

    def with_image(self, **changes: Any) -> "Processor":
        """The same processor with other image settings."""
        return replace(self, image=replace(self.image, **changes))

    def with_frames(self, frames: FrameConfig, *, media_first: bool = False) -> "Processor":
        """The same processor with the pixel bounds, and the order, of a run's settings."""
        ordered = replace(self, media_first=media_first)
        bounds = {"min_pixels": frames.image_min_pixels, "max_pixels": frames.image_max_pixels}
        return ordered.with_video(
            min_pixels=frames.min_pixels,
            max_pixels=frames.max_pixels,
            total_pixels=frames.total_pixels,
        ).with_image(**{name: value for name, value in bounds.items() if value is not None})

    def fit(self) -> Fit | None:
        """What resizes frames as this processor would, where they are decoded; None where that
        would not give the same patches."""
        exact = self.video.rounding == self.image.rounding == "u8"
        return Fit(self.video, self.image) if exact else None

    def prompt(
        self, text: str, clips: Sequence[ClipLike] = (), *, system: str | None = None
    ) -> Prompt:
        """A user turn of `text` and `clips` (and images: those without a rate), up to where the
        assistant starts.

        `system` is the system turn; None leaves it to the chat template. ValueError when the text
        itself holds vision tokens, or an image has more than one frame.
        """
        kinds = torch.tensor([IMAGE if clip.fps is None else VIDEO for clip in clips]).long()
        names = {IMAGE: "image", VIDEO: "video"}
        media = [{"type": names[kind]} for kind in kinds.tolist()]
        words = [{"type": "text", "text": text}]
        content = media + words if self.media_first else words + media
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
        types = self._token_types(ids)
        if not torch.equal(types[types > 0], kinds):
            found, given = ([int((k == kind).sum()) for kind in names] for k in (types, kinds))
            raise ValueError(
                f"the prompt has {found[0]} image and {found[1]} video tokens for {given[0]} "
                f"images and {given[1]} clips: {rendered!r}"
            )
        parts = [self._patches(clip) for clip in clips]
        repeats = torch.ones_like(ids)
        if parts:
            grids = torch.stack([grid for _, grid in parts])
            repeats[types > 0] = grids.prod(dim=1) // MERGE**2
        ids = ids.repeat_interleave(repeats)
        (images, image_grids), (videos, video_grids) = (
            _joined(part for part, k in zip(parts, kinds.tolist(), strict=True) if k == kind)
            for kind in (IMAGE, VIDEO)
        )
        return Prompt(
            input_ids=ids,
            mm_token_type_ids=self._token_types(ids),
            pixel_values_videos=videos,
            video_grid_thw=video_grids,
            second_per_grid_ts=torch.tensor(
                [TEMPORAL_PATCH / clip.fps for clip in clips if clip.fps is not None],
                dtype=torch.float32,
            ),
            pixel_values=images,
            image_grid_thw=image_grids,
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

    def _token_types(self, ids: Tensor) -> Tensor:
        return IMAGE * (ids == self.image_id).long() + VIDEO * (ids == self.video_id).long()

    def _patches(self, clip: ClipLike) -> tuple[Tensor, Tensor]:
        frames = clip.frames
        is_image = clip.fps is None
        if is_image and len(frames) != 1:
            raise ValueError(f"an image has one frame, a clip has a rate: got {len(frames)} frames")
        config = self.image if is_image else self.video
        fitted = getattr(clip, "fitted", False)
        return video_patches(
            frames,
            None if fitted else config.size(*frames.shape[:3]),
            resample=config.resample,
            rounding=config.rounding,
            dtype=config.dtype,
            mean=config.mean,
            std=config.std,
        )


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor]:
    parts = list(parts)
    if not parts:
        return None, torch.zeros(0, 3, dtype=torch.int64)
    return torch.cat([patches for patches, _ in parts]), torch.stack([grid for _, grid in parts])


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
