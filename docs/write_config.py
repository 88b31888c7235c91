"""Write docs/config.md from the settings that the code declares: `python docs/write_config.py`."""

from pathlib import Path

from vcr1_fast.cli import SETTINGS, settings_of
from vcr1_fast.config.settings import page

PAGE = Path(__file__).parent / "config.md"
_HEAD = """<!-- Written by `make docs` from the docstrings of the settings: change those. -->
# Settings

A command takes settings from the YAML file of `--config` and from `section.field=value` arguments,
which override the file; the last one wins. `vcr1 COMMAND --help` lists them too. A value is YAML:
`null`, `true`, `1e-6`, `[a, b]`. A setting that is unknown or impossible is an error that names it.
"""


def text() -> str:
    """The whole page. Commands with the same settings share a chapter."""
    chapters: dict[type, list[str]] = {}
    for command in SETTINGS:
        chapters.setdefault(settings_of(command), []).append(f"`vcr1 {command}`")
    parts = [f"## {', '.join(commands)}\n\n{page(cls)}" for cls, commands in chapters.items()]
    return "\n".join([_HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
