"""docs/architecture.md: layers as the import test has them, and walks through files that exist."""

import re
from pathlib import Path

import pytest
from test_layout import LAYERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MOST = {"frames": 8, "hidden": 6, "A completion's text": 4, "A setting": 4}
ROW = re.compile(r"^\| (\d+) \| `(\S+)` \| `(\w+)` \| (.+) \|$", re.MULTILINE)


def walk(title):
    """(file, the name that links it) of each step."""
    section = TEXT.split(f"\n### {title}\n", 1)[1].split("\n### ")[0]
    rows = ROW.findall(section)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == section.count("\n| ") - 2, "a row of another form"
    return [(file, name) for _, file, name, _ in rows]


def names(file):
    return set(re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8")))


def missing_links(steps):
    """Steps whose name is not both in the file and in an earlier one (the next one, for the
    first)."""
    found = []
    for i, (file, name) in enumerate(steps):
        others = [other for other, _ in (steps[:i] or steps[1:2])]
        if name not in names(file) or not any(name in names(other) for other in others):
            found.append((file, name))
    return found


@pytest.mark.parametrize("title", MOST)
def test_a_walk_is_short_and_its_files_are_linked(title):
    steps = walk(title)
    assert 3 <= len(steps) <= MOST[title]
    assert len({file for file, _ in steps}) == len(steps)
    assert missing_links(steps) == []


@pytest.mark.parametrize("title", MOST)
def test_a_link_is_defined_in_one_of_the_walks_files_or_what_they_import(title):
    code = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "vcr1_fast").rglob("*.py"))
    for _, name in walk(title):
        assert re.search(rf"^\s*(?:def|class) {name}\b", code, re.MULTILINE), name


def test_a_broken_walk_is_found():
    good = walk("hidden")
    assert missing_links([*good[:2], ("vcr1_fast/files.py", "read_lines")])
    assert missing_links([*good[:2], (good[2][0], "read_lines")])


def test_the_layers_are_those_of_the_import_test():
    block = re.search(r"^```layers\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]
    written = [set(line.split()) for line in block.splitlines()]
    assert written == [*map(set, reversed(LAYERS))]


def test_every_file_and_folder_of_the_page_exists():
    """Those in backticks, and those in the brackets of the picture."""
    picture = " ".join(re.findall(r"\[([^\]]+)\]", TEXT.split("```")[1]))
    found = set(re.findall(r"`([\w/<>]+(?:\.py|/))`", TEXT)) | set(re.split(r",?\s+", picture))
    assert len(found) > 25
    for path in found:
        path = re.sub(r"<\w+>", "*", path)
        options = [
            (place, one) for place in (ROOT, ROOT / "vcr1_fast") for one in (path, f"{path}.py")
        ]
        assert any(any(place.glob(one)) for place, one in options), path
