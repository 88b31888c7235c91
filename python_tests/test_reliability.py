"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
CITED = re.compile(r"`(test_\w+\.py)`((?:(?:: |, )`(?!test_)\w+`)*)")


def test_every_test_that_the_page_names_exists():
    cited = [
        (file, name) for file, names in CITED.findall(PAGE) for name in re.findall(r"\w+", names)
    ]
    assert len(cited) > 50
    for file, name in cited:
        source = (HERE / file).read_text(encoding="utf-8")
        assert re.search(rf"def test_{name}|def test_\w*{name}", source), f"{file}: {name}"


def test_every_injected_fault_has_its_row():
    assert re.findall(r"^\| F(\d+) ", PAGE, re.MULTILINE) == [str(i) for i in range(1, 16)]
