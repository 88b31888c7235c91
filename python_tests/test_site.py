"""The documentation as a site: every page is in it, and its quick start would be taken."""

import re
import shlex
from pathlib import Path

import yaml

from vcr1_fast import cli
from vcr1_fast.config.settings import sections

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs/index.md").read_text()


def pages(nav):
    for entry in nav:
        value = next(iter(entry.values()))
        yield from pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = sorted(pages(site["nav"]))
    assert listed == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert site["strict"] is True and site["theme"]["name"] == "mkdocs"


def test_the_quick_start_is_taken():
    commands = [
        line.partition("  #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", INDEX, re.DOTALL)
        for line in block.splitlines()
    ]
    commands += re.findall(r"`(vcr1 [^`]+)`", INDEX)
    taken = [command for command in commands if command.startswith("vcr1 ")]
    assert len(taken) >= 12
    for command in taken:
        words = shlex.split(command.partition(" > ")[0])[1:]
        assert cli.parse(words).command == words[0]


def test_the_settings_that_it_names_exist():
    found = sections(cli.settings_of("train"))
    known = {setting.name for section in found for setting in section.settings}
    named = set(re.findall(r"\b((?:run|data|model|optim)\.[a-z_]+)=", INDEX))
    assert len(named) >= 7 and named <= known
