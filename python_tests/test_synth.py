"""Synthetic data sets: real H.264 files whose pixels agree with the records' answers."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from vcr1_fast.data.records import load_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.scenes import COLORS, SceneConfig, render, sample_scene
from vcr1_fast.data.synth import SPLITS, TASKS, SynthConfig, write_dataset, write_video
from vcr1_fast.data.video import BACKENDS, count_frames, probe, read_clip

av = pytest.importorskip("av")

SCENE = SceneConfig(min_seconds=2.0, max_seconds=3.0, fps=(6.0, 10.0))
SMALL = SynthConfig(train=4, val=2, test=2, seed=3, scene=SCENE, workers=0)
EVERY = FrameConfig(fps=1000.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict[str, Path]:
    return write_dataset(tmp_path_factory.mktemp("synth"), SMALL)


def clips_of(path: Path) -> list[Path]:
    return sorted((path.parent / "videos").iterdir())


def test_splits_hold_real_h264_files_and_valid_records(dataset):
    assert set(dataset) == set(SPLITS)
    for split, path in dataset.items():
        clips, records = clips_of(path), load_records(path)
        assert len(clips) == getattr(SMALL, split)
        assert {record.video for record in records} == {str(clip) for clip in clips}
        assert {record.task for record in records} == set(TASKS)
        assert all(record.id.startswith(f"{split}-") for record in records)
        for record in records:
            info = probe(record.video)
            assert info.duration == pytest.approx(record.metadata["duration"])
            assert info.fps == pytest.approx(record.metadata["fps"])
            assert info.frames == round(record.metadata["duration"] * record.metadata["fps"])
        for clip in clips:
            claimed, decoded = count_frames(str(clip))
            assert claimed == decoded > 0
            with av.open(str(clip)) as container:
                assert container.streams.video[0].codec_context.name == "h264"
    every = [record.metadata for path in dataset.values() for record in load_records(path)]
    assert len({clip["fps"] for clip in every}) == 2
    assert len({clip["duration"] for clip in every}) > 1


def is_color(frames: np.ndarray, name: str) -> np.ndarray:
    """(T, H, W): pixels nearer to the colour than to any other, and not far from it."""
    palette = np.array(list(COLORS.values()), np.float64)
    distance = np.linalg.norm(frames[..., None, :].astype(np.float64) - palette, axis=-1)
    place = list(COLORS).index(name)
    return (distance.argmin(-1) == place) & (distance[..., place] < 50)


def test_what_is_asked_can_be_seen(dataset):
    seen = 0
    for path in dataset.values():
        for record in load_records(path):
            if record.task == "temporal_grounding":
                color = re.search("|".join(COLORS), record.prompt["event"]).group()
                clip = read_clip(record.video, EVERY)
                area = is_color(clip.frames, color).mean((1, 2))
                start, end = record.answer
                inside = (clip.times >= start - 1e-6) & (clip.times < end - 1e-6)
                # The mover may cover most of it on its way.
                assert area[inside].min() > 2 * area[~inside].max(initial=0.001)
                assert np.median(area[inside]) > 0.01
                seen += 1
            elif record.task == "tracking":
                color = re.search("|".join(COLORS), record.prompt["object"]).group()
                clip = read_clip(record.video, times=record.metadata["times"])
                assert len(clip.frames) == len(record.answer) == 8
                height, width = clip.frames.shape[1:3]
                for shape, box in zip(is_color(clip.frames, color), record.answer, strict=True):
                    rows, columns = np.nonzero(shape)
                    center = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
                    # A visitor may lie over a part of the mover, which shifts what is left of it.
                    assert abs(np.median(rows) / height - center[0]) < 0.12
                    assert abs(np.median(columns) / width - center[1]) < 0.12
                seen += 1
    assert seen >= 16


def test_equal_seeds_give_equal_data_whatever_the_workers(dataset, tmp_path):
    again = write_dataset(tmp_path, dataclasses.replace(SMALL, workers=2))
    for split, path in dataset.items():
        assert again[split].read_bytes() == path.read_bytes()
        for mine, other in zip(clips_of(path), clips_of(again[split]), strict=True):
            assert mine.read_bytes() == other.read_bytes()
    settings = [
        json.loads((path["train"].parent.parent / "synth.json").read_text())
        for path in (dataset, again)
    ]
    assert settings[0] == settings[1] and settings[0]["seed"] == 3


def scenes_of(path: Path) -> list[str]:
    return [json.dumps(record.metadata["scene"]) for record in load_records(path)]


def test_splits_and_seeds_share_no_scene_and_longer_sets_begin_alike(dataset, tmp_path):
    every = [set(scenes_of(path)) for path in dataset.values()]
    assert len(set.union(*every)) == sum(map(len, every)) == 8
    other = dataclasses.replace(SMALL, train=2, val=0, test=0, seed=8)
    paths = write_dataset(tmp_path / "other", other)
    assert set(paths) == {"train"}
    assert not set(scenes_of(paths["train"])) & set.union(*every)
    paths = write_dataset(tmp_path / "short", dataclasses.replace(other, seed=3))
    rows = dataset["train"].read_text().splitlines()
    short = paths["train"].read_text().splitlines()
    assert 0 < len(short) < len(rows) and short == rows[: len(short)]


def test_tasks_can_be_chosen(tmp_path):
    config = dataclasses.replace(SMALL, train=2, val=0, test=0, tasks=("tracking",))
    records = load_records(write_dataset(tmp_path, config)["train"])
    assert [record.task for record in records] == ["tracking"] * 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"train": -1}, "train"),
        ({"seed": -1}, "seed"),
        ({"workers": -2}, "workers"),
        ({"crf": 52}, "crf"),
        ({"tasks": ("trakcing",)}, "trakcing"),
        ({"tasks": ()}, "tasks"),
    ],
)
def test_impossible_configs_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        SynthConfig(**fields)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_names_its_cause_and_leaves_no_records(tmp_path, workers):
    config = dataclasses.replace(
        SMALL, scene=dataclasses.replace(SCENE, sizes=((57, 57),)), workers=workers
    )
    with pytest.raises(ValueError, match=r"even height and width, got \(\d+, 57, 57, 3\)"):
        write_dataset(tmp_path, config)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_written_video_shows_what_was_drawn(tmp_path):
    scene = sample_scene(np.random.default_rng(3), SCENE)
    frames = render(scene)
    path = tmp_path / "v.mp4"
    write_video(path, frames, scene.fps)
    for backend in BACKENDS:
        clip = read_clip(str(path), EVERY, backend=backend)
        even = len(frames) - len(frames) % 2
        assert len(clip.frames) == even
        if even == len(frames):
            difference = np.abs(clip.frames.astype(int) - frames)
            assert difference.mean() < 8  # half of the colour's resolution is not stored
    with pytest.raises(ValueError, match="uint8"):
        write_video(path, frames.astype(np.float32), 10.0)
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


def test_equal_frames_give_equal_files(tmp_path):
    frames = render(sample_scene(np.random.default_rng((7, 0, 1, 0)), SCENE))
    files = set()
    for size in range(12):
        disturbance = np.ones(1000 * size)  # another state of the memory
        write_video(tmp_path / "v.mp4", frames, 10.0)
        files.add((tmp_path / "v.mp4").read_bytes())
        del disturbance
    assert len(files) == 1
