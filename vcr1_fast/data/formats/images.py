"""VideoChat-R1.5's training mixture, and boxes of described things in images.

videochat_r15 (by task_type): cotraining.json,
    {name: {media_type, task_type, visual_base, json_path}}, each json_path a list
    [{video or image, question, options, answer, glue, duration}]
refcoco (spatial_grounding): REC_refcoco*.json,
    [{img_path, expression, bbox, width, height}]

Source: Videochat-R1.5/src/open_r1/grpo_tasks.py and src_eval/evaluate_det.py of
OpenGVLab/VideoChat-R1; the mixture itself was never released. A json_path is taken from the folder
of the map, a visual_base from the media folder. Boxes in pixels (any value above 1.01) are divided
by the size of the image, which must be there unless the entry states its width and height.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vcr1_fast.data.formats.files import Format, Row, listing, mapping
from vcr1_fast.data.formats.questions import lettered
from vcr1_fast.data.picture import picture_size

TASKS = {
    "gqa": "grounded_qa",
    "igqa": "image_grounded_qa",
    "tg": "moment_retrieval",
    "detection": "spatial_grounding",
    "mc": "multiple_choice",
}

_ROUNDING = 0.01
"""Share of the image by which a side of a box may lie outside."""


def _mixture(path: Path) -> Iterator[tuple[str, Any]]:
    for name, part in mapping(path):
        try:
            source = path.parent / part["json_path"]
            kept = {key: part[key] for key in ("media_type", "task_type", "visual_base")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {name!r} is no part of a mixture: {error!r}") from error
        for number, entry in listing(source):
            yield f"{name}/{number}", (kept, entry)


def _r15(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    part, item = entry
    kind, media = part["task_type"], part["media_type"]
    if media not in ("video", "image"):
        raise ValueError(f"media_type {media!r}")
    path = f"{part['visual_base'].rstrip('/')}/{item[media]}"
    row: Row = {
        "id": place,
        "task": TASKS[kind],
        media: path,
        "prompt": {"event" if kind == "tg" else "question": item["question"].strip()},
        "metadata": {} if item.get("duration") is None else {"duration": item["duration"]},
    }
    if kind in ("gqa", "igqa", "mc"):
        row["options"] = lettered(item["options"])
        letter = item["answer"].strip().strip("().")
        row["answer"] = letter
    if kind == "gqa":
        row["answer"] = {"answer": letter, "glue": item["glue"]}
    elif kind == "igqa":
        box = normalised(item["glue"], item, media_root / path)
        row["answer"] = {"answer": letter, "glue": box}
    elif kind == "tg":
        row["answer"] = [item["glue"]]
    elif kind == "detection":
        row["answer"] = normalised(item["glue"], item, media_root / path)
        row["prompt"]["question"] = f"Where is this: {row['prompt']['question']}?"
    yield row


def _refcoco(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    yield {
        "id": place,
        "task": "spatial_grounding",
        "image": entry["img_path"],
        "prompt": {"question": f"Where is this: {entry['expression'].strip().rstrip('.')}?"},
        "answer": normalised(entry["bbox"], entry, media_root / entry["img_path"]),
    }


def normalised(box: list[float], entry: Row, image: Path) -> list[float]:
    """[x0, y0, x1, y1] from 0 to 1. Pixels have a value above 1 by more than rounding, and
    are divided by the entry's width and height, or the image's own; what lies outside by rounding
    is cut off."""
    x0, y0, x1, y1 = box
    if max(box) <= 1 + _ROUNDING:
        width, height = 1, 1
    elif {"width", "height"} <= set(entry):
        width, height = entry["width"], entry["height"]
    else:
        try:
            width, height = picture_size(str(image))
        except OSError as error:
            raise ValueError(f"its box is in pixels of {image}: {error}") from error
    scaled = [x0 / width, y0 / height, x1 / width, y1 / height]
    if min(scaled) < -_ROUNDING or max(scaled) > 1 + _ROUNDING:
        raise ValueError(f"box {box} leaves the image of {width} x {height}")
    return [round(min(max(side, 0.0), 1.0), 6) for side in scaled]


FORMATS = {
    "videochat_r15": Format(_mixture, _r15),
    "refcoco": Format(listing, _refcoco),
}
