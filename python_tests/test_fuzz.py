"""The fuzz targets run a few cases, and notice faults; `make fuzz` runs millions."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_texts
import pytest
import torch
from guard_pages import Guarded

from vcr1_fast.ops.backend import native
from vcr1_fast.rewards import answer

CASES = {"parsers": 100, "records": 10, "decoders": 2, "native": 60}


@pytest.mark.parametrize("name", CASES)
def test_a_few_cases_of_each_target(name):
    if name == "native" and native is None:
        pytest.skip("vcr1_fast._C is not built")
    command = [sys.executable, fuzz.__file__, "--target", name, "--cases", str(CASES[name])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", "300"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary[name]["cases"] == CASES[name] <= summary["executions"]


def test_a_case_depends_on_its_seed_and_number_alone():
    seen: list[str] = []

    def target(rng: random.Random) -> int:
        seen.append(fuzz_texts.mutated(rng))
        return 1

    fuzz.run_cases(target, 7, 0, seconds=60, cases=5, state=None)
    fuzz.run_cases(target, 7, 3, seconds=60, cases=2, state=None)
    assert seen[5:] == seen[3:5] and len(set(seen[:5])) > 1


def test_faults_are_findings(monkeypatch):
    monkeypatch.setattr(answer, "parse_span", lambda text: (2.0, 1.0))
    result = fuzz.run_cases(fuzz_texts.parsers, 0, 0, seconds=60, cases=3, state=None)
    assert len(result["findings"]) == 3 and "parse_span" in result["findings"][0]["fault"]


CRASH = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import torch
from guard_pages import Guarded
with Guarded() as memory:
    x = memory.copy(torch.zeros(3), at_end={at_end})
    ctypes.string_at(x.data_ptr() + {offset}, 1)
"""


@pytest.mark.parametrize(("at_end", "offset"), [(True, 12), (False, -1)])
def test_a_read_beside_a_guarded_tensor_ends_the_process(at_end, offset):
    folder = str(Path(__file__).parent)
    program = CRASH.format(folder=folder, at_end=at_end, offset=offset)
    assert subprocess.run([sys.executable, "-c", program]).returncode < 0


def test_a_write_between_tensor_and_guard_page_is_seen():
    import ctypes

    with Guarded() as memory:
        x = memory.copy(torch.arange(6.0).view(2, 3).t(), at_end=True)
        assert torch.equal(x, torch.arange(6.0).view(2, 3).t()) and x.stride() == (1, 3)
        assert not memory.written_outside()
        ctypes.memset(x.data_ptr() - 1, 0, 1)
        assert memory.written_outside()
