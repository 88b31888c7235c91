"""The family-free part of a processor: chat template, tokens, patches, banned tokens.

A family adds which sizes frames take, the text and placeholder tokens that stand for a clip, and
positions (`model/<family>/processor.py`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.model.preprocessor import IMAGE_FILE, VIDEO_FILE, Fit, ImageProcessorConfig
from vcr1_fast.model.prompt import IMAGE, VIDEO, Prompt, opened_reasoning
from vcr1_fast.ops.video_patches import video_patches

__all__ = ["ClipLike", "Mrope", "Processor", "Prompt", "VideoText"]

Mrope = Literal["trained", "installed"]
"""Positions as the checkpoints were trained with, or as the installed transformers has them."""
VideoText = Literal["trained", "installed"]
"""Text that stands for a clip as the checkpoints were trained with, or as the installed
transformers writes it. They differ for families that put time stamps into the text."""


class ClipLike(Protocol):
    """The part of a clip that the processor reads; an image has T = 1 and no rate.

    Three more attributes are read where a clip has them: `fitted`, whether the frames have been
    resized already (`fit`); `staged`, their (patches, grid_thw) where those have been made already
    (`model/staging.py`); and `times` (T,), seconds at which the frames are shown. Without `times`
    frame i is shown at i / fps.
    """

    @property
    def frames(self) -> np.ndarray:
        """(T, H, W, 3) uint8."""

    @property
    def fps(self) -> float | None:
        """Frames a second, as sampled; None: an image."""


P = TypeVar("P", bound="Processor")


@dataclass(frozen=True, eq=False)
class Processor(ABC):
    """Renders, tokenises and cuts clips into patches; a family's subclass knows the rest.

    sources: the settings files it came from, by name. media_first: clips stand before the text, as
    in VideoChat-R1.5; VideoChat-R1 puts them behind it. mrope, video_text: how positions are
    counted and clips are written, see `Mrope` and `VideoText`. frames: which frames of a clip are
    sampled (the family may replace the rule). video, image: sizes and normalisation.
    """

    video_token: ClassVar[str] = "<|video_pad|>"
    image_token: ClassVar[str] = "<|image_pad|>"

    tokenizer: Any
    chat_template: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    media_first: bool = False
    mrope: Mrope = "trained"
    video_text: VideoText = "trained"
    frames: FrameConfig = field(default_factory=FrameConfig)
    video: ImageProcessorConfig = field(kw_only=True)
    image: ImageProcessorConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("mrope", self.mrope), ("video_text", self.video_text)):
            if value not in get_args(Mrope):
                raise ValueError(f"{name} must be one of {get_args(Mrope)}, got {value!r}")

    @abstractmethod
    def expand(
        self, rendered: str, clips: Sequence[ClipLike], grids: Tensor
    ) -> tuple[str, list[int]]:
        """The rendered text with one placeholder token for every run of vision tokens, and the
        length of each run.

        rendered has one placeholder for each of `clips`; grids (len(clips), 3): their patches along
        time, height and width. A run of a clip holds its next vision tokens, in order.
        """

    @abstractmethod
    def positions(
        self, ids: Tensor, types: Tensor, videos: Tensor, seconds: Tensor, images: Tensor
    ) -> Tensor:
        """M-RoPE positions (3, P) int64 of a prompt's tokens.

        ids, types: (P,) `input_ids` and `mm_token_type_ids`; videos (n, 3), images (m, 3): grids;
        seconds (n,): from one temporal patch of a clip to the next.
        """

    @abstractmethod
    def with_bounds(self: P, frames: FrameConfig) -> P:
        """The same processor with the pixel bounds of a run's settings."""

    def prompt(
        self,
        text: str,
        clips: Sequence[ClipLike] = (),
        *,
        system: str | None = None,
        think: bool | None = None,
    ) -> Prompt:
        """A user turn of `text` and `clips` (and images: those without a rate), up to where the
        assistant starts.

        `system` is the system turn; None leaves it to the chat template. `think`: whether the
        answer begins with reasoning, for chat templates that open the reasoning themselves
        (`Prompt.opened`); None: their default.

        ValueError when a text itself holds vision or other control tokens, an image has more than
        one frame, or the chat template cannot do what `think` says.
        """
        kinds = torch.tensor([IMAGE if clip.fps is None else VIDEO for clip in clips]).long()
        names = {IMAGE: "image", VIDEO: "video"}
        media = [{"type": names[kind]} for kind in kinds.tolist()]
        rendered = self.render(self.turns(text, media, system), answer=True, think=think)
        _check_reasoning(rendered, think)
        ids = self.encode(rendered)
        types = self._token_types(ids)
        if not torch.equal(types[types > 0], kinds):
            found, given = ([int((k == kind).sum()) for kind in names] for k in (types, kinds))
            raise ValueError(
                f"the prompt has {found[0]} image and {found[1]} video tokens for {given[0]} "
                f"images and {given[1]} clips: {rendered!r}"
            )
        self.refuse_control_tokens(text, system)
        parts = [self._patches(clip) for clip in clips]
        if parts:
            expanded, runs = self.expand(rendered, clips, torch.stack([grid for _, grid in parts]))
            if expanded != rendered:
                ids = self.encode(expanded)
                types = self._token_types(ids)
            repeats = torch.ones_like(ids)
            repeats[types > 0] = torch.tensor(runs)
            ids = ids.repeat_interleave(repeats)
            types = types.repeat_interleave(repeats)
        (images, image_grids), (videos, video_grids) = (
            _joined(part for part, k in zip(parts, kinds.tolist(), strict=True) if k == kind)
            for kind in (IMAGE, VIDEO)
        )
        seconds = torch.tensor(
            [self.video.layout.temporal / clip.fps for clip in clips if clip.fps is not None],
            dtype=torch.float32,
        )
        return Prompt(
            input_ids=ids,
            mm_token_type_ids=types,
            positions=self.positions(ids, types, video_grids, seconds, image_grids),
            pixel_values_videos=videos,
            video_grid_thw=video_grids,
            second_per_grid_ts=seconds,
            pixel_values=images,
            image_grid_thw=image_grids,
            text=rendered,
        )

    def fit(self) -> Fit | None:
        """A picklable function that resizes a frame (H, W, 3) of a clip of so many frames (None: an
        image) as `prompt` would; None where that would not give the same patches."""
        exact = self.video.rounding == self.image.rounding == "u8"
        return Fit(self.video, self.image) if exact else None

    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings files of clips and images by name, for a processor that came from no files."""
        return {VIDEO_FILE: self.video.as_json(), IMAGE_FILE: self.image.as_json()}

    def with_video(self: P, **changes: Any) -> P:
        """The same processor with other video settings, e.g. `with_video(max_pixels=200_704)`."""
        return replace(self, video=replace(self.video, **changes))

    def with_image(self: P, **changes: Any) -> P:
        """The same processor with other image settings."""
        return replace(self, image=replace(self.image, **changes))

    def _token_types(self, ids: Tensor) -> Tensor:
        return IMAGE * (ids == self.image_id).long() + VIDEO * (ids == self.video_id).long()

    def settings_of(self, clip: ClipLike) -> ImageProcessorConfig:
        """The settings for a clip or an image; ValueError for an image of several frames."""
        if clip.fps is not None:
            return self.video
        count = len(clip.frames)
        if count != 1:
            raise ValueError(f"an image has one frame, a clip has a rate: got {count} frames")
        return self.image

    def _patches(self, clip: ClipLike) -> tuple[Tensor, Tensor]:
        config, frames = self.settings_of(clip), clip.frames
        staged = getattr(clip, "staged", None)
        if staged is not None:
            patches, grid = staged
            if patches.is_cuda:
                # Memory of the stream that made them. Without this the allocator would give it to
                # the next clip there when the last Python reference goes, while the current stream
                # may still have to read it.
                patches.record_stream(torch.cuda.current_stream(patches.device))
            return patches, grid
        fitted = getattr(clip, "fitted", False)
        count, height, width = frames.shape[:3]
        return video_patches(
            frames,
            None if fitted else config.size(count, height, width),
            resample=config.resample,
            rounding=config.rounding,
            dtype=config.dtype,
            layout=config.layout,
        )

    def with_frames(self: P, frames: FrameConfig, *, media_first: bool = False) -> P:
        """The same processor with a run's frame settings: pixel bounds, sampling, and the order of
        text and clips."""
        return replace(self.with_bounds(frames), frames=frames, media_first=media_first)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer, chat template and settings files; the latter as they were read."""
        directory = Path(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        for name, settings in (self.sources or self.settings()).items():
            (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def render(
        self, messages: Sequence[dict[str, Any]], *, answer: bool, think: bool | None = None
    ) -> str:
        """Text of a conversation by the chat template; `answer`: the assistant's turn follows;
        `think`: see `prompt`."""
        # Templates that do not open the reasoning ignore the variable.
        chosen = {} if think is None else {"enable_thinking": think}
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=answer,
            tokenize=False,
            **chosen,
        )

    def turns(
        self, text: str, media: Sequence[dict[str, str]], system: str | None
    ) -> list[dict[str, Any]]:
        """Messages of a user turn with `media`, e.g. [{"type": "video"}], before or after it."""
        words = [{"type": "text", "text": text}]
        content = [*media, *words] if self.media_first else [*words, *media]
        user: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return user if system is None else [{"role": "system", "content": system}, *user]

    def refuse_control_tokens(self, *texts: str | None) -> None:
        """ValueError when a text holds a special token of the tokenizer, such as `<|im_end|>`.

        The tokenizer does not tell such text from the template's own tokens: a record could end its
        turn and answer itself.
        """
        for text in texts:
            for token in self._control_tokens:
                if text is not None and token in text:
                    raise ValueError(f"the text holds the control token {token!r}: {text!r}")

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    def encode(self, text: str) -> Tensor:
        """Tokens (T,) int64 of a text, with nothing added."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))

    def completion(self, text: str) -> Tensor:
        """Tokens (C,) int64 of an assistant's answer, its end-of-turn token included; ValueError
        when the answer holds control tokens."""
        self.refuse_control_tokens(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([*ids, self.stop_id])

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def turn(self, prompt: Prompt, completion: Tensor | Sequence[int]) -> str:
        """Text of the assistant's turn: what the chat template opened, and the completion."""
        return prompt.opened + self.decode(completion)

    @property
    def video_id(self) -> int:
        """The token that stands for a clip's features."""
        return self.tokenizer.convert_tokens_to_ids(self.video_token)

    @property
    def image_id(self) -> int:
        """The token that stands for an image's features."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def stop_id(self) -> int:
        """The token that ends an assistant's turn."""
        return self.tokenizer.eos_token_id

    def banned_ids(self, vocab_size: int) -> Tensor:
        """Tokens that no completion may hold, int64, ascending.

        Vision and other control tokens, padding, and the rows by which the embedding (`vocab_size`)
        is larger than the tokenizer; not the stop token.
        """
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special |= set(range(len(self.tokenizer), vocab_size))
        return torch.tensor(sorted(special - {self.stop_id}), dtype=torch.int64)


def _check_reasoning(rendered: str, think: bool | None) -> None:
    """ValueError where a rendered prompt opens or closes the reasoning against `think`."""
    if think is False and opened_reasoning(rendered):
        raise ValueError(
            "the chat template opens <think> whatever enable_thinking says: set think to true"
        )
    if think and rendered.rstrip().endswith("</think>"):
        raise ValueError(
            "the chat template closes <think> whatever enable_thinking says: set think to false"
        )


def image_bounds(frames: FrameConfig) -> dict[str, int]:
    """Those bounds of images that a run sets, as fields of `ImageProcessorConfig`."""
    bounds = {"min_pixels": frames.image_min_pixels, "max_pixels": frames.image_max_pixels}
    return {name: value for name, value in bounds.items() if value is not None}


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor]:
    found = list(parts)
    if not found:
        return None, torch.zeros(0, 3, dtype=torch.int64)
    patches = [patches for patches, _ in found]
    # A single clip's, the usual case, need no copy.
    joined = torch.cat(patches) if len(patches) > 1 else patches[0]
    return joined, torch.stack([grid for _, grid in found])


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory; CheckpointError names a missing or unusable file."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
        raise CheckpointError(directory / "tokenizer.json", "missing")
    read_json(directory / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception on bad files
        raise CheckpointError(directory / "tokenizer.json", f"unusable ({error})") from error


def read_chat_template(directory: Path, tokenizer: Any) -> str:
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
