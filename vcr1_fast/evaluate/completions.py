"""Files of an evaluation: raw completions a shard, appended batch by batch.

A killed run leaves at most one torn last line; it is dropped on resume and its batch is answered
again. A later line replaces an earlier one with the same id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcr1_fast.files import append_jsonl, read_jsonl


@dataclass(frozen=True)
class Pass:
    """One pass over the clip: the model's text and the pass's cost."""

    text: str
    spans: tuple[tuple[float, float], ...]
    """Seconds of the clip that were shown more densely than the rest."""
    frames: int
    prompt_tokens: int
    tokens: int
    """Generated."""
    finished: bool
    seconds: float
    """An equal share of the time its batch took, waiting for clips included."""


@dataclass(frozen=True)
class Completion:
    """The model's answer to one record, or why it could not be asked.

    A record with an `error` is quarantined: it is in no denominator and no metric.
    """

    id: str
    text: str = ""
    tokens: int = 0
    finished: bool = True
    """False: cut at max_new_tokens before the end-of-sequence token."""
    error: str | None = None
    passes: tuple[Pass, ...] = ()
    """Every pass over the clip, the last one being `text`; () where no model was asked."""

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Completion:
        """Of one decoded line; TypeError for other fields than these."""
        passes = ({**one, "spans": tuple(map(tuple, one["spans"]))} for one in row["passes"])
        return cls(**{**row, "passes": tuple(Pass(**one) for one in passes)})


def shard_path(out_dir: str | Path, index: int, count: int) -> Path:
    """File that shard `index` of `count` appends its completions to."""
    return Path(out_dir) / f"completions.{index}-of-{count}.jsonl"


def append_completions(path: Path, completions: Iterable[Completion]) -> None:
    """Append lines and force them to disk, so that a killed run loses one batch at most."""
    append_jsonl(path, map(asdict, completions), fsync=True)


def load_completions(path: str | Path, *, repair: bool = False) -> dict[str, Completion]:
    """Completions by record id; {} when the file does not exist.

    A last line without its newline was left by a killed write: it is ignored, and cut off when
    `repair` is set (before appending). Any other malformed line raises ValueError naming file:line.
    """
    path = Path(path)
    if not path.exists():
        return {}
    completions = {}
    for number, row in read_jsonl(path, torn="cut" if repair else "skip"):
        try:
            completion = Completion.from_json(row)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a completion: {error}") from None
        completions[completion.id] = completion
    return completions


def merge_shards(
    out_dir: str | Path, count: int, record_ids: Sequence[str]
) -> list[Completion] | None:
    """The completions of all shards in record order, or None while some record has none yet.

    All shard counts cut the records into the same batches and deal out whole batches, so the
    merged list is the one a single shard writes.
    """
    answered: dict[str, Completion] = {}
    for index in range(count):
        answered.update(load_completions(shard_path(out_dir, index, count)))
    if any(record_id not in answered for record_id in record_ids):
        return None
    return [answered[record_id] for record_id in record_ids]


def given_completions(
    path: str | Path, record_ids: Sequence[str], *, others: bool = False
) -> list[Completion]:
    """The completions of a file made elsewhere, in the order of `record_ids`.

    Each line is an object with `id` and `completion` (or `text`), and optionally `tokens` and
    `finished`; other fields are not read, so that predictions.jsonl can be scored again. ValueError
    for a record without a completion, which would otherwise leave the denominator, for one with
    two, and (unless `others`) for an id that no record has.
    """
    found: dict[str, Completion] = {}
    for number, row in read_jsonl(path, torn="skip"):
        name, text = row.get("id"), row.get("completion", row.get("text"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}:{number}: lacks a text `id` or `completion`: {row!r:.80}")
        if name in found:
            raise ValueError(f"{path}:{number}: answers {name!r} again")
        tokens, finished = row.get("tokens", 0), row.get("finished", True)
        if type(tokens) is not int or type(finished) is not bool:
            given = f"`tokens` {tokens!r:.80} and `finished` {finished!r:.80}"
            raise ValueError(f"{path}:{number}: needs an integer and a boolean, has {given}")
        found[name] = Completion(name, text, tokens=tokens, finished=finished)
    known = set(record_ids)
    lacking = [name for name in record_ids if name not in found]
    strange = [name for name in found if name not in known]
    if lacking:
        raise ValueError(f"{path}: {len(lacking)} records have no completion, first {lacking[0]!r}")
    if strange and not others:
        raise ValueError(f"{path}: {len(strange)} ids are of no record, first {strange[0]!r}")
    return [found[name] for name in record_ids]
