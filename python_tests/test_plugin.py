"""A user's rewards: both forms, where they are found, and what is reported when they fail."""

import math
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from vcr1_fast.rewards.plugin import load_reward, split_spec

SOURCE = """
def brevity(completion, record, duration):
    return len(completion) / duration

def batch(completions, records, durations):
    assert isinstance(completions, list) and len(completions) == len(records) == len(durations)
    return [float(record.id == "b") for record in records]

def silent(completion, record, duration):
    return None if record.id == "a" else True

def broken(completion, record, duration):
    raise KeyError("colour")

def short(completions, records, durations):
    return [1.0]

def wrong(completion, record, duration):
    return record.value

number = 3
"""
RECORDS = [SimpleNamespace(id=name) for name in "ab"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_a_function_of_one_completion_and_one_of_a_batch(file):
    brevity = load_reward(f"{file}:brevity")
    assert (brevity.name, brevity.takes_lists) == ("brevity", False)
    assert brevity(["ab", "abcd"], RECORDS, [2.0, 4.0]) == [1.0, 1.0]
    batch = load_reward("my_rewards:batch")
    assert batch.takes_lists
    assert batch(["x", "y"], RECORDS, [None, 1.0]) == [0.0, 1.0]


def test_none_is_no_reward_and_other_numbers_become_floats(file):
    assert load_reward(f"{file}:silent")(["x", "y"], RECORDS, [1, 1]) == [None, 1.0]
    record = SimpleNamespace(id="n", value=np.float32(0.5))
    assert load_reward(f"{file}:wrong")(["x"], [record], [1]) == [0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", [1.0], 10**400, b"1"])
def test_what_is_no_finite_number_is_refused(file, value):
    record = SimpleNamespace(id="n7", value=value)
    reward = load_reward(f"{file}:wrong")
    with pytest.raises(ValueError, match=r"my_rewards\.py:wrong: expected a finite .* 'n7'"):
        reward(["x"], [record], [1])


@pytest.mark.parametrize("value", [1e308, -1e200, 1e6 + 1, 10**7])
def test_huge_rewards_are_refused(file, value):
    """Their squares or sums would leave the range of a float: the loss would silently be 0."""
    record = SimpleNamespace(id="n7", value=value)
    with pytest.raises(ValueError, match=r":wrong: expected at most 1e\+06 in .* 'n7', got -?1e"):
        load_reward(f"{file}:wrong")(["x"], [record], [1])


@pytest.mark.parametrize("value", [1e6, -1e6, 1e-300])
def test_the_bound_itself_is_allowed(file, value):
    assert load_reward(f"{file}:wrong")(["x"], [SimpleNamespace(id="a", value=value)], [1]) == [
        value
    ]


HANGS = """
import threading, time
threads = []

def alone(completion, record, duration):
    threads.append(threading.current_thread())
    if completion == "hang":
        time.sleep(60)
    return 0.5

def together(completions, records, durations):
    time.sleep(60 if "hang" in completions else 0)
    return [1.0] * len(completions)

def leave(completion, record, duration):
    raise SystemExit(3)
"""


def test_a_function_that_hangs_is_given_up_and_named(tmp_path):
    path = tmp_path / "hangs.py"
    path.write_text(HANGS)
    start = time.perf_counter()
    alone = load_reward(f"{path}:alone", timeout=0.3)
    with pytest.raises(
        ValueError,
        match=r"hangs\.py:alone: not done after rewards.timeout = 0.3 s, at record 'b', "
        "number 2 of 2 completions",
    ):
        alone(["x", "hang"], RECORDS, [1, 1])
    together = load_reward(f"{path}:together", timeout=0.3)
    with pytest.raises(ValueError, match=r":together: not done after .* at 2 completions"):
        together(["x", "hang"], RECORDS, [1, 1])
    assert time.perf_counter() - start < 20


def test_a_bounded_function_gives_what_an_unbounded_one_gives_from_one_thread(tmp_path, file):
    path = tmp_path / "hangs.py"
    path.write_text(HANGS)
    reward = load_reward(f"{path}:alone", timeout=30.0)
    for _ in range(3):
        assert reward(["x", "y"], RECORDS, [1, 1]) == [0.5, 0.5]
    (thread,) = set(reward.function.__globals__["threads"])
    assert thread.daemon and thread is not threading.current_thread()
    for name in ("brevity", "batch", "silent"):
        spec = f"{file}:{name}"
        arguments = (["x", "y"], RECORDS, [1.0, 2.0])
        assert load_reward(spec, timeout=30.0)(*arguments) == load_reward(spec)(*arguments)
    with pytest.raises(ValueError, match=r":broken failed on record 'a': KeyError"):
        load_reward(f"{file}:broken", timeout=30.0)(["x"], RECORDS[:1], [1])
    with pytest.raises(SystemExit):
        load_reward(f"{path}:leave", timeout=30.0)(["x"], RECORDS[:1], [1])


def test_ctrl_c_ends_a_process_whose_reward_hangs(tmp_path):
    path = tmp_path / "hangs.py"
    path.write_text(HANGS)
    code = (
        "import signal; from vcr1_fast.rewards.plugin import load_reward\n"
        # A parent in the background of a shell leaves SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"reward = load_reward({str(path) + ':together'!r}, timeout=50.0)\n"
        "print('calls', flush=True)\n"
        "reward(['hang'], [None], [1])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "calls\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) in (130, -signal.SIGINT)
        finally:
            process.kill()
        assert "KeyboardInterrupt" in process.stderr.read()


def test_errors_name_the_function(file):
    with pytest.raises(ValueError, match=r":broken failed on record 'a': KeyError: 'colour'"):
        load_reward(f"{file}:broken")(["x"], RECORDS[:1], [1])
    with pytest.raises(ValueError, match=r":short: expected a list of 2 numbers, got \[1\.0\]"):
        load_reward(f"{file}:short")(["x", "y"], RECORDS, [1, 1])
    with pytest.raises(ValueError, match=r":none: .* has no function 'none'"):
        load_reward(f"{file}:none")
    with pytest.raises(ValueError, match="has no function 'number'"):
        load_reward(f"{file}:number")
    with pytest.raises(ValueError, match=r"gone\.py:f: FileNotFoundError: no file"):
        load_reward("gone.py:f")
    with pytest.raises(ValueError, match="no_such_module:f: ModuleNotFoundError"):
        load_reward("no_such_module:f")
    (file.parent / "bad.py").write_text("x = 1 / 0")
    with pytest.raises(ValueError, match=r"bad\.py:f: ZeroDivisionError"):
        load_reward(f"{file.parent / 'bad.py'}:f")


def test_a_file_is_a_module_while_it_runs(tmp_path):
    """Dataclasses find their module where annotations are texts."""
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Weight:\n    value: float = 0.5\n\n"
        "def f(completion, record, duration):\n    return Weight().value\n"
    )
    assert load_reward(f"{path}:f")(["x"], RECORDS[:1], [1]) == [0.5]
    (tmp_path / "breaks.py").write_text("x = 1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_reward(f"{tmp_path / 'breaks.py'}:f")
    assert "vcr1_fast_reward_breaks" not in sys.modules


@pytest.mark.parametrize("spec", ["f", ":f", "a:", "a:b.c", "a:1", ""])
def test_specs_have_one_form(spec):
    with pytest.raises(ValueError, match="expected module:function"):
        split_spec(spec)
