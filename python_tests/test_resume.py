"""Resuming: what must be the same, what may change and is said; damaged, unfinished, full disks."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.model.checkpoint import load
from vcr1_fast.train import checkpoint, resume, setup
from vcr1_fast.train.loop import train
from vcr1_fast.train.resume import flat_settings
from vcr1_fast.train.sft import sft


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    sft(configure(*inputs, folder, "run.save_every=1", "optim.lr=1e-2"))
    return folder


def again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def weights(folder):
    model, _ = load(folder / "model")
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


# --- what must be the same


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.seed=5", r"run\.seed \(\[0, 5\]\)"),
        ("optim.prompts_per_step=2", r"optim\.prompts_per_step \(\[4, 2\]\)"),
        ("model.lora_rank=2", r"model\.lora_rank \(\[0, 2\]\)"),
        ("model.freeze_vision=true", r"model\.freeze_vision \(\[false, true\]\)"),
        ("data.tasks=[tracking]", "number of records in data.train"),
        ("data.order_window=9", r"data\.order_window \(\[64, 9\]\)"),
    ],
)
def test_settings_that_change_the_meaning_are_refused_by_name(
    inputs, finished, tmp_path, override, named
):
    with pytest.raises(ValueError, match=f"another {named}"):
        sft(configure(*inputs, again(finished, tmp_path), override))


def test_lora_alpha_and_rank_are_refused_by_name(inputs, tmp_path):
    lora = ("model.lora_rank=2", "model.freeze_vision=true", "optim.steps=1")
    sft(configure(*inputs, tmp_path / "run", *lora))
    for override in ("model.lora_rank=4", "model.lora_alpha=128", "model.lora_targets=[q_proj]"):
        with pytest.raises(ValueError, match=f"another {override.partition('=')[0]}"):
            sft(configure(*inputs, tmp_path / "run", *lora, override))


def test_another_kind_of_run_is_refused(inputs, finished, tmp_path):
    with pytest.raises(ValueError, match=r'another kind of run \(\["sft", "grpo"\]\)'):
        train(configure(*inputs, again(finished, tmp_path)))


@pytest.mark.parametrize("change", ["order", "answer", "id"])
def test_other_records_of_the_same_number_are_refused(inputs, finished, tmp_path, change):
    model, path = inputs
    records = load_records(path)
    if change == "order":
        records = records[::-1]
    elif change == "answer":
        i = next(i for i, one in enumerate(records) if one.task == "temporal_grounding")
        records[i] = dataclasses.replace(records[i], answer=[0.0, 0.5])
    else:
        records[0] = dataclasses.replace(records[0], id="another")
    rows = path.with_name(f"{change}.jsonl")
    write_records(rows, records)
    with pytest.raises(ValueError, match=r"another content of data\.train"):
        sft(configure(model, rows, again(finished, tmp_path)))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"},
        {"task": "tracking"},
        {"video": "data/other.mp4"},
        {"prompt": {"question": "why?"}},
        {"answer": "B"},
        {"options": ("blue", "red")},
        {"start": 1.0},
        {"end": 3.0},
        {"boxes": ((0.0, 0.0, 1.0, 0.5),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_is_asked_about_counts_as_content(change):
    record = Record(
        *("a", "multiple_choice", "data/v.mp4", {"question": "what?"}, "A"),
        options=("red", "blue"),
        start=0.5,
        end=4.0,
        boxes=((0.0, 0.0, 1.0, 1.0),),
    )
    digest = resume._records_digest([record])
    assert resume._records_digest([dataclasses.replace(record, **change)]) != digest
    moved = dataclasses.replace(record, video="elsewhere/v.mp4")
    assert resume._records_digest([moved]) == digest


def test_another_base_model_is_refused_and_a_moved_one_is_not(inputs, finished, tmp_path):
    model, path = inputs
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    run = again(finished, tmp_path)
    sft(configure(moved, path, run))
    with pytest.raises(ValueError, match=r"another base weights in model\.path"):
        sft(configure(finished / "model", path, run))


# --- what may change


def test_other_changes_are_said_and_the_old_settings_kept(inputs, finished, tmp_path, capsys):
    run = again(finished, tmp_path)
    before = (run / "config.yaml").read_text()
    capsys.readouterr()
    sft(configure(*inputs, run, "run.save_every=1", "optim.lr=1e-3", "optim.steps=3"))
    said = capsys.readouterr().err
    assert "optim.lr changes from 0.01 to 0.001 after step 2" in said
    assert "optim.steps changes from 2 to 3 after step 2" in said
    assert "run.output changes" not in said
    assert said.count("changes from") == 2
    (kept,) = run.glob("config-until-*.yaml")
    assert (kept.name, kept.read_text()) == ("config-until-step-00000002.yaml", before)
    assert flat_settings((run / "config.yaml").read_text())["optim.lr"] == 0.001


def test_optimiser_settings_of_the_configuration_hold_after_resuming(inputs, finished, tmp_path):
    run = again(finished, tmp_path)
    overrides = ("optim.betas=[0.5, 0.9]", "optim.weight_decay=0.5", "optim.eps=1e-4")
    config = configure(*inputs, run, "optim.steps=3", *overrides)
    with setup.open_run(config, reference=False, kind="sft") as opened:
        assert opened.done == 2
        (group,) = opened.optimizer.adamw.param_groups
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.9), 0.5, 1e-4)
        assert all(float(state["step"]) == 2 for state in opened.optimizer.adamw.state.values())
    sft(config)
    state = checkpoint.load_checkpoint(run / "checkpoints" / "step-00000003")
    assert state["optimizer"]["adamw"]["param_groups"][0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_training_survives_a_change_of_dtype(inputs, tmp_path, first, then):
    """A next step of almost no size must leave the trained weights where they were."""
    model, path = inputs
    run = tmp_path / "run"
    sft(configure(model, path, run, f"model.dtype={first}", "optim.lr=3e-2"))
    trained = weights(run)
    base, _ = load(model)
    base = torch.cat([p.detach().flatten().double() for p in base.parameters()])
    resumed = ("optim.steps=3", "optim.lr=1e-9", "optim.schedule=constant")
    sft(configure(model, path, run, f"model.dtype={then}", *resumed))
    after = weights(run)
    moved = (trained - base).norm()
    assert moved > 0.1
    assert (after - trained).norm() < 0.05 * moved


# --- damage


def damage(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = random.Random(0).randbytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.pt", "random-0.pt"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(inputs, finished, tmp_path, capsys, name):
    run = again(finished, tmp_path)
    damage(run / "checkpoints" / "step-00000002" / name)
    capsys.readouterr()
    sft(configure(*inputs, run, "run.save_every=1", "optim.lr=1e-2"))
    said = capsys.readouterr().err
    assert f"step-00000002/{name}: differs from its SHA-256" in said
    assert "resuming after step 1" in said
    assert (run / "model" / "model.safetensors").read_bytes() == (
        finished / "model" / "model.safetensors"
    ).read_bytes()


def test_damage_to_all_checkpoints_is_one_error_that_names_them(inputs, finished, tmp_path):
    run = again(finished, tmp_path)
    for path in (run / "checkpoints").iterdir():
        damage(path / "state.pt")
    with pytest.raises(ValueError, match=r"step-00000002/state\.pt.*; .*step-00000001/state\.pt"):
        sft(configure(*inputs, run))


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"state.pt": 3}', "{"])
def test_a_manifest_without_content_is_not_whole(tmp_path, manifest):
    path = checkpoint.save_checkpoint(tmp_path, {"step": 1}, keep=1)
    (path / "manifest.json").write_text(manifest)
    assert checkpoint.checkpoints(tmp_path) == ([], [path])


def test_a_file_that_is_no_archive_is_named(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, {"step": 1}, keep=1)
    (path / "state.pt").write_bytes(b"not an archive")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"state\.pt: cannot be read"):
        checkpoint.load_checkpoint(path)


def test_leftovers_of_killed_runs_are_removed(inputs, finished, tmp_path, capsys):
    run = again(finished, tmp_path)
    for name in (".model.abc", ".model.old-17", "checkpoints/.partial-step-00000003"):
        (run / name).mkdir()
        (run / name / "file").write_bytes(b"x")
    (run / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    sft(configure(*inputs, run, "run.save_every=1", "optim.lr=1e-2"))
    assert not list(run.glob(".model.*"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    said = capsys.readouterr().err
    assert said.count("an interrupted write left it incomplete") == 2


# --- the disk


class Disk:
    free = 0

    def __call__(self, path):
        return shutil._ntuple_diskusage(10**12, 10**12 - self.free, self.free)


def test_a_full_disk_is_said_before_the_run_and_costs_nothing(
    inputs, finished, tmp_path, monkeypatch
):
    disk = Disk()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk)
    with pytest.raises(OSError, match=r"GiB are needed here, 0\.00 GiB are free"):
        sft(configure(*inputs, tmp_path / "new"))
    run = again(finished, tmp_path)
    state = {"step": 3, "x": torch.zeros(2**20)}
    disk.free = 4 * 2**20 + checkpoint._MARGIN - 1
    with pytest.raises(OSError, match="are needed here"):
        checkpoint.save_checkpoint(run / "checkpoints", state, keep=1)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["step-00000001", "step-00000002"]
    disk.free += 1
    checkpoint.save_checkpoint(run / "checkpoints", state, keep=1)


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"step": 1}, keep=2)

    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"cannot be written .*random-0\.pt"):
        checkpoint.save_checkpoint(tmp_path, {"step": 2}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_files_reach_the_disk_before_the_names_that_stand_for_them(tmp_path, monkeypatch):
    """The order of file operations: each file is synced before the manifest that vouches for it,
    the manifest and its folder before the folder's name, and the name before old checkpoints go."""
    order = []
    sync, rename, remove = os.fsync, type(tmp_path).rename, shutil.rmtree

    def watched(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(("sync", name.replace(f".manifest.{os.getpid()}", ".manifest")))
        sync(descriptor)

    replace = os.replace

    checkpoint.save_checkpoint(tmp_path, {"step": 1}, keep=1)
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(
        type(tmp_path),
        "rename",
        lambda self, to: (order.append(("rename", to.name)), rename(self, to))[1],
    )
    monkeypatch.setattr(
        checkpoint.shutil,
        "rmtree",
        lambda path, **options: (
            order.append(("remove", path.name)) if path.exists() else None,
            remove(path, **options),
        )[1],
    )
    monkeypatch.setattr(
        os,
        "replace",
        lambda source, to: (order.append(("rename", Path(to).name)), replace(source, to))[1],
    )
    checkpoint.save_checkpoint(tmp_path, {"step": 2}, keep=1)
    assert order == [
        ("sync", "random-0.pt"),
        ("sync", "state.pt"),
        ("sync", ".manifest.json"),
        ("rename", "manifest.json"),
        ("sync", ".partial-step-00000002"),  # the manifest's name
        ("sync", ".partial-step-00000002"),
        ("rename", "step-00000002"),
        ("sync", tmp_path.name),
        ("remove", "step-00000001"),
    ]


def test_the_manifest_has_the_digests_of_the_files(tmp_path):
    import hashlib

    path = checkpoint.save_checkpoint(tmp_path, {"step": 1, "x": torch.ones(3)}, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"state.pt", "random-0.pt"}
    for name, entry in manifest.items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
