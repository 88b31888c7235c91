"""Rewards of a user's own: both forms, where they are found, and what is told when they fail."""

import math
import sys
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
    """Dataclasses look their module up where annotations are texts."""
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
