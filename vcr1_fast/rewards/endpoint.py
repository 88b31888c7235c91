"""A language model behind an OpenAI-compatible HTTP endpoint (`POST <url>/chat/completions`)."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from vcr1_fast.rewards.judge import JudgeConfig, JudgeError

# Busy, or out of order for a moment; any other refusal would be repeated for ever.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key along to wherever it points."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Prompts to replies, `config.concurrency` at once, each tried again where that can help.

    key: sent as a bearer token; it is in no message and no representation. ValueError for a URL
    that is not HTTP; JudgeError, naming the URL and the last fault, when a request fails for good.
    """

    config: JudgeConfig
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http:// or https://, got {self.config.url!r}")

    def __call__(self, prompts: Sequence[str]) -> Iterator[str]:
        """Replies in order, each as soon as it and those before it are there."""
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="judge")
        batch = _Batch()
        try:
            yield from pool.map(lambda prompt: self._reply(prompt, batch), prompts)
        finally:
            batch.given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, prompt: str, batch: "_Batch") -> str:
        wait = self.config.backoff
        for attempt in range(self.config.retries + 1):
            try:
                return self._attempt(prompt)
            except JudgeError as error:
                batch.fail(error)
                raise
            except _PassingError as error:
                if attempt < self.config.retries:
                    if not batch.given_up.wait(min(max(wait, error.wait), _LONGEST_WAIT)):
                        wait *= 2
                        continue
                    if batch.fault is not None:  # it, not this one, is what is wrong
                        raise batch.fault from error.__cause__
                fault = JudgeError(f"judge at {self.config.url}: {error}, {attempt + 1} times")
                batch.fail(fault)
                raise fault from error.__cause__
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, prompt: str) -> str:
        config = self.config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": config.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            config.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=config.timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                told = error.read(300).decode("utf-8", "replace")
            fault = f"HTTP {error.code} {told!r}"
            if error.code in _PASSING:
                raise _PassingError(fault, _asked_to_wait(error.headers)) from error
            raise JudgeError(f"judge at {config.url}: {fault}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(
                f"judge at {config.url}: no choices[0].message.content in {text[:200]!r}"
            ) from error
        if not isinstance(reply, str):
            raise JudgeError(f"judge at {config.url}: a reply that is no text, {reply!r}")
        return reply


@dataclass
class _Batch:
    """What the requests of one call share: whether to go on, and the first fault for good."""

    given_up: Event = field(default_factory=Event)
    fault: JudgeError | None = None

    def fail(self, fault: JudgeError) -> None:
        self.fault = self.fault or fault
        self.given_up.set()


class _PassingError(Exception):
    """A fault that may pass; `wait`: seconds the endpoint asked to be left alone."""

    def __init__(self, fault: str, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.wait = wait


def _asked_to_wait(headers: Message) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdecimal() and len(value) < 6 else 0.0
