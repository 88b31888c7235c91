"""Experiment trackers (TensorBoard, Weights & Biases, ...), through accelerate's classes for them.

metrics.jsonl is the record of a run; a tracker is a copy of it. One that is not installed or cannot
start is an error before the run; one that fails during the run is dropped, and the run goes on.

Metrics are grouped by what they are about: `reward/`, `metric/`, `val/`, `rollout/` (what was
sampled), `train/` (the update), `speed/` (time and memory). Tables of samples hold the completions
with the lowest rewards, with their film strips.
"""

from __future__ import annotations

import importlib
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcr1_fast.files import write_atomic

if TYPE_CHECKING:
    from vcr1_fast.data.video import Clip

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
}
"""Tracker -> the package that pip installs, whose module has the tracker's name."""
STATE = "trackers.json"
"""File in a run's folder: the names under which trackers know the run, to go on under them."""
SAMPLES = 4
"""Completions in a table of samples."""
STRIP_HEIGHT = 96
"""Pixels of a film strip's frames."""
CAPTION_HEIGHT = 16
"""Pixels of the line of seconds above them."""


@dataclass(frozen=True)
class TrackedSample:
    """A completion as a row of a tracker's table; `strip` (H, W, 3) uint8 shows the clip."""

    record: str
    task: str
    prompt: str
    target: str
    completion: str
    reward: float
    rewards: dict[str, float]
    advantage: float
    strip: np.ndarray

    def cells(self, image: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """Cell by column; `image` makes the tracker's own kind of picture."""
        cells = {name: value for name, value in vars(self).items() if name != "strip"}
        return {**cells, "rewards": json.dumps(self.rewards), "frames": image(self.strip)}

    def text(self) -> str:
        """The row as Markdown. Model text is indented: it could hold any other mark."""
        parts = [f"{self.task} {self.record}: reward {self.reward:.4g}, {json.dumps(self.rewards)}"]
        for name in ("prompt", "target", "completion"):
            lines = getattr(self, name).splitlines() or [""]
            parts.append(f"{name}:\n\n" + "\n".join(f"    {line}" for line in lines))
        return "\n\n".join(parts)


def check_installed(names: Sequence[str]) -> None:
    """ValueError, naming the package that pip installs, for a tracker that is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"run.trackers: {name} is not installed ({error}); pip install {PACKAGES[name]}"
            ) from error


def installed_default() -> tuple[str, ...]:
    """TensorBoard where it is installed, else no tracker."""
    try:
        check_installed(["tensorboard"])
    except ValueError:
        return ()
    return ("tensorboard",)


class Trackers:
    """The trackers of a run, which go on after step `done` where a former process ended.

    settings: the run's settings by dotted name; `log` receives a line for a tracker that fails.
    Open it in the run's first process alone. ValueError names a tracker that cannot start.
    """

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        done: int,
        settings: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.log_line = log
        self._trackers: dict[str, Any] = {}
        if not names:
            return
        state = read_state(output)
        for name in names:
            known = state.get(name)
            try:
                tracker = _tracker(name, output, done, state, str(settings.get("run.project")))
                # TensorBoard's page of parameters would show a resumed run as two.
                if name == "tensorboard":
                    tracker.log({"settings": f"    {json.dumps(dict(settings))}"}, step=done)
                elif known is None:  # a tracker may refuse settings that differ from the first ones
                    tracker.store_init_configuration(dict(settings))
            except Exception as error:  # each tracker has errors of other classes
                self.close()
                line = str(error).partition("\n")[0]
                raise ValueError(f"run.trackers: {name} cannot start: {line}") from error
            self._trackers[name] = tracker
        write_atomic(output / STATE, json.dumps(state, indent=1) + "\n")

    @property
    def are_open(self) -> bool:
        """Whether any tracker still takes what it is given."""
        return bool(self._trackers)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """The metrics of a step. Numbers that are not finite are left out."""
        values = {
            tag(name): value
            for name, value in row.items()
            if isinstance(value, int | float) and math.isfinite(value) and name not in UNTRACKED
        }
        if values:
            self._each("log", lambda name, tracker: tracker.log(values, step=step))

    def samples(self, step: int, samples: Sequence[TrackedSample]) -> None:
        """Tables of completions, with pictures."""
        if samples:
            self._each("log samples", partial(_log_samples, step=step, samples=samples))

    def close(self) -> None:
        """Finish all trackers: what they hold is sent."""
        self._each("finish", lambda name, tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, what: str, act: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:  # whatever it is, it must not cost the run
                # Dropped, so that it is said once and a server that is away is not waited for
                # at every step.
                del self._trackers[name]
                line = str(error).partition("\n")[0]
                self.log_line(
                    f"warning: {name} could not {what} ({type(error).__name__}: {line}); it gets "
                    "nothing more of this run, metrics.jsonl has it all"
                )


UNTRACKED = frozenset({"step", "time"})
"""Columns of metrics.jsonl that every tracker has itself."""
_SPEED = ("tokens_per_second", "seconds", "memory_gib")
_ROLLOUT = ("length", "finished", "quarantined", "zero_advantage_groups", "skipped_groups")


def tag(name: str) -> str:
    """A metric's name with its group in front: `loss` -> `train/loss`."""
    first, _, rest = name.partition("/")
    if first in ("metric", "val"):
        return name
    if first == "reward":
        return name if rest else "reward/mean"
    if name == "reward_spread":
        return "reward/spread"
    for group, names in (("speed", _SPEED), ("rollout", _ROLLOUT)):
        if first in names:
            return f"{group}/{name}"
    return f"train/{name}"


def read_state(output: Path) -> dict[str, str]:
    """Names under which trackers know a run; a new run gets one that no other has."""
    path = output / STATE
    if not path.exists():
        return {"id": uuid.uuid4().hex}
    state: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return state


def worst_samples(
    rows: Sequence[Mapping[str, Any]], clips: Sequence[Clip | None]
) -> list[TrackedSample]:
    """The completions with the lowest rewards, one of a prompt at most. `rows` as in
    rollouts.jsonl, in groups of equal size, with the clip of each group."""
    size = len(rows) // max(len(clips), 1)
    groups = [rows[size * i : size * (i + 1)] for i in range(len(clips))]
    worst = [
        (min(group, key=lambda row: row["reward"]), clip)
        for group, clip in zip(groups, clips, strict=True)
        if clip is not None
    ]
    worst.sort(key=lambda pair: pair[0]["reward"])
    return [
        TrackedSample(
            record=row["id"],
            task=row["task"],
            prompt=row["prompt"],
            target=row["target"] if isinstance(row["target"], str) else json.dumps(row["target"]),
            completion=row["completion"],
            reward=row["reward"],
            rewards=dict(row["rewards"]),
            advantage=row["advantage"],
            strip=film_strip(clip),
        )
        for row, clip in worst[:SAMPLES]
    ]


def film_strip(clip: Clip) -> np.ndarray:
    """A clip's frames side by side, each below its second: (H, W, 3) uint8."""
    from PIL import Image, ImageDraw

    pictures = []
    for frame in clip.frames:
        picture = Image.fromarray(frame)
        width = max(1, round(picture.width * STRIP_HEIGHT / picture.height))
        pictures.append(picture.resize((width, STRIP_HEIGHT)))
    caption = 0 if clip.duration is None else CAPTION_HEIGHT
    strip = Image.new("RGB", (sum(one.width + 2 for one in pictures) - 2, STRIP_HEIGHT + caption))
    draw, left = ImageDraw.Draw(strip), 0
    for second, picture in zip(clip.times, pictures, strict=True):
        strip.paste(picture, (left, caption))
        if caption:
            draw.text((left + 2, 1), f"{second:.1f} s", fill="white")
        left += picture.width + 2
    return np.asarray(strip)


def _tracker(name: str, output: Path, done: int, state: dict[str, str], project: str) -> Any:
    """A started tracker of accelerate's. `state` gains what finds the run again."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = state.get(name)
    where, options = project, dict[str, Any]()
    title, own = output.resolve().name, state["id"]
    match name:
        case "tensorboard":
            # purge_step hides steps that a killed run logged after its last checkpoint.
            where = name
            options = {"logging_dir": str(output), "purge_step": done + 1}
        case "wandb":
            # Steps logged again after a resume are dropped by wandb; they are the same numbers.
            options = {"name": title, "id": own, "resume": "allow", "dir": str(output)}
        case "trackio":  # which knows a run by its name
            options = {"name": f"{title}-{own[:6]}", "resume": "allow"}
        case "mlflow":
            options = {"run_name": title, "run_id": known}
        case "swanlab":
            options = {"experiment_name": title, "id": own, "resume": "allow"}
            options["logdir"] = str(output / "swanlog")
        case _:
            raise ValueError(f"unknown tracker {name!r}, known are {', '.join(PACKAGES)}")
    tracker = LOGGER_TYPE_TO_CLASS[name](where, **options)
    tracker.start()
    state[name] = tracker.tracker.info.run_id if name == "mlflow" else own
    return tracker


def _log_samples(name: str, tracker: Any, *, step: int, samples: Sequence[TrackedSample]) -> None:
    if name == "tensorboard":
        for number, one in enumerate(samples, start=1):
            tracker.log({f"samples/{number}": one.text()}, step=step)
            # One strip at a time: they differ in size.
            tracker.log_images(
                {f"samples/{number}": one.strip[None]}, step=step, dataformats="NHWC"
            )
        return
    package = importlib.import_module(name)
    if name == "swanlab":
        pictures = [package.Image(one.strip, caption=one.text()) for one in samples]
        tracker.log({"samples": pictures}, step=step)
        return
    rows = [{"step": step, **one.cells(package.Image)} for one in samples]
    columns = list(rows[0])
    if name == "mlflow":
        by_column = {column: [row[column] for row in rows] for column in columns}
        package.log_table(by_column, artifact_file="samples.json")
    else:
        data = [list(row.values()) for row in rows]
        tracker.log({"samples": package.Table(columns=columns, data=data)}, step=step)
