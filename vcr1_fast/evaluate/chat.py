"""`vcr1 chat`: questions about one clip, answered token by token.

The clip is read by the model once; a later question goes on from the keys and values of all that
was said before it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError, read_image
from vcr1_fast.evaluate.config import placement
from vcr1_fast.model.forward import embed, lm_head, prompt_features
from vcr1_fast.model.packing import prompt_positions
from vcr1_fast.model.positions import SpecialIds, next_position
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.sampling import SamplingConfig, check_possible, draw
from vcr1_fast.model.wrapping import unwrap

_HALF_A_LETTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ChatConfig:
    """One `vcr1 chat` command."""

    model: str
    video: str | None = None
    image: tuple[str, ...] = ()
    """Images, shown after the video where there is one."""
    question: tuple[str, ...] = ()
    """Asked one after the other; default: lines of the standard input."""
    start: float | None = None
    end: float | None = None
    """Part of the video to watch, in seconds."""
    folder_fps: float | None = None
    """Frames a second of a folder of images, which does not tell them."""
    frames: FrameConfig = field(default_factory=FrameConfig)
    decoder: Literal["decord", "pyav"] = "pyav"
    system: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    mrope: Literal["trained", "installed"] = "trained"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.folder_fps is not None and not 0 < self.folder_fps < math.inf:
            raise ValueError(f"folder_fps must be a positive number, got {self.folder_fps}")

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_p, max_new_tokens=self.max_new_tokens)


class Conversation:
    """What has been said about some clips (none: about nothing).

    `ask` answers a question, which it then remembers. Greedy unless `sampling` says otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        clips: Sequence[Clip] = (),
        sampling: SamplingConfig | None = None,
        *,
        system: str | None = None,
        convention: str = "trained",
        seed: int = 0,
    ) -> None:
        from transformers import DynamicCache

        self.model, self.processor, self.clips = unwrap(model).eval(), processor, clips
        self.sampling = sampling or SamplingConfig(temperature=0.0, max_new_tokens=1024)
        self.system, self.convention = system, convention
        self.messages: list[dict[str, str]] = []
        self._memory = DynamicCache()
        self._position = 0
        self._chance = torch.Generator().manual_seed(seed)
        self._weight, self._bias = lm_head(self.model)
        self._banned = processor.banned_ids(len(self._weight)).to(self._weight.device)

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece as it is generated, special tokens left out. ValueError for a
        question that holds vision tokens."""
        hidden = self._follow_up(question) if self.messages else self._open(question)
        stop, tokens, told = self.processor.stop_id, [], ""
        for _ in range(self.sampling.max_new_tokens):
            tokens.append(self._draw(hidden))
            if tokens[-1] == stop:
                break
            text = self.processor.decode(tokens)
            if not text.endswith(_HALF_A_LETTER):
                yield text[len(told) :]
                told = text
            hidden = self._read(torch.tensor(tokens[-1:]))
        text = self.processor.decode(tokens)
        if len(text) > len(told):
            yield text[len(told) :]
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]

    @torch.no_grad()
    def _open(self, question: str) -> Tensor:
        """Read the clips and the first question; hidden state (1, H) of the last token."""
        prompt = self.processor.prompt(question, self.clips, system=self.system)
        ids = SpecialIds.from_config(self.model.config)
        positions = prompt_positions(prompt, ids, self.convention)
        self._position = next_position(positions)
        features = [f for f in prompt_features(self.model, [prompt]) if f is not None]
        tokens = prompt.input_ids[None].to(self._weight.device)
        embeddings = embed(self.model, tokens, torch.ones_like(tokens).bool(), features, ids)
        return self._run(embeddings, positions)

    def _follow_up(self, question: str) -> Tensor:
        """Read the end of the last turn, which was drawn or cut off but not read, and the next."""
        asked = [*self.messages, {"role": "user", "content": question}]
        rendered, before = self._render(asked, True), self._render(self.messages, False)
        end = self.processor.tokenizer.convert_ids_to_tokens(self.processor.stop_id)
        if not rendered.startswith(before):
            raise ValueError("the checkpoint's chat template rewrites earlier turns")
        turn = rendered[before.rindex(end) :]
        tokens = torch.tensor(self.processor.tokenizer.encode(turn, add_special_tokens=False))
        if bool(torch.isin(tokens, self._vision_ids()).any()):
            raise ValueError(f"the question holds vision tokens: {question!r}")
        return self._read(tokens)

    def _render(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        return self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            add_generation_prompt=answer,
            tokenize=False,
        )

    def _vision_ids(self) -> Tensor:
        return torch.tensor([self.processor.video_id, self.processor.image_id])

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> Tensor:
        """Read text tokens (T,) after all others; hidden state (1, H) of the last one."""
        positions = torch.arange(len(tokens)) + self._position
        self._position += len(tokens)
        embeddings = self.model.get_input_embeddings()(tokens[None].to(self._weight.device))
        return self._run(embeddings, positions.expand(3, -1))

    def _run(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        count, before = embeddings.shape[1], self._memory.get_seq_length()
        mask = None
        if before and count > 1:  # what is causal from the first token on needs no mask
            seen = torch.ones(count, before + count, dtype=torch.bool, device=embeddings.device)
            mask = seen.tril(before)[None, None]
        return self.model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions[:, None].to(embeddings.device),
            attention_mask={"full_attention": mask},
            past_key_values=self._memory,
            use_cache=True,
        ).last_hidden_state[:, -1]

    @torch.no_grad()
    def _draw(self, hidden: Tensor) -> int:
        logits = nn.functional.linear(hidden, self._weight, self._bias)
        chance = torch.rand(1, dtype=torch.float64, generator=self._chance)
        drawn = draw(logits, chance.to(logits.device), self._banned, self.sampling)
        check_possible(drawn.possible)
        return int(drawn.tokens)


def main_chat(config: ChatConfig, questions: TextIO | None = None) -> int:
    """Answer the questions of `config`, else those on the lines of `questions` (the standard
    input), to the standard output as they are generated. Returns 0."""
    questions = questions or sys.stdin
    talk = open_conversation(config)
    for question in config.question or _lines(questions):
        for piece in talk.ask(question):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


def open_conversation(config: ChatConfig) -> Conversation:
    """Load the model and read the clip; tells on the standard error what is shown."""
    from vcr1_fast.model import checkpoint

    began, clips = time.perf_counter(), []
    if config.video is not None:
        request = ClipRequest(
            config.video,
            config.frames,
            start=config.start,
            end=config.end,
            folder_fps=config.folder_fps,
        )
        with ClipReader(backend=config.decoder, workers=0) as reader:
            clip = next(reader.read([request]))
        if isinstance(clip, VideoError):
            raise clip
        clips.append(clip)
    clips += [read_image(path) for path in config.image]
    for clip in clips:
        height, width = clip.frames.shape[1:3]
        told = f"{width} x {height}"
        if clip.duration is not None:
            told = f"{len(clip.frames)} frames of {clip.duration:.1f} s, {told}"
        print(f"{clip.path}: {told}", file=sys.stderr)
    dtype, device = placement(config.dtype, config.device)
    model, processor = checkpoint.load(config.model, dtype=dtype, device=device)
    processor = processor.with_frames(config.frames)
    print(f"ready in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return Conversation(
        model,
        processor,
        clips,
        config.sampling(),
        system=config.system,
        convention=config.mrope,
        seed=config.seed,
    )


def _lines(stream: TextIO) -> Iterator[str]:
    """Questions, blank lines left out; at a terminal with a sign that one is waited for."""
    asks: Any = stream.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = stream.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
