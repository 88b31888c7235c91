"""`vcr1 chat`: questions about one clip, answered token by token.

The clip is read by the model once; a later question goes on from the keys and values of all that
was said before it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError, read_image
from vcr1_fast.evaluate.config import ChatConfig
from vcr1_fast.model.family import family_of
from vcr1_fast.model.forward import embed, language_model_forward, lm_head, prompt_features
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.sampling import SamplingConfig, check_possible, sample
from vcr1_fast.model.wrapping import unwrap

_HALF_A_LETTER = "\N{REPLACEMENT CHARACTER}"


class Conversation:
    """The turns of a conversation about some clips, or none.

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
        seed: int = 0,
    ) -> None:
        from transformers import DynamicCache

        self.model, self.processor, self.clips = unwrap(model).eval(), processor, clips
        self.sampling = sampling or SamplingConfig(temperature=0.0, max_new_tokens=1024)
        self.system = system
        self.messages: list[dict[str, str]] = []
        # By the configuration: layers without keys keep a state there.
        config: Any = family_of(self.model).language_model(self.model).config
        self._memory = DynamicCache(config=config)
        self._position = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._weight, self._bias = lm_head(self.model)
        self._banned = processor.banned_ids(len(self._weight)).to(self._weight.device)

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece as it is generated, special tokens left out. ValueError for a
        question that holds vision or other control tokens."""
        hidden = self._follow_up(question) if self.messages else self._open(question)
        stop, tokens, shown = self.processor.stop_id, [], ""
        for _ in range(self.sampling.max_new_tokens):
            tokens.append(self._sample(hidden))
            if tokens[-1] == stop:
                break
            text = self.processor.decode(tokens)
            if not text.endswith(_HALF_A_LETTER):
                yield text[len(shown) :]
                shown = text
            hidden = self._read(torch.tensor(tokens[-1:]))
        text = self.processor.decode(tokens)
        if len(text) > len(shown):
            yield text[len(shown) :]
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]

    @torch.no_grad()
    def _open(self, question: str) -> Tensor:
        """Read the clips and the first question; hidden state (1, H) of the last token."""
        prompt = self.processor.prompt(question, self.clips, system=self.system)
        self._position = next_position(prompt.positions)
        device = self._weight.device
        features = prompt_features(self.model, [prompt])
        embeddings, inputs = embed(
            self.model, prompt.input_ids.to(device), prompt.is_vision.to(device), features
        )
        return self._run(embeddings[None], prompt.positions, **inputs)

    def _follow_up(self, question: str) -> Tensor:
        """Read the end of the last turn, which the model has not read yet, and the next turn."""
        if bool(torch.isin(self.processor.encode(question), self._vision_ids()).any()):
            raise ValueError(f"the question holds vision tokens: {question!r}")
        self.processor.refuse_control_tokens(question)
        asked = [*self.messages, {"role": "user", "content": question}]
        rendered = self.processor.render(asked, answer=True)
        # Up to the last answer: a template may leave the reasoning of earlier answers out, which
        # the model here has read and goes on from.
        before = self.processor.render(self.messages[:-1], answer=False)
        end = self.processor.tokenizer.convert_ids_to_tokens(self.processor.stop_id)
        parts = rendered.rsplit(end, 2)  # earlier turns, the question, the assistant's beginning
        if len(parts) < 3 or not rendered.startswith(before):
            raise ValueError("the checkpoint's chat template rewrites earlier turns")
        return self._read(self.processor.encode("".join(end + part for part in parts[1:])))

    def _vision_ids(self) -> Tensor:
        return torch.tensor([self.processor.video_id, self.processor.image_id])

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> Tensor:
        """Read text tokens (T,) after all others; hidden state (1, H) of the last one."""
        positions = torch.arange(len(tokens)) + self._position
        self._position += len(tokens)
        embeddings = self.model.get_input_embeddings()(tokens[None].to(self._weight.device))
        return self._run(embeddings, positions.expand(3, -1))

    def _run(self, embeddings: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        count, before = embeddings.shape[1], self._memory.get_seq_length()
        mask = None
        if before and count > 1:  # what is causal from the first token on needs no mask
            seen = torch.ones(count, before + count, dtype=torch.bool, device=embeddings.device)
            mask = seen.tril(before)[None, None]
        return language_model_forward(
            self.model,
            embeddings,
            positions[:, None].to(embeddings.device),
            kv_cache=self._memory,
            mask=mask,
            **inputs,
        )[:, -1]

    @torch.no_grad()
    def _sample(self, hidden: Tensor) -> int:
        logits = nn.functional.linear(hidden, self._weight, self._bias)
        uniforms = torch.rand(1, dtype=torch.float64, generator=self._generator)
        sampled = sample(logits, uniforms.to(logits.device), self._banned, self.sampling)
        check_possible(sampled.possible)
        return int(sampled.tokens)


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
    """Load the model and read the clip; describes the clip on the standard error."""
    from vcr1_fast.model import checkpoint

    began, clips = time.perf_counter(), []
    # The processor alone first: a clip that cannot be read must not wait for the weights.
    frames = checkpoint.load_processor(config.model).with_frames(config.frames).frames
    if config.video is not None:
        request = ClipRequest(
            config.video,
            frames,
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
        size = f"{width} x {height}"
        if clip.duration is not None:
            size = f"{len(clip.frames)} frames of {clip.duration:.1f} s, {size}"
        print(f"{clip.path}: {size}", file=sys.stderr)
    dtype, device = config.placement()
    model, processor = checkpoint.load(
        config.model,
        dtype=dtype,
        device=device,
        mrope=config.mrope,
        video_text=config.video_text,
    )
    processor = processor.with_frames(config.frames, media_first=config.media_first)
    print(f"ready in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return Conversation(
        model,
        processor,
        clips,
        config.sampling(),
        system=config.system,
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
