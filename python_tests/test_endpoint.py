"""The judge's endpoint against hostile or broken servers: bounds of time and size, the key kept
secret, an exit that waits for nobody."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from contextlib import contextmanager

import pytest

from vcr1_fast.rewards import endpoint
from vcr1_fast.rewards.endpoint import MAX_BODY, Endpoint
from vcr1_fast.rewards.judge import JudgeConfig, JudgeError, ModelJudge, Recorded

KEY = 'sk-"quoted"/\\secret%7'
OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def raw_server(answer):
    """The URL of a server that calls `answer(connection, request)` for each connection."""
    stop = threading.Event()

    def serve(connection):
        with connection:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(1 << 16)
                head, _, body = request.partition(b"\r\n\r\n")
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])
                while len(body) < length:  # to close with unread bytes would reset the connection
                    body += connection.recv(1 << 16)
                answer(connection, request.decode("latin-1"))
            except OSError:
                pass  # the client has gone

    def accept():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def make(url, key=None, **changes):
    fields = {"kind": "http", "model": "m", "url": url, "backoff": 0.0, "timeout": 1.0}
    return Endpoint(JudgeConfig(**fields | {"retries": 0} | changes), key)


def drip(prefix, piece):
    def answer(connection, request):
        connection.sendall(prefix)
        for _ in range(600):
            connection.sendall(piece)
            time.sleep(0.05)

    return answer


def seconds_to_fail(ask, match, prompts=("x",)):
    start = time.perf_counter()
    with pytest.raises(JudgeError, match=match):
        list(ask(prompts))
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("prefix", "piece"),
    [
        (b"", b"H"),  # the status line
        (OK, b"X-Header: 1\r\n"),
        (OK + b"Content-Length: 100000\r\n\r\n", b" "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 400 No\r\nContent-Length: 100000\r\n\r\n", b"x"),
    ],
    ids=["status", "headers", "body", "chunks", "error body"],
)
def test_a_server_that_drips_is_given_up_in_time(prefix, piece):
    """30 s of dripping, a byte each 50 ms: no read ever times out."""
    with raw_server(drip(prefix, piece)) as url:
        took = seconds_to_fail(make(url, timeout=0.5, retries=1), r"timed out.*, 2 times")
        assert 0.9 <= took < 8
        deadline = time.perf_counter() + 5
        while any(t.name.startswith("judge_") for t in threading.enumerate()):
            assert time.perf_counter() < deadline, "a request's thread still reads"
            time.sleep(0.02)


def test_a_host_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: release.wait(20) and [])
    ask = make("http://judge.invalid/v1", timeout=0.3)
    assert seconds_to_fail(ask, "timed out after 0.3 s, 1 times") < 8
    release.set()


def test_timeouts_of_a_batch_run_beside_each_other():
    with raw_server(drip(OK + b"Content-Length: 9\r\n\r\n", b"")) as url:
        ask = make(url, timeout=0.5, concurrency=8)
        assert seconds_to_fail(ask, "timed out", ["x"] * 8) < 8


@pytest.mark.parametrize(
    "header", [f"Content-Length: {3 << 30}", "X: y", "Transfer-Encoding: chunked"]
)
def test_an_endless_body_is_cut_at_the_bound(monkeypatch, header):
    """The stream has no end; the most that is held of it is about the bound."""
    monkeypatch.setattr(endpoint, "MAX_BODY", 1 << 20)
    sent = []

    def answer(connection, request):
        connection.sendall(OK + header.encode() + b"\r\n\r\n")
        piece = b" " * 65536
        if "chunked" in header:
            piece = b"10000\r\n" + piece + b"\r\n"
        for _ in range(4096):  # 256 MiB at most, should the bound fail
            connection.sendall(piece)
            sent.append(len(piece))

    with raw_server(answer) as url:
        tracemalloc.start()
        try:
            took = seconds_to_fail(make(url, timeout=60.0), "more than 1048576 bytes")
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
    assert took < 30
    assert sum(sent) < 64 << 20
    assert 1 << 20 <= MAX_BODY <= 64 << 20  # the bound as shipped


def answer_with(status, body, reason="Reason"):
    def answer(connection, request):
        line = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(line.encode("latin-1") + body)

    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"choices": [{"message": {"content": ' + b"[" * 900 + b"]" * 900 + b"}}]}",
    ],
)
def test_deep_json_is_a_judges_error(body):
    with raw_server(answer_with(200, body)) as url:
        seconds_to_fail(make(url), r"judge at http.*(no choices|expected text)")


def shown_everywhere(error):
    """The message and the whole traceback of an error, as a user may see them."""
    return str(error) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize("status", [200, 307, 400, 401, 429, 500])
@pytest.mark.parametrize("form", ["plain", "json", "late"])
def test_an_echoed_key_is_in_no_message(status, form):
    def answer(connection, request):
        echoed = next(line for line in request.splitlines() if line.startswith("Authorization"))
        assert KEY in echoed
        if form == "json":
            echoed = json.dumps({"headers": echoed})
        if form == "late":  # the cut after 300 characters falls into the key
            echoed = "y" * (300 - len("Authorization: Bearer ") - 8) + echoed
        answer_with(status, echoed.encode(), reason=f"no {KEY}")(connection, request)

    with raw_server(answer) as url, pytest.raises(JudgeError) as error:
        list(make(url, KEY)(["x"]))
    text = shown_everywhere(error.value)
    assert f"judge at {url}" in text
    for form_of_key in (KEY, json.dumps(KEY)[1:-1], 'sk-"q'):
        assert form_of_key not in text
    assert "<key>" in text or form == "late"


def test_a_status_line_that_echoes_the_key_does_not_show_it():
    def answer(connection, request):
        connection.sendall(f"Bearer {KEY}\r\n\r\n".encode())

    with raw_server(answer) as url, pytest.raises(JudgeError, match="BadStatusLine") as error:
        list(make(url, KEY)(["x"]))
    assert KEY not in shown_everywhere(error.value)


def test_secrets_that_no_request_can_hold_are_refused_unseen():
    for key in ("hidden\n", "hid\u2028den", "clé"):
        with pytest.raises(ValueError, match="not printable ASCII") as error:
            make("http://127.0.0.1:9/v1", key)
        assert key.strip() not in str(error.value)
    with pytest.raises(ValueError, match="user or password, got one for host 'h'") as error:
        make("http://me:hidden@h/v1")
    assert "hidden" not in str(error.value)


def test_close_frees_whoever_waits():
    release = threading.Event()

    def answer(connection, request):
        release.wait(30)

    with raw_server(answer) as url:
        ask = make(url, timeout=60.0)
        judge = ModelJudge(ask)
        errors = []

        def wait():
            try:
                judge.entails([("a", "b"), ("c", "d")])
            except JudgeError as error:
                errors.append(str(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
        judge.close()
        waiting.join(5)
        assert not waiting.is_alive()
        assert errors == [f"judge at {url}: closed before it replied"]
        assert seconds_to_fail(ask, "closed before it replied") < 5
        release.set()


def test_close_goes_through_the_record(tmp_path):
    closed = []

    class Ask:
        def __call__(self, prompts):
            return prompts

        def close(self):
            closed.append(True)

    ModelJudge(Recorded(Ask(), "m", tmp_path / "r.jsonl")).close()
    ModelJudge(Recorded(None, "m", tmp_path / "r.jsonl")).close()
    ModelJudge(lambda prompts: prompts).close()
    assert closed == [True]


CLIENT = """
import signal, sys
# A parent in the background of a shell leaves SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from concurrent.futures import ThreadPoolExecutor
from vcr1_fast.rewards.endpoint import Endpoint
from vcr1_fast.rewards.judge import JudgeConfig
ask = Endpoint(JudgeConfig(kind="http", model="m", url=sys.argv[1], timeout=60.0))
try:
    print("asks", flush=True)
    if sys.argv[2] == "pool":
        pool = ThreadPoolExecutor(1)
        pool.submit(lambda: list(ask(["x"] * 40))).result()
    list(ask(["x"] * 40))
except KeyboardInterrupt:
    if sys.argv[2] == "pool":
        ask.close()
        pool.shutdown(wait=False)
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("where", ["main", "pool"])
def test_ctrl_c_ends_the_process_at_once(where):
    """A dripping server holds 16 requests; the interpreter joins none of their threads."""
    with raw_server(drip(OK + b"Content-Length: 100000\r\n\r\n", b" ")) as url:
        command = [sys.executable, "-c", CLIENT, url, where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "asks\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            start = time.perf_counter()
            try:
                code = process.wait(20)
            finally:
                process.kill()
            assert time.perf_counter() - start < 10  # 60 s is one request's time-out
            assert (code, process.stdout.read()) == (130, "interrupted\n")
