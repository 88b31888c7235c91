"""Which evaluation an output folder belongs to, so that a resumed run never mixes two."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vcr1_fast.data.tables import hub_name, read_rows
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.files import write_atomic
from vcr1_fast.rewards.judge import JudgeConfig
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import load_prompts, prompts_from

# Settings that completions depend on. An output folder holds one value of each.
_IDENTITY = (
    "frames",
    "columns",
    "tasks",
    "think",
    "media_first",
    "system",
    "max_new_tokens",
    "mrope",
    "video_text",
    "batch_size",
    "perception",
    "decoder",
    "dtype",
    "engine",
)

_COMPLETIONS = "completions.*.jsonl"
_RESULTS = (
    "predictions.jsonl",
    "quarantine.jsonl",
    "summary.json",
    "tables.md",
    "scores.png",
    "predictions.html",
    "run.json",
)

_BLOCK, _BLOCKS = 1 << 20, 64


def run_identity(
    model_path: str | Path, records_path: str | Path, config: EvalConfig
) -> dict[str, Any]:
    """Identity of an evaluation: contents of the checkpoint and the records, and settings."""
    model = Path(model_path)
    files = sorted(file for file in model.glob("*") if file.is_file()) if model.is_dir() else []
    settings = asdict(config) | {"dtype": str(config.placement()[0])}
    return {
        "model": str(model_path),
        "model_files": {file.name: fingerprint(file) for file in files},
        "records": str(records_path),
        "records_sha256": records_digest(Path(records_path)),
        "prompts": _prompts(config),
        "judge": _judge(config.judge),
        **{name: settings[name] for name in _IDENTITY},
    }


def given_identity(
    predictions_path: str | Path, records_path: str | Path, config: EvalConfig
) -> dict[str, Any]:
    """What scores of a file of completions depend on: its contents, and the records'."""
    return {
        "predictions": str(predictions_path),
        "predictions_sha256": hashlib.sha256(Path(predictions_path).read_bytes()).hexdigest(),
        "records": str(records_path),
        "records_sha256": records_digest(Path(records_path)),
        "tasks": config.tasks,
        "judge": _judge(config.judge),
    }


def _prompts(config: EvalConfig) -> dict[str, Any] | None:
    """The prompt templates of the prompts file, checked."""
    if config.prompts is None:
        return None
    with prompts_from(config.prompts, TASKS, think=config.think):
        return {name: asdict(one) for name, one in load_prompts(config.prompts, TASKS).items()}


def _judge(config: JudgeConfig) -> dict[str, Any]:
    """The judge's settings that scores depend on; how it is reached is not among them. A local
    model's batches are: padding changes rounding."""
    names = {
        "offline": ("kind",),
        "http": ("kind", "model", "max_tokens"),
        "local": ("kind", "model", "max_tokens", "concurrency"),
    }
    return {name: getattr(config, name) for name in names[config.kind]}


def records_digest(path: Path) -> str:
    """SHA-256 of a records file; of a data set that is no file, of its rows."""
    if hub_name(path) is None and not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for _, row in read_rows(path):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Hash of a file's size and of its contents: all of them up to 64 MiB, else 64 blocks of 1 MiB
    at even distances, since weight files of many GiB differ everywhere or nowhere. Does not depend
    on times, so that copies of a checkpoint on other machines are the same checkpoint."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def claim_folder(out_dir: str | Path, identity: dict[str, Any], *, restart: bool = False) -> None:
    """Create `out_dir` for this evaluation, or check that it already belongs to it.

    With `restart` the files of another evaluation are deleted, its completions only where they
    would be others; else ValueError names the first difference.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    mine = json.loads(json.dumps(identity))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in mine if mine[name] != theirs.get(name)]
        if different and not restart:
            name = different[0]
            raise ValueError(
                f"{out} holds another evaluation: {name} was {theirs.get(name)!r}, now "
                f"{mine[name]!r}; write to another folder, or set restart to delete that one"
            )
        if different:
            files = _RESULTS if different == ["judge"] else (_COMPLETIONS, *_RESULTS)
            for stale in (file for pattern in files for file in out.glob(pattern)):
                stale.unlink(missing_ok=True)  # another shard may be doing the same
    write_atomic(path, json.dumps(mine, indent=2) + "\n")
