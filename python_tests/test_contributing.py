"""The contributor's kit: lists of files, make targets, hooks, version and changelog agree."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import vcr1_fast
from vcr1_fast.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```paths (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LISTS = {name: body.split() for name, body in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())}


def read(path):
    return (ROOT / path).read_text()


def matches(pattern, root=ROOT):
    """Files that have the form of a path, in which <...> stands for any name."""
    return sorted(root.glob(re.sub(r"<\w+>", "*", pattern)))


def test_the_four_lists_are_there_and_small():
    assert sorted(LISTS) == ["family", "op", "reward", "task"]
    most = {"reward": 2, "task": 2, "op": 9, "family": 1}
    assert all(0 < len(paths) <= most[name] for name, paths in LISTS.items())


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=pytest.mark.xfail(strict=True, reason="model families have no folder yet")
            if path.startswith("vcr1_fast/model/<family>")
            else (),
        )
        for paths in LISTS.values()
        for path in paths
    ],
)
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
    assert local == {"lint", "test"} | nvcc
    assert hosted == local - nvcc | {"demo"}
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
    sources = [str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.is_file()]
    sources = [path for path in sources if not path.endswith((".py", ".json", ".pyc"))]
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
