"""Synthetic data sets: drawn scenes as real H.264 files, with the records that ask about them.

Everything follows from the seed. Each clip has its own random stream, named by (seed, split, clip
number), so a data set does not depend on the number of workers, a longer one begins with a shorter
one's clips, and no two splits share a scene.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.data.scenes import (
    SceneConfig,
    describe,
    questions,
    render,
    sample_scene,
    track_times,
)
from vcr1_fast.data.workers import WorkerPool
from vcr1_fast.files import replacing, write_atomic
from vcr1_fast.progress import Progress

SPLITS = ("train", "val", "test")  # a split's place here is part of its seed: append only
TASKS = (
    "temporal_grounding",
    "tracking",
    "grounded_qa",
    "multiple_choice",
    "classification",
    "caption",
)


@dataclass(frozen=True)
class SynthConfig:
    """Clips per split, the seed, the appearance of scenes, and which tasks are asked about them.

    Every question on a scene whose task is in `tasks` becomes a record.
    """

    train: int = 200
    """Clips of the training split; 0: no such split."""
    val: int = 20
    """Clips of the validation split; 0: no such split."""
    test: int = 50
    """Clips of the test split; 0: no such split."""
    seed: int = 0
    """Seed from which all scenes and questions follow."""
    scene: SceneConfig = field(default_factory=SceneConfig)
    tasks: tuple[str, ...] = TASKS
    """Tasks whose questions become records."""
    workers: int = 2
    """Processes that encode clips; 0 encodes in the main process."""
    crf: int = 23
    """x264's constant rate factor, 0 to 51; lower is better."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ValueError(f"{split} must not be negative, got {getattr(self, split)}")
        if self.seed < 0 or self.workers < 0:
            raise ValueError(f"expected seed, workers >= 0, got {self.seed} and {self.workers}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf must lie in 0..51, got {self.crf}")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"expected tasks out of {', '.join(TASKS)}, got {self.tasks}")


def write_dataset(
    out_dir: str | os.PathLike[str], config: SynthConfig | None = None
) -> dict[str, Path]:
    """Write `out_dir`/<split>/videos/*.mp4 and `out_dir`/<split>/records.jsonl; split -> JSONL.

    Splits of no clips are left out. Files appear whole, a split's JSONL after its clips;
    `out_dir`/synth.json keeps the configuration. Progress goes to stderr.
    """
    config, out_dir = config or SynthConfig(), Path(out_dir)
    written = {}
    for split in SPLITS:
        if getattr(config, split):
            written[split] = write_split(out_dir / split, split, config)
    settings = dataclasses.asdict(config)
    del settings["workers"]  # it changes nothing in the data
    write_atomic(out_dir / "synth.json", json.dumps(settings, indent=1) + "\n")
    return written


def write_split(folder: str | os.PathLike[str], split: str, config: SynthConfig) -> Path:
    """Write the clips and the records of one split into `folder`; the path of its records.jsonl."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    folder, total = Path(folder), getattr(config, split)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    jobs = [_Job(str(folder), split, number, config) for number in range(total)]
    records: list[Record] = []
    pool = WorkerPool(_write_clip, workers=min(config.workers, total))
    try:
        with Progress(total, f"{split} clips") as progress:
            for _, result in pool.map(jobs):
                if isinstance(result, Exception):
                    raise result
                records.extend(result)
                progress.advance()
    finally:
        pool.close()
    path = folder / "records.jsonl"
    write_records(path, records)
    return path


def write_video(
    path: str | os.PathLike[str], frames: np.ndarray, fps: float, *, crf: int = 23
) -> None:
    """Encode (T, H, W, 3) uint8 RGB frames to an H.264 mp4 at `fps`; H and W must be even.

    Equal frames give equal files, with the same version of x264. The file appears whole or not at
    all.
    """
    import av

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"expected (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or 0 in frames.shape:
        raise ValueError(f"H.264 needs frames of even height and width, got {frames.shape}")
    with replacing(path) as partial, av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {
            "crf": str(crf),
            "preset": "veryfast",
            "threads": "1",
            # x264's macroblock tree gives other bits from run to run on the same frames.
            "x264-params": "mbtree=0",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@dataclass(frozen=True)
class _Job:
    folder: str
    split: str
    number: int
    config: SynthConfig


def _write_clip(job: _Job) -> list[Record]:
    key = (job.config.seed, SPLITS.index(job.split), job.number)
    drawing, asking = (np.random.default_rng((*key, stream)) for stream in range(2))
    scene = sample_scene(drawing, job.config.scene)
    video = os.path.join(job.folder, "videos", f"{job.number:05}.mp4")
    write_video(video, render(scene), scene.fps, crf=job.config.crf)
    asked = [q for q in questions(scene, asking) if q["task"] in job.config.tasks]
    clip = {"duration": scene.duration, "fps": scene.fps}
    return [
        _record(f"{job.split}-{job.number:05}-{index}", video, question, clip, describe(scene))
        for index, question in enumerate(asked)
    ]


def _record(
    name: str,
    video: str,
    question: Mapping[str, Any],
    clip: dict[str, float],
    scene: dict[str, Any],
) -> Record:
    times = {"times": track_times(**clip)} if question["task"] == "tracking" else {}
    return Record(
        id=name,
        task=question["task"],
        video=video,
        prompt=question["prompt"],
        answer=question["answer"],
        options=tuple(question.get("options", ())),
        boxes=tuple(tuple(box) for box in question.get("boxes", ())),
        metadata={**clip, **times, "scene": scene, **question.get("metadata", {})},
    )
