"""The family-free part of a processor: chat template, tokens, and what a completion may hold.

A family adds how clips and images become patches, placeholder tokens and positions
(`model/<family>/processor.py`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model.files import CheckpointError, read_json
from vcr1_fast.model.prompt import Prompt

__all__ = ["ClipLike", "Mrope", "Processor", "Prompt"]

Mrope = Literal["trained", "installed"]
"""Positions as the checkpoints were trained with, or as the installed transformers has them."""


class ClipLike(Protocol):
    """The part of a clip that the processor reads; an image has T = 1 and no rate.

    `fitted`, where there is one, says whether the frames have been resized already (`fit`).
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
    """Renders and tokenises; a family's subclass cuts clips into patches as well.

    sources: the settings files it came from, by name. media_first: clips stand before the text, as
    in VideoChat-R1.5; VideoChat-R1 puts them behind it. mrope: how positions are counted, see
    `Mrope`. frames: which frames of a clip are sampled (the family may replace the rule).
    """

    video_token: ClassVar[str]
    image_token: ClassVar[str]

    tokenizer: Any
    chat_template: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    media_first: bool = False
    mrope: Mrope = "trained"
    frames: FrameConfig = field(default_factory=FrameConfig)

    def __post_init__(self) -> None:
        if self.mrope not in get_args(Mrope):
            raise ValueError(f"mrope must be one of {get_args(Mrope)}, got {self.mrope!r}")

    @abstractmethod
    def prompt(
        self, text: str, clips: Sequence[ClipLike] = (), *, system: str | None = None
    ) -> Prompt:
        """A user turn of `text` and `clips` (and images: those without a rate), up to where the
        assistant starts.

        `system` is the system turn; None leaves it to the chat template. ValueError when a text
        itself holds vision or other control tokens, or an image has more than one frame.
        """

    @abstractmethod
    def fit(self) -> Callable[[np.ndarray, int | None], np.ndarray] | None:
        """A picklable function that resizes a frame (H, W, 3) of a clip of so many frames (None: an
        image) as `prompt` would; None where that would not give the same patches."""

    @abstractmethod
    def with_bounds(self: P, frames: FrameConfig) -> P:
        """The same processor with the pixel bounds of a run's settings."""

    @abstractmethod
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings files of clips and images by name, for a processor that came from no files."""

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

    def render(self, messages: Sequence[dict[str, Any]], *, answer: bool) -> str:
        """Text of a conversation by the chat template; `answer`: the assistant's turn follows."""
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=answer,
            tokenize=False,
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
