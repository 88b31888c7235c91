"""Progress: one bar on a terminal, a few plain lines elsewhere."""

import io

import pytest

from vcr1_fast import progress
from vcr1_fast.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_on_a_pipe_is_a_few_plain_lines(clock):
    stream = io.StringIO()
    with Progress(100, "clips", stream) as shown:
        for _ in range(50):
            clock[0] += 0.5
            shown.advance(2)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "clips: 40/100, 0:15 left",
        "clips: 80/100, 0:05 left",
        "clips: 100/100 in 0:25",
    ]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(4, "clips", stream) as shown:
        for _ in range(2):
            shown.advance()
    text = stream.getvalue()
    assert "clips" in text and "2/4" in text and text.count("\n") == 1
    with Progress(0, "clips", io.StringIO()) as shown:
        shown.advance(0)
