"""A language model behind an OpenAI-compatible HTTP endpoint (`POST <url>/chat/completions`)."""

import contextlib
import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from email.message import Message
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import quote, urlsplit

from vcr1_fast.rewards.judge import JudgeConfig, JudgeError

MAX_BODY = 8 << 20
"""Bytes of a reply's body; a longer one is an error, so that no endpoint can exhaust memory."""

# Busy or unavailable for a moment. Any other refusal would come back at each retry.
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_WAIT = 60.0
_MAX_ERROR_BODY = 1 << 16
_QUOTED = 300


@dataclass(frozen=True)
class Endpoint:
    """Sends prompts to an endpoint, `config.concurrency` at once, and yields the replies in order.

    Each request ends within `config.timeout` seconds in total, however slowly the server answers,
    and its body has at most `MAX_BODY` bytes. Transient faults are retried.
    key: sent as a bearer token; no message and no representation shows it.
    ValueError for a URL that is not plain HTTP(S) and for a key that no header can hold.
    JudgeError, naming the URL and the last fault, when a request fails for good or after `close`.

    All threads are daemons and no exit handler joins them: the interpreter ends while requests are
    in flight. A thread that iterates over the replies and is not a daemon itself (a
    ThreadPoolExecutor's) is released by `close`.
    """

    config: JudgeConfig
    key: str | None = field(default=None, repr=False)
    _closed: Event = field(default_factory=Event, init=False, repr=False, compare=False)
    _batches: set["_Batch"] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.config.url)
        if "@" in parts.netloc:  # it would be a secret that every message repeats
            raise ValueError(
                f"url must not hold a user or password, got one for host {parts.hostname!r}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http:// or https://, got {self.config.url!r}")
        # http.client refuses such a header too, with a message that shows the key.
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                f"the key of judge {self.config.url} has a character that is not printable ASCII "
                f"(a line break at its end?)"
            )

    def __call__(self, prompts: Sequence[str]) -> Iterator[str]:
        """Yield the replies in order, each as soon as it and those before it have arrived."""
        batch = _Batch(prompts)
        self._batches.add(batch)
        if self._closed.is_set():
            self._end(batch)
        for number in range(min(self.config.concurrency, len(prompts))):
            _start(self._work, batch, name=f"judge_{number}")
        try:
            for reply in batch.replies:
                yield reply.result()
        finally:
            batch.given_up.set()
            self._batches.discard(batch)

    def close(self) -> None:
        """Give up all requests in flight: whoever waits for their replies gets a JudgeError."""
        self._closed.set()
        for batch in list(self._batches):
            self._end(batch)

    def _end(self, batch: "_Batch") -> None:
        fault = self._error("closed before it replied")
        batch.fail(fault)
        for reply in batch.replies:
            _settle(reply, fault)

    def _work(self, batch: "_Batch") -> None:
        while (todo := batch.next()) is not None:
            prompt, reply = todo
            try:
                _settle(reply, self._reply(prompt, batch))
            except Exception as error:  # it is raised again where the reply is awaited
                _settle(reply, error)

    def _reply(self, prompt: str, batch: "_Batch") -> str:
        wait = self.config.backoff
        for attempt in range(1, self.config.retries + 2):
            try:
                return self._attempt(prompt)
            except JudgeError as error:
                batch.fail(error)
                raise
            except _TransientError as error:
                fault = self._error(f"{error}, {attempt} times")
                requested = error.wait
            if attempt > self.config.retries:
                break
            if batch.given_up.wait(min(max(wait, requested), _MAX_WAIT)):
                raise batch.fault or fault  # what fails one request for good fails all
            wait *= 2
        batch.fail(fault)
        raise fault

    def _attempt(self, prompt: str) -> str:
        """Send one request from a separate thread, and leave that thread behind at the deadline.

        A socket's time-out is per read: a server that sends a byte now and then never exceeds it,
        and no time-out at all bounds the lookup of a host name.
        """
        exchange, result = _Exchange(), Future[str]()

        def run() -> None:
            try:
                result.set_result(self._send(prompt, exchange))
            except Exception as error:
                result.set_exception(error)

        _start(run, name="judge_request")
        wait_for([result], self.config.timeout)
        if result.done():
            return result.result()
        exchange.cut()
        raise _TransientError(f"timed out after {self.config.timeout:g} s")

    def _send(self, prompt: str, exchange: "_Exchange") -> str:
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
        opener = urllib.request.build_opener(
            _NoRedirects, _HTTPHandler(exchange), _HTTPSHandler(exchange)
        )
        try:
            with opener.open(request, timeout=config.timeout) as response:
                text = response.read(MAX_BODY + 1)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise _TransientError(self._redact(f"{type(error).__name__}: {error}")) from None
        if len(text) > MAX_BODY:
            raise self._error(f"the reply has more than {MAX_BODY} bytes")
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._error(f"no choices[0].message.content in {self._quote(text)}") from None
        if not isinstance(reply, str):
            raise self._error(f"expected text as content, got {type(reply).__name__}")
        return reply

    def _refusal(self, error: urllib.error.HTTPError) -> "JudgeError | _TransientError":
        """The fault of an HTTP error, with the start of its body."""
        with error:
            try:
                body = error.read(_MAX_ERROR_BODY)
            except (OSError, http.client.HTTPException):
                body = b""  # the status alone says enough
        fault = f"HTTP {error.code} {self._quote(body)}"
        if error.code in _TRANSIENT_STATUSES:
            return _TransientError(fault, _requested_wait(error.headers))
        return self._error(fault)

    def _error(self, fault: str) -> JudgeError:
        return JudgeError(f"judge at {self.config.url}: {fault}")

    def _quote(self, body: bytes) -> str:
        """The start of a body. The key is replaced before the cut, which could halve it."""
        return repr(self._redact(body.decode("utf-8", "replace"))[:_QUOTED])

    def _redact(self, text: str) -> str:
        """Replace the key: some servers repeat the request's headers in their error pages."""
        if self.key:
            for form in {self.key, repr(self.key)[1:-1], json.dumps(self.key)[1:-1]}:
                text = text.replace(form, "<key>")
            text = text.replace(quote(self.key, safe=""), "<key>")
        return text


@dataclass(eq=False)
class _Batch:
    """The requests of one call: those not yet sent, their replies, and the first lasting fault."""

    prompts: Sequence[str]
    given_up: Event = field(default_factory=Event)
    fault: JudgeError | None = None

    def __post_init__(self) -> None:
        self.replies: list[Future[str]] = [Future() for _ in self.prompts]
        self._todo: SimpleQueue[tuple[str, Future[str]]] = SimpleQueue()
        for pair in zip(self.prompts, self.replies, strict=True):
            self._todo.put(pair)

    def next(self) -> tuple[str, Future[str]] | None:
        """The next prompt and where its reply goes; None at the end or after a fault."""
        # Nobody waits for the replies left: prompts leave in order, so the fault is met before.
        if self.given_up.is_set():
            return None
        try:
            return self._todo.get_nowait()
        except Empty:
            return None

    def fail(self, fault: JudgeError) -> None:
        self.fault = self.fault or fault
        self.given_up.set()


class _TransientError(Exception):
    """A fault that may pass; `wait`: seconds that the endpoint asked to be left alone."""

    def __init__(self, fault: str, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.wait = wait


class _Exchange:
    """The connection of one request, which another thread may cut."""

    def __init__(self) -> None:
        self._lock, self._is_cut = Lock(), False
        self._socket: socket.socket | None = None

    def connected(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
            is_cut = self._is_cut
        if is_cut:
            self.cut()

    def cut(self) -> None:
        """End the thread that reads: its read returns at once."""
        with self._lock:
            self._is_cut, connection = True, self._socket
        if connection is not None:
            # Not SSLSocket's own shutdown, which takes the TLS state away under a read.
            with contextlib.suppress(OSError):  # closed by its reader a moment ago
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    exchange: _Exchange

    def connect(self) -> None:
        super().connect()
        self.exchange.connected(self.sock)


class _TLSConnection(http.client.HTTPSConnection):
    exchange: _Exchange

    def connect(self) -> None:
        super().connect()
        self.exchange.connected(self.sock)


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, **options: Any) -> _Connection:
        connection = _Connection(host, **options)
        connection.exchange = self.exchange
        return connection


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def _connection(self, host: str, **options: Any) -> _TLSConnection:
        connection = _TLSConnection(host, **options)
        connection.exchange = self.exchange
        return connection


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a redirected request would take the key along to wherever it points."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _start(function: Callable[..., None], *arguments: Any, name: str) -> None:
    # A daemon: the interpreter joins all other threads before it ends, those of a
    # ThreadPoolExecutor too, and so would wait for a server that does not answer.
    Thread(target=function, args=arguments, name=name, daemon=True).start()


def _settle(reply: Future[str], outcome: str | Exception) -> None:
    """Set the outcome of a reply, unless `close` has set one."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            reply.set_exception(outcome)
        else:
            reply.set_result(outcome)


def _requested_wait(headers: Message) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdecimal() and len(value) < 6 else 0.0
