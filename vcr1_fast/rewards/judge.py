"""A language model as judge of captions: its questions, how its replies are read and recorded.

The model itself is any function from prompts to replies: `endpoint.Endpoint` over HTTP, or
`model.judge.LocalModel` in this process. `Recorded` keeps every reply in a file, so that a run pays
for each reply once and can be repeated without a model.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vcr1_fast.files import append_jsonl, read_jsonl

Ask = Callable[[Sequence[str]], Iterable[str]]
"""Prompts to replies, in order; replies may arrive one by one."""

MAX_EVENTS = 32
"""Events taken from one caption, so that a policy that lists more cannot run up a bill."""

_EVENTS = (
    "Below is the description of a video, as a JSON string. List the events it tells, one on each "
    "line, in its order, each as a short sentence that can be understood alone. Leave out opinions "
    "and what is not seen. Write nothing else.\n\nDescription: {caption}"
)
_TELLS = (
    "Below are the description of a video and one event, as JSON strings. Does the description say "
    "that the event takes place? Other words for the same thing count; what could only be guessed "
    "does not. Reply yes or no.\n\nDescription: {caption}\nEvent: {event}"
)
_BULLET = re.compile(r"(?:[-*\u2022]|\d{1,3}[.)])\s*")
_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class JudgeError(OSError):
    """The judge cannot be reached, or refuses."""


@dataclass(frozen=True)
class JudgeConfig:
    """The judge of captions."""

    kind: Literal["offline", "http", "local"] = "offline"
    """Judge of captions; "offline": word matching, no model; "http": an OpenAI-compatible endpoint;
    "local": a checkpoint run in this process."""
    model: str = ""
    """The model's name at the endpoint, or a checkpoint folder or hub name."""
    url: str = "http://127.0.0.1:8000/v1"
    """The endpoint, up to its version."""
    api_key_env: str | None = None
    """Environment variable that holds the endpoint's key; null: no key."""
    timeout: float = 60.0
    """Seconds for one request in total; each retry has as many."""
    retries: int = 4
    """Retries when the endpoint is busy or unreachable."""
    backoff: float = 1.0
    """Seconds before the first retry, doubled before each further one."""
    concurrency: int = 16
    """Requests in flight at once, or prompts in one batch of a local model."""
    max_tokens: int = 512
    """Tokens of the longest reply."""
    cache: str | None = None
    """JSONL file of replies, read first and appended to; null: none."""
    replay: bool = False
    """Take replies from `cache` only; a prompt that it does not hold is an error."""

    def __post_init__(self) -> None:
        if self.kind != "offline" and not self.model:
            raise ValueError(f"a judge of kind {self.kind} needs a model")
        if self.replay and (self.cache is None or self.kind == "offline"):
            raise ValueError("replay needs a cache and the kind and model whose replies it holds")
        for name, least in (("retries", 0), ("concurrency", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.timeout <= 0 or self.backoff < 0:
            raise ValueError(
                f"expected timeout > 0 and backoff >= 0, got {self.timeout} and {self.backoff}"
            )


class ModelJudge:
    """A judge that asks a language model: one question for the events of a caption, one for each
    (caption, event). `unreadable` counts replies that say neither yes nor no; they count as no."""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.unreadable = ask, 0

    def close(self) -> None:
        """Give up the requests in flight of an `Ask` that can, so that no thread waits for them."""
        close = getattr(self.ask, "close", None)
        if close is not None:
            close()

    def events(self, captions: Sequence[str]) -> list[tuple[str, ...]]:
        prompts = [_EVENTS.format(caption=_quoted(caption)) for caption in captions]
        return [_lines(reply) for reply in self.ask(prompts)]

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        prompts = [_TELLS.format(caption=_quoted(c), event=_quoted(event)) for c, event in pairs]
        verdicts = [_verdict(reply) for reply in self.ask(prompts)]
        self.unreadable += verdicts.count(None)
        return [verdict is True for verdict in verdicts]


def _quoted(text: str) -> str:
    # Quotation marks and line breaks are escaped, so that a caption cannot end its own string and
    # go on as the question; halves of surrogate pairs, which no encoder takes, become "?".
    return json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False)


def _spoken(reply: str) -> str:
    """The text after the model's reasoning, or all of it when it shows none."""
    return reply.rpartition("</think>")[2]


def _lines(reply: str) -> tuple[str, ...]:
    lines = (line.strip() for line in _spoken(reply).splitlines())
    events = (_BULLET.sub("", line, count=1) if _BULLET.match(line) else line for line in lines)
    return tuple(event for event in events if event)[:MAX_EVENTS]


def _verdict(reply: str) -> bool | None:
    found = _VERDICT.search(_spoken(reply))
    return None if found is None else found[1].lower() == "yes"


class Recorded:
    """Reads replies from a file; asks for those it does not hold, and appends them.

    A line is {"key", "model", "prompt", "reply"}; the key is the SHA-256 of model and prompt. A
    torn line at the end, left by a killed run, is dropped. When `ask` is None, a prompt that the
    file does not hold is a ValueError.
    """

    def __init__(self, ask: Ask | None, model: str, path: str | Path) -> None:
        self.ask, self.model, self.path = ask, model, Path(path)
        self._lock = threading.Lock()
        self._replies = self._read()

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        keys = [self._key(prompt) for prompt in prompts]
        # Completions of one group are often equal: equal prompts are asked once.
        with self._lock:
            new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self._replies}
        ask = self.ask
        if new and ask is None:
            first = next(iter(new.values()))
            raise ValueError(
                f"{self.path} holds no reply of {self.model!r} to {len(new)} of "
                f"{len(set(keys))} prompts, the first being {first[:200]!r}"
            )
        if new and ask is not None:
            replies = iter(ask(list(new.values())))
            for (key, prompt), reply in zip(new.items(), replies, strict=True):
                self._keep(key, prompt, reply)
        return [self._replies[key] for key in keys]

    def close(self) -> None:
        """Give up the requests in flight, see `ModelJudge.close`."""
        close = getattr(self.ask, "close", None)
        if close is not None:
            close()

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(
            f"{self.model}\0{prompt}".encode("utf-8", "surrogatepass")
        ).hexdigest()

    def _read(self) -> dict[str, str]:
        """The file's replies; a torn line at its end is cut off if the file will be appended to."""
        if not self.path.exists():
            return {}
        replies = {}
        for number, row in read_jsonl(self.path, torn="skip" if self.ask is None else "cut"):
            try:
                replies[row["key"]] = row["reply"]
            except (TypeError, KeyError) as error:
                raise ValueError(f"{self.path}:{number}: no recorded reply: {error}") from None
        return replies

    def _keep(self, key: str, prompt: str, reply: str) -> None:
        row = {"key": key, "model": self.model, "prompt": prompt, "reply": reply}
        with self._lock:
            self._replies[key] = reply
            append_jsonl(self.path, [row])
