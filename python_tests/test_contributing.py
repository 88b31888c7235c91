"""The contributor's kit: lists of files, make targets, hooks, version and changelog agree."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fake_family
import pytest
import yaml

import vcr1_fast
from vcr1_fast.ops.backend import native
from vcr1_fast.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```paths (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
LISTS = {name: body.split() for name, body in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())}


def read(path):
    return (ROOT / path).read_text()


def matches(pattern, root=ROOT):
    """Files that have the form of a path, in which <...> stands for any name."""
    return sorted(root.glob(re.sub(r"<\w+>", "*", pattern)))


def test_the_four_lists_are_there_and_small():
    assert sorted(LISTS) == ["family", "op", "reward", "task"]
    most = {"reward": 2, "task": 2, "op": 10, "family": 1}
    assert all(0 < len(paths) <= most[name] for name, paths in LISTS.items())


@pytest.mark.parametrize("path", [path for paths in LISTS.values() for path in paths])
def test_every_listed_path_has_files(path):
    assert matches(path), f"CONTRIBUTING.md lists {path}: no such file"


def test_an_ops_list_fits_ops_that_exist():
    """At least three ops have a file at every place of the list, under one stem."""
    places = [path for path in LISTS["op"] if "<name>" in path]
    stems = [
        {re.fullmatch(re.escape(p).replace("<name>", r"(\w+)"), str(f.relative_to(ROOT)))[1]
         for f in matches(p)}
        for p in places
    ]  # fmt: skip
    assert len(places) >= 4
    assert len(set.intersection(*stems)) >= 3, stems


def test_a_tasks_file_is_its_registration():
    """Each file that defines a TASK is a registered task under the file's name."""
    files = (ROOT / "vcr1_fast/tasks").glob("*.py")
    names = {f.stem for f in files if re.search(r"^TASK\b", f.read_text(), re.MULTILINE)}
    assert len(names) > 10
    assert names <= set(TASKS)


def test_paths_are_matched_by_form(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    assert matches("a/<name>.py", tmp_path) and matches("a/b.py", tmp_path)
    assert not matches("a/c.py", tmp_path) and not matches("<x>/<y>.cu", tmp_path)


def test_no_file_outside_the_list_names_an_op():
    """Folders of sources hold no second list of ops: only headers, and ops built on others, name
    one outside its own files."""
    own = {"csrc/iou.h"}  # arithmetic that the CPU and CUDA files share
    listed = {path.replace("<name>", "iou") for path in LISTS["op"]} | own
    named = re.compile(r"\b\w*_iou\b|\biou\.(?:cpp|cu|h|py)\b")
    places = [ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / "vcr1_fast/_C.pyi"]
    for folder in ("csrc", "vcr1_fast/ops", "benches"):
        places += [f for f in (ROOT / folder).rglob("*") if f.suffix in CODE]
    found = {str(f.relative_to(ROOT)) for f in places if named.search(f.read_text())}
    # CMake compiles iou's files without fused multiply-adds; the harness shows one as an example.
    found -= {"CMakeLists.txt", "benches/harness.py"}
    assert found <= listed, sorted(found - listed)
    assert {"csrc/kernels.h", "vcr1_fast/ops/iou.py"} <= found  # the search finds what it is for


# --- each list is enough: exactly its files are added to a copy of the package, which then trains

BREVITY = '''"""A reward for short answers."""


def brevity(predictions, records, durations):
    return [1.0 / (1 + len(one or "")) for one in predictions]
'''

TRAIN_ONE_STEP = """
import sys
# The finder of an editable install would import the package that the copy was made from.
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
import json
from pathlib import Path

from tiny_run import configure, write_inputs
from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.train.loop import train

folder, addition = Path(sys.argv[1]), sys.argv[2]
model, path = write_inputs(folder)
records = load_records(path)
if addition == "task":
    clips = sorted({record.video for record in records})
    records = [Record(c, "direction", c, {"thing": "circle"}, "left") for c in clips]
if addition == "reward":
    records = [record for record in records if record.task == "multiple_choice"]
if addition == "family":
    import fake_family
    from vcr1_fast.model.family import family_named
    from test_family import SIZES
    model = folder / "fake"
    fake_family.write_checkpoint(family_named("fake_vl"), model, ["When?"], **SIZES)
write_records(folder / "own.jsonl", records)
# A random model's answers all score 0: a reward of the text gives the step a gradient.
effort = f"rewards.functions=['{sys.argv[3]}:effort']"
train(configure(model, folder / "own.jsonl", folder / "run", "optim.steps=1", effort))
"""


def edited(path, *changes):
    """Text of a file after (old, new) changes, each of one place."""
    text = read(path)
    for old, new in changes:
        assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    return text


def toy_task():
    """The task of `toy_task.py` as a file of the package."""
    text = (ROOT / "python_tests/toy_task.py").read_text()
    outside = "from vcr1_fast.tasks import FieldError, Record, Task, ask\n"
    inside = (
        "from vcr1_fast.tasks.base import Task\n"
        "from vcr1_fast.tasks.prompt_template import ask\n"
        "from vcr1_fast.tasks.record import FieldError, Record\n"
    )
    assert outside in text
    return text.replace(outside, inside)


TASK_LIST = "vcr1_fast/tasks/__init__.py"
CHOICE = "vcr1_fast/tasks/multiple_choice.py"


def additions(name):
    """path -> text of what a contributor writes."""
    if name == "task":
        text = edited(
            TASK_LIST,
            (
                "    classification,\n    grounded_qa,",
                "    classification, direction, grounded_qa,",
            ),
            ("        open_ended,\n    )", "        open_ended,\n        direction,\n    )"),
        )
        return {"vcr1_fast/tasks/direction.py": toy_task(), TASK_LIST: text}
    if name == "reward":
        term = "from vcr1_fast.rewards.brevity import brevity\n"
        text = edited(
            CHOICE,
            ("from vcr1_fast.tasks import blind\n", term + "from vcr1_fast.tasks import blind\n"),
            ("accuracy_reward},", 'accuracy_reward, "brevity": brevity},'),
        )
        return {"vcr1_fast/rewards/brevity.py": BREVITY, CHOICE: text}
    return {"vcr1_fast/model/fake_vl/__init__.py": fake_family.SOURCE}


ADDITIONS = {
    # name -> (what the placeholders of the list stand for, columns of the step's row)
    "task": ({"name": "direction"}, {"reward/direction/way", "metric/direction/accuracy"}),
    "reward": (
        {"name": "brevity", "task": "multiple_choice"},
        {"reward/multiple_choice/brevity", "reward/multiple_choice/accuracy"},
    ),
    "family": ({"family": "fake_vl"}, {"reward/temporal_grounding/iou"}),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_a_list_is_all_that_an_addition_touches(name, tmp_path):
    stands_for, columns = ADDITIONS[name]
    files = additions(name)
    listed = [re.sub(r"<(\w+)>", lambda m: stands_for[m[1]], path) for path in LISTS[name]]
    assert all(any(Path(f).match(path) for path in listed) for f in files), (files.keys(), listed)
    assert all(any(Path(f).match(path) for f in files) for path in listed), (files.keys(), listed)
    shutil.copytree(
        ROOT / "vcr1_fast", tmp_path / "vcr1_fast", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path, text in files.items():
        target = tmp_path / path
        target.parent.mkdir(exist_ok=True)
        assert not target.exists() or target.read_text() != text
        target.write_text(text)
    (tmp_path / "train_one_step.py").write_text(TRAIN_ONE_STEP)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "python_tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "VCR1_NATIVE": native.__file__}
    done = subprocess.run(
        [sys.executable, "train_one_step.py", "work", name, ROOT / "python_tests/toy_task.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = (tmp_path / "work/run/metrics.jsonl").read_text().splitlines()
    step = json.loads(row)
    assert columns <= step.keys(), sorted(step)
    assert step["grad_norm"] > 0 and step["skipped_updates"] == 0


# --- the same targets everywhere


def workflow_commands():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def targets(commands):
    found = [re.fullmatch(r"make ([a-z-]+)(?: ARGS=\S+)?", command) for command in commands]
    assert all(found), f"not one make target: {commands}"
    return {match[1] for match in found}


def test_ci_calls_the_same_make_targets_everywhere():
    makefile = read("Makefile")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    rules = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    assert phony <= rules
    local = targets([line for line in read(".ci/run").splitlines() if line.startswith("make")])
    hosted = targets(workflow_commands())
    nvcc = {"cuda-check"}  # GitHub's runners have none
    assert local == {"lint", "test", "test-engines"} | nvcc
    assert hosted == local - nvcc | {"demo", "docs-site"}
    assert hosted <= phony
    assert set(re.findall(r"`make (\w+)", read("CONTRIBUTING.md"))) <= phony
    assert set(re.findall(r"^    make (\w+)", read("CONTRIBUTING.md"), re.MULTILINE)) <= phony


def test_the_workflow_uses_no_third_party_actions():
    used = re.findall(r"uses: (\S+)", read(".github/workflows/ci.yml"))
    assert used and all(name.startswith("actions/") for name in used)


def test_hooks_run_the_tools_of_make_lint():
    makefile = read("Makefile")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    for tool in ("ruff check", "ruff format", "clang-format", "codespell", "mypy"):
        assert f"$(VENV)/bin/{tool}" in lint, tool
    config = yaml.safe_load(read(".pre-commit-config.yaml"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["name"] for hook in hooks} == {
        "ruff check", "ruff format", "clang-format", "codespell"
    }  # fmt: skip
    for hook in hooks:
        assert hook["entry"].startswith(f".venv/bin/{hook['name']}")
    (native,) = (hook["files"] for hook in hooks if hook["id"] == "clang-format")
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    sources = [str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.suffix in suffixes]
    assert sources and all(re.search(native, path) for path in sources)


def test_tools_of_make_lint_are_pinned():
    pins = {line.partition("==")[0] for line in read("constraints.txt").split()}
    assert {"ruff", "clang-format", "codespell", "mypy", "types-PyYAML"} <= pins


# --- one version


def test_the_version_is_in_one_place():
    pyproject = read("pyproject.toml")
    assert 'dynamic = ["version"]' in pyproject
    assert not re.search(r"^version =", pyproject, re.MULTILINE)
    assert re.search(r"^project\(vcr1_fast LANGUAGES", read("CMakeLists.txt"), re.MULTILINE)
    assert metadata.version("vcr1_fast") == vcr1_fast.__version__


def test_the_build_reads_the_version():
    """As the build's provider reads it, which is no import of the package."""
    regex = pytest.importorskip("scikit_build_core.metadata.regex")
    (table,) = re.findall(
        r"^\[\[tool\.dynamic-metadata\]\]\n(.*?)\n\n", read("pyproject.toml"), re.DOTALL | re.M
    )
    settings = dict(re.findall(r'^(\w+) = "(.*)"$', table, re.MULTILINE))
    assert settings.pop("field") == "version"
    assert settings.pop("provider") == regex.__name__
    path = ROOT / settings.pop("input")
    assert settings == {}
    found = regex.dynamic_metadata("version", {"input": str(path)})
    assert found == vcr1_fast.__version__


def test_the_changelog_knows_the_version():
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.M)
    assert heads[0] == ("Unreleased", "")
    assert heads[1][0] == vcr1_fast.__version__
    assert all(date for _, date in heads[1:])


def test_the_package_ships_its_types():
    assert (ROOT / "vcr1_fast" / "py.typed").is_file()
    assert (ROOT / "vcr1_fast" / "_C.pyi").is_file()
