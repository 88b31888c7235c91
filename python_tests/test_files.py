"""Files on disk: whole at every moment, and JSON Lines whose torn ends lose nothing."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from vcr1_fast import files
from vcr1_fast.files import (
    append_jsonl,
    json_line,
    read_jsonl,
    read_lines,
    rename_flushed,
    replacing,
    write_atomic,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "file.txt"
    write_atomic(path, "old\u00e9")
    assert path.read_bytes() == "old\u00e9".encode()
    with pytest.raises(RuntimeError), replacing(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".txt"
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old\u00e9"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, move = os.fsync, os.replace

    def flushed(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def moved(source, target):
        events.append("rename")
        move(source, target)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", moved)
    path = tmp_path / "x.json"
    write_atomic(path, b"1")
    assert events == [str(tmp_path / f".x.{os.getpid()}.json"), "rename", str(tmp_path)]


def test_a_folder_takes_the_place_of_another(tmp_path):
    new, path = tmp_path / "new", tmp_path / "model"
    for folder, text in ((path, "old"), (new, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    (path / "stale").write_text("old")
    rename_flushed(new, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert [(file.name, file.read_text()) for file in path.iterdir()] == [("weights", "new")]


REWRITE = """
import sys
from vcr1_fast.files import write_atomic
for i in range(10**9):
    write_atomic(sys.argv[1], str(i % 10) * 300_000)
    print(i, flush=True)
"""


def test_a_kill_leaves_one_of_the_contents_whole(tmp_path):
    path = tmp_path / "file"
    for turn in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", REWRITE, str(path)], stdout=subprocess.PIPE, text=True
        )
        child.stdout.readline()
        time.sleep(0.02 * turn)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        content = path.read_text()
        assert len(content) == 300_000 and len(set(content)) == 1


@pytest.mark.parametrize("tail", ['{"a": 3', '{"a": 3}', "\xff"])
@pytest.mark.parametrize("torn", ["refuse", "skip", "cut"])
def test_a_torn_end(tmp_path, tail, torn):
    path = tmp_path / "rows.jsonl"
    whole = b'{"a": 1}\n\n{"a": 2}\n'
    path.write_bytes(whole + tail.encode("latin-1"))
    expected = [(1, {"a": 1}), (3, {"a": 2})]
    if torn == "cut":
        assert read_jsonl(path, torn=torn) == expected
        assert path.read_bytes() == whole
        append_jsonl(path, [{"a": 4}], fsync=True)
        assert read_jsonl(path) == [*expected, (4, {"a": 4})]
        return
    if tail == '{"a": 3}':  # a file written elsewhere may end without a newline
        expected.append((4, {"a": 3}))
    elif torn == "refuse":
        with pytest.raises(ValueError, match=re.escape(f"{path}:4: not JSON")):
            read_jsonl(path)
        return
    assert read_jsonl(path, torn=torn) == expected
    assert path.read_bytes() == whole + tail.encode("latin-1")


@pytest.mark.parametrize("torn", ["refuse", "skip", "cut"])
@pytest.mark.parametrize("line", ["{oops", "[1]", "[" * 100_000])
def test_a_bad_line_that_is_whole_is_never_passed_over(tmp_path, torn, line):
    path = tmp_path / "rows.jsonl"
    content = f'{{"a": 1}}\n{line}\n{{"a": 2}}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")):
        read_jsonl(path, torn=torn)
    assert path.read_text() == content


def test_lines_hold_what_json_can(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "caf\u00e9\u2028"}, {"text": "half \ud83d"}, {"n": 1.5}]
    append_jsonl(path, rows)
    assert [row for _, row in read_jsonl(path)] == rows
    assert "caf\u00e9" in path.read_text(encoding="utf-8")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            json_line({"x": bad})
    assert [number for number, _ in read_lines(path)] == [1, 2, 3]


def _append(path, letter):
    for _ in range(40):
        append_jsonl(path, [{"letter": letter * 3000}] * 5)


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(path, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = [json.loads(line)["letter"] for line in path.read_text().splitlines()]
    assert len(rows) == 600
    assert {row for row in rows} == {letter * 3000 for letter in "abc"}
