"""How a model was trained, written beside its weights: `vcr1.yaml`, which every export holds.

    model/vcr1.yaml         what the model was shown and asked, and where it comes from
    model/vcr1.prompts.yaml its prompt templates, where the run had others than the tasks' own

Evaluation and chat take the former as their defaults: other frames or another prompt make another
question, and nothing in the weights says so.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vcr1_fast
from vcr1_fast.config.loader import plain
from vcr1_fast.config.section import ConfigError
from vcr1_fast.train.config import TrainConfig

FILE = "vcr1.yaml"
PROMPTS = "vcr1.prompts"
SHOWN = ("frames", "think", "system", "media_first", "prompts")
"""Settings of section `data` that decide what a model sees and is asked."""
WRITTEN = ("mrope", "video_text")
"""Settings of section `model` that decide how a prompt's tokens are written and placed."""


@dataclass(frozen=True)
class AsTrained:
    """The settings that a model was trained with, by name as in sections `data` and `model`."""

    folder: Path
    shown: dict[str, Any]
    made: dict[str, Any]
    """Version, commit, kind of run, step, base model, family, data."""

    def within(self, known: frozenset[str]) -> dict[str, Any]:
        """The settings whose names a command has."""
        return {name: value for name, value in self.shown.items() if name in known}

    def text(self) -> str:
        """The settings in words, on one line."""
        frames = self.shown["frames"]
        count = f"{frames['num_frames']} frames"
        if frames["num_frames"] is None:
            count = (
                f"{frames['fps']:g} fps, {frames['min_frames']} to {frames['max_frames']} frames"
            )
        words = [
            "think" if self.shown["think"] else "no think",
            count,
            f"{frames['min_pixels']} to {frames['max_pixels']} pixels",
        ]
        words += [name for name in ("system", "prompts") if self.shown[name] is not None]
        words += ["media first"] if self.shown["media_first"] else []
        return ", ".join(words)

    def differences(self, settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """A line for each setting of a command that differs from the trained one; `prefix` starts
        the names."""
        trained = dict(_leaves(self.shown))
        for name, value in _leaves(plain(dict(settings))):
            if name not in trained or value == trained[name]:
                continue
            if name != "prompts" or not _same_text(value, trained[name]):
                yield f"{prefix}{name} is {_word(value)}, trained with {_word(trained[name])}"


def files(config: TrainConfig, identity: Mapping[str, Any], step: int) -> dict[str, str]:
    """Name and text of the files that describe a model after `step` steps of a run.

    OSError where the file of prompt templates cannot be read.
    """
    data = config.data
    shown = {name: plain(getattr(data, name)) for name in SHOWN}
    shown |= {name: getattr(config.model, name) for name in WRITTEN}
    written: dict[str, str] = {}
    if data.prompts is not None:
        source = Path(data.prompts)
        # A copy: the model must be usable where the run's files are not.
        shown["prompts"] = f"{PROMPTS}{source.suffix or '.yaml'}"
        written[shown["prompts"]] = source.read_text(encoding="utf-8")
    description = {
        "vcr1_fast": vcr1_fast.__version__,
        "commit": commit(),
        "kind": identity.get("kind of run"),
        "step": step,
        "base": config.model.path,
        "adapter": config.model.adapter,
        "data": {
            "records": data.train,
            "number": identity.get("number of records in data.train"),
            "sha256": identity.get("content of data.train"),
        },
        "shown": shown,
    }
    written[FILE] = (
        "# How this model was trained; vcr1 eval and vcr1 chat take `shown` as their defaults.\n"
        + yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    )
    return written


def read(folder: str | Path) -> AsTrained | None:
    """The description in a model's folder; None where it has none, and for a hub name.

    ConfigError, naming the file, for one that is not such a description.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
        shown = made.pop("shown")
        missing = {*SHOWN, *WRITTEN} - set(shown)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(str(path), f"not the description of a model ({error})") from None
    if missing:
        raise ConfigError(str(path), f"lacks {', '.join(sorted(missing))} in `shown`")
    if shown["prompts"] is not None:
        shown["prompts"] = str(folder / shown["prompts"])
    return AsTrained(folder, shown, made)


def commit() -> str | None:
    """The commit of the checkout that the package runs from, None for an installed one."""
    root = Path(vcr1_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _same_text(one: str | None, other: str | None) -> bool:
    # The run's file of prompts and the copy beside the model are the same prompts.
    return None not in (one, other) and Path(str(one)).read_text() == Path(str(other)).read_text()


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
