"""TRL's trainer with our prompts, rollout and forward pass."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import split_tensor_dict

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, ClipReader
from vcr1_fast.integrations.trl import patch_trl
from vcr1_fast.integrations.trl_video.data import COLUMNS, clip_request, prompt_texts
from vcr1_fast.model.checkpoint import load
from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group
from vcr1_fast.model.processor import Mrope, Processor, Prompt, VideoText
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.vision import freeze_vision, prepare_vision
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops import linear_logprobs

# TRL's settings that have no effect here, with the value they must keep.
_UNSUPPORTED = {
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "cache_implementation": None,
    "pad_to_multiple_of": None,
    "cast_lm_head_to_fp32": False,
}
_UNSUPPORTED_ARGUMENTS = ("tools", "rollout_func", "environment_factory", "processing_class")


@dataclass
class VideoGRPOConfig(GRPOConfig):
    """TRL's settings, and

    Attributes:
        frame_kwargs: of `FrameConfig`, e.g. {"fps": 2.0, "max_frames": 64}: which frames are shown,
            and how large.
        decode_workers: processes that read clips; 0 reads in this one.
        freeze_vision: train the language model alone.
        mrope: "trained" or "installed": positions as the checkpoints were trained with, or as the
            installed transformers has them.
        video_text: the same choice for the text that stands for a clip.
    """

    # TRL declares it without ClassVar, which would make it a field of the dataclass here.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *GRPOConfig._VALID_DICT_FIELDS,
        "frame_kwargs",
    ]

    frame_kwargs: dict[str, Any] | str | None = field(default=None)
    decode_workers: int = field(default=2)
    freeze_vision: bool = field(default=True)
    mrope: str = field(default="trained")
    video_text: str = field(default="trained")


@dataclass(eq=False)
class Shown:
    """A prompt of a generation batch: `vision`: features of its clip, once known, where the
    vision encoder is frozen."""

    prompt: Prompt
    duration: float | None
    vision: Tensor | None = None


class VideoGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` for prompts with a clip, each read once for its group.

    Args:
        model: directory or hub name of a checkpoint, or a model that was loaded with SDPA, then
            with its `processor`.
        reward_funcs, args, train_dataset, and other keywords: as in TRL.
        processor: the checkpoint's; made from `model` where that is a name.

    ValueError for settings of TRL's that do not work here (vLLM, tools, min_p, …), for parameters
    that are sharded over processes (FSDP, ZeRO-3), and while training for a clip that cannot be
    read: TRL's batches have a fixed size, so it cannot be left out. `vcr1 data check` finds such
    clips beforehand.
    """

    # TRL's wider types, narrowed to their values after `__init__`.
    args: VideoGRPOConfig
    model: nn.Module
    _signature_columns: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: VideoGRPOConfig,
        train_dataset: Any,
        *,
        processor: Processor | None = None,
        **kwargs: Any,
    ) -> None:
        patch_trl.check_version()
        _check(args, kwargs)
        if isinstance(model, str | Path):
            options = cast("dict[str, Any]", args.model_init_kwargs or {})  # parsed by TRL
            dtype = options.get("dtype", torch.float32)
            model, own = load(model, dtype=dtype)
            processor = processor or own
            args.model_init_kwargs = None
        elif processor is None:
            raise ValueError("a model that is loaded already needs its processor")
        frames = FrameConfig(**cast("dict[str, Any]", args.frame_kwargs or {}))
        shown = processor.with_frames(frames, media_first=processor.media_first)
        self.processor = dataclasses.replace(
            shown,
            mrope=cast(Mrope, args.mrope),
            video_text=cast(VideoText, args.video_text),
        )
        self.frames = self.processor.frames
        prepare_vision(unwrap(model))
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processor.tokenizer,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("every process must hold the whole model: no FSDP, no DeepSpeed")
        if args.freeze_vision:
            freeze_vision(self.model)  # includes peft's adapters of the vision encoder
        if self.ref_model is not None:
            prepare_vision(unwrap(self.ref_model))
        self._reader = ClipReader(workers=args.decode_workers)
        self._shown: dict[bool, list[Shown]] = {True: [], False: []}  # by whether it is training
        self._rows: list[int] = []  # which of them each row of the batch at work shows

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(COLUMNS)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        assert parts is not None  # TRL sets it in `__post_init__`
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            generated = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(generated, parts)
        return self._buffered_inputs[self._step % parts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        shown, self._rows = self._show(inputs)
        self._shown[self.model.training] = shown
        rows = [  # a column named "image" would have TRL show pictures in its own way
            {
                **{k: v for k, v in row.items() if k != "image"},
                "duration": shown[i].duration,
                "opened": shown[i].prompt.opened,
            }
            for row, i in zip(inputs, self._rows, strict=True)
        ]
        output = super()._generate_and_score_completions(rows)
        output["shown"] = torch.tensor(self._rows)
        return output

    def _show(self, inputs: list[dict[str, Any]]) -> tuple[list[Shown], list[int]]:
        """The prompts of a batch, and for each of its rows which one it is. Rows of a group follow
        each other."""
        runs = [(row, len(list(rows))) for row, rows in itertools.groupby(inputs)]
        clips = self._reader.read(clip_request(row, self.frames) for row, _ in runs)
        shown = []
        for (row, _), clip in zip(runs, clips, strict=True):
            if not isinstance(clip, Clip):
                raise clip
            text, system = prompt_texts(row["prompt"])
            prompt = self.processor.prompt(text, [clip], system=system, think=row.get("think"))
            shown.append(Shown(prompt, clip.duration))
        return shown, [i for i, (_, count) in enumerate(runs) for _ in range(count)]

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        shown = self._shown[self.model.training]
        return [shown[i].prompt.input_ids.tolist() for i in self._rows], None, {}

    def _generate_single_turn(  # type: ignore[override]
        self,
        prompt_ids: list,
        images: None,
        multimodal_fields: dict,
        num_generations: int,
        **_: Any,
    ) -> tuple[list[list[int]], None]:
        shown = self._shown[self.model.training]
        counts = [len(list(rows)) for _, rows in itertools.groupby(self._rows)]
        # A process may hold a part of a group, or one after the other two groups of one prompt.
        size = math.gcd(*counts)
        places = [i for i, count in enumerate(counts) for _ in range(count // size)]
        assert self.max_completion_length is not None  # `_check` refuses None
        sampling = SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            max_new_tokens=self.max_completion_length,
        )
        with self.accelerator.autocast():
            sampled = rollout(
                self.accelerator.unwrap_model(self.model_wrapped),
                self.processor,
                [shown[i].prompt for i in places],
                size,
                sampling,
            )
        if self.args.freeze_vision:
            for i, vision in zip(places, sampled.vision, strict=True):
                shown[i].vision = vision
        return [tokens.tolist() for group in sampled.tokens for tokens in group], None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._rows = inputs["shown"].tolist()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(B, C) log-probs and entropies of the completions of `self._rows`, 0 in padding."""
        tokens = input_ids[:, -logits_to_keep:]
        mask = attention_mask[:, -logits_to_keep:].bool()
        parts = []
        for first in range(0, len(tokens), batch_size or len(tokens)):
            part = slice(first, first + (batch_size or len(tokens)))
            groups = list(self._groups(self._rows[part], tokens[part].cpu(), mask[part].cpu()))
            parts.append(self._score(model, groups, compute_entropy))
        logps, entropies = (torch.cat(values) for values in zip(*parts, strict=True))
        empty = logps.new_zeros(tokens.shape)
        logps = empty.masked_scatter(mask, logps)
        return logps, empty.masked_scatter(mask, entropies) if compute_entropy else None, None

    def _groups(self, rows: list[int], tokens: Tensor, mask: Tensor) -> Iterator[Group]:
        shown = self._shown[self.model.training]
        for i, places in itertools.groupby(range(len(rows)), key=rows.__getitem__):
            # A completion that was masked for being cut off has no token.
            completions = [tokens[j][mask[j]] for j in places if bool(mask[j].any())]
            if completions:
                yield Group(shown[i].prompt, completions, shown[i].vision)

    def _score(self, model: nn.Module, groups: list[Group], entropy: bool) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and entropies of all tokens of the groups, in their order."""
        inner = self.accelerator.unwrap_model(model)

        def score() -> tuple[Tensor, Tensor]:
            weight, bias = lm_head(inner)
            if not groups:  # zeros that a backward pass can begin at
                return weight.float().sum() * 0 * weight.new_zeros(0), weight.new_zeros(0)
            hidden, labels, _ = completion_hidden(inner, groups)
            found = linear_logprobs(
                hidden, weight, labels, bias, temperature=self.temperature, entropy=entropy
            )
            none = found.logps.new_zeros(0)
            return found.logps, none if found.entropy is None else found.entropy

        with self.accelerator.autocast():
            if inner is model:
                return score()
            return _ForwardRedirection()(model, inner, score)  # so that DDP sees the pass

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        assert folder is not None  # TRL's own `_save` needs it too
        self.processor.save_pretrained(folder)


def _check(args: VideoGRPOConfig, arguments: dict[str, Any]) -> None:
    """ValueError for what TRL offers and this trainer cannot do."""
    wrong = [
        f"{name}={getattr(args, name)!r}"
        for name, value in _UNSUPPORTED.items()
        if getattr(args, name) != value
    ]
    wrong += [f"{name}=…" for name in _UNSUPPORTED_ARGUMENTS if arguments.get(name) is not None]
    for name in ("mrope", "video_text"):
        if getattr(args, name) not in get_args(Mrope):
            raise ValueError(
                f"{name} must be one of {get_args(Mrope)}, got {getattr(args, name)!r}"
            )
    if args.max_completion_length is None:
        raise ValueError("max_completion_length must be a number of tokens, got None")
    if wrong:
        raise ValueError(f"VideoGRPOTrainer does not take {', '.join(wrong)}")
