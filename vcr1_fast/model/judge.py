"""Opens the judge that a configuration names; runs the model of a local one."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vcr1_fast.rewards.caption import Judge, MatchingJudge
from vcr1_fast.rewards.endpoint import Endpoint
from vcr1_fast.rewards.judge import Ask, JudgeConfig, ModelJudge, Recorded


def open_judge(config: JudgeConfig, device: torch.device | str = "cpu") -> Judge:
    """The judge that `config` describes; a local model runs on `device`. The first question loads
    the model or contacts the endpoint.

    ValueError when the variable that `api_key_env` names is not set.
    """
    if config.kind == "offline":
        return MatchingJudge()
    ask: Ask | None = None
    if not config.replay:
        ask = (
            Endpoint(config, _key(config)) if config.kind == "http" else LocalModel(config, device)
        )
    if config.cache is not None:
        return ModelJudge(Recorded(ask, config.model, config.cache))
    assert ask is not None  # JudgeConfig refuses `replay` without a cache
    return ModelJudge(ask)


def _key(config: JudgeConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ValueError(f"api_key_env: the environment has no {config.api_key_env}")
    return key


class LocalModel:
    """Answers prompts with a chat model of transformers, text-only or a vision language model.

    Decodes greedily, `config.concurrency` prompts a batch, `config.max_tokens` tokens at most."""

    def __init__(self, config: JudgeConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, prompts: Sequence[str]) -> Iterator[str]:
        for first in range(0, len(prompts), self.config.concurrency):
            yield from self._replies(prompts[first : first + self.config.concurrency])

    @torch.no_grad()
    def _replies(self, prompts: Sequence[str]) -> list[str]:
        tokenizer, model = self._load()
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(self.device)
        # Every setting is explicit, since a checkpoint's own generation config may sample.
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            max_new_tokens=self.config.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        replies = tokens[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(replies, skip_special_tokens=True)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import (
                AutoConfig,
                AutoModelForCausalLM,
                AutoModelForImageTextToText,
                AutoTokenizer,
            )

            path = self.config.model
            tokenizer = AutoTokenizer.from_pretrained(path)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
            kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model = kind.from_pretrained(path, dtype="auto").to(self.device).eval()
            self._loaded = tokenizer, model
        return self._loaded
