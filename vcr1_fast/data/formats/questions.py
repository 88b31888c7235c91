"""Question and caption benchmarks, and the training set of Video-R1.

mvbench (multiple_choice): its folder json/, or a file of it,
    [{video, question, candidates, answer, start, end}]
perception_test (multiple_choice): mc_question_train.json or mc_question_valid.json,
    {video: {metadata, mc_question: [{id, question, options, answer_id, area, reasoning, tag}]}}
videomme (multiple_choice): test-00000-of-00001.parquet, or its rows as JSON,
    [{videoID, question_id, question, options ["A. ..."], answer, duration "short", domain,
    task_type}]
dream1k (caption): DREAM-1k.jsonl of Tarsier,
    {idx, vid, dataset, video_file, text: {response}, extra_info: {duration, events}}
video_r1 (by problem_type, videos and images): Video-R1-260k.json,
    [{problem_id, problem, data_type, problem_type, options, solution "<answer>...</answer>", path,
    data_source}]

Sources: the data cards and loaders of OpenGVLab/MVBench (its folders of videos by task are those of
VideoChat2's loader), google-deepmind/perception_test, MME-Benchmarks/Video-MME,
bytedance/tarsier and tulerfeng/Video-R1. The test split of Perception Test has no answers: all of
its rows are refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any

from vcr1_fast.data.formats.files import Format, Row, folder, listing, mapping
from vcr1_fast.rewards.text import parse_number

_CHARADES, _CLEVRER, _PERCEPTION = (
    "star/Charades_v1_480",
    "clevrer/video_validation",
    "perception/videos",
)
MVBENCH_VIDEOS = {
    "action_sequence": _CHARADES,
    "action_prediction": _CHARADES,
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": _CLEVRER,
    "object_interaction": _CHARADES,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": "nturgbd",
    "character_order": _PERCEPTION,
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": _CLEVRER,
}
"""Folder of each task's videos below MVBench's folder video/."""


def _mvbench(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    task, _, number = place.partition("/")
    if task not in MVBENCH_VIDEOS:
        raise ValueError(f"{task} is no task of MVBench")
    candidates = [str(candidate) for candidate in entry["candidates"]]
    metadata: Row = {"type": task.replace("_", " ")}
    if task == "episodic_reasoning":
        metadata["fps"] = 3.0  # folders of frames
    yield {
        "id": f"{task}-{number}",
        "task": "multiple_choice",
        "video": f"{MVBENCH_VIDEOS[task]}/{entry['video']}",
        "prompt": {"question": entry["question"].strip()},
        "options": candidates,
        "answer": ascii_uppercase[candidates.index(str(entry["answer"]))],
        **{name: entry[name] for name in ("start", "end") if entry.get(name) is not None},
        "metadata": metadata,
    }


def _perception_test(video: str, entry: Any, media_root: Path) -> Iterator[Row]:
    for question in entry["mc_question"]:
        answer = question.get("answer_id")
        yield {
            "id": f"{video}-{question['id']}",
            "task": "multiple_choice",
            "video": f"{video}.mp4",
            "prompt": {"question": question["question"].strip()},
            "options": question["options"],
            "answer": None if answer is None else ascii_uppercase[int(answer)],
            "metadata": {"type": question["reasoning"], "domain": question["area"]},
        }


_DOTTED = re.compile(r"\(?([A-Z])[).:]\s*(.*)", re.DOTALL)


def lettered(options: list[str]) -> list[str]:
    """Texts of options "A. ..."; ValueError where their letters are not A, B, C, ... in order."""
    matches = [_DOTTED.fullmatch(option.strip()) for option in options]
    found = [match for match in matches if match]
    letters = [match[1] for match in found]
    if len(found) != len(options) or letters != list(ascii_uppercase[: len(options)]):
        raise ValueError(f"options {options}")
    return [match[2] for match in found]


def _videomme(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    length = entry["duration"]
    yield {
        "id": entry["question_id"],
        "task": "multiple_choice",
        "video": f"{entry['videoID']}.mp4",
        "prompt": {"question": entry["question"].strip()},
        "options": lettered(entry["options"]),
        "answer": entry["answer"].strip(),
        "metadata": {
            "length": length,
            "domain": entry["domain"],
            "type": entry["task_type"],
            **({"benchmark": "videomme_short"} if length == "short" else {}),
        },
    }


def _dream1k(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    video = entry["video_file"]
    yield {
        "id": f"dream-{entry['idx']}",
        "task": "caption",
        # Tarsier leaves the name to its user: the video's number.
        "video": f"{entry['vid']}.mp4" if video == "<placeholder>" else video,
        "prompt": {"instruction": "Describe what happens in the video, event by event."},
        "answer": entry["extra_info"]["events"],
        "metadata": {
            "duration": entry["extra_info"]["duration"],
            "domain": entry["dataset"].rpartition("/")[2],
            "description": entry["text"]["response"],
        },
    }


VIDEO_R1_TASKS = {
    "multiple choice": "multiple_choice",
    "numerical": "numeric",
    "regression": "regression",
    "OCR": "ocr",
    "free-form": "open_ended",
}
_SOLUTION = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def _video_r1(place: str, entry: Any, media_root: Path) -> Iterator[Row]:
    task = VIDEO_R1_TASKS[entry["problem_type"]]
    solution = _SOLUTION.fullmatch(entry["solution"])
    if solution is None:
        raise ValueError(f"solution {entry['solution']!r:.80}")
    answer: Any = solution[1].strip()
    if task in ("numeric", "regression"):
        answer = parse_number(answer)
        if answer is None:
            raise ValueError(f"solution {entry['solution']!r:.80} is no number")
    if entry["data_type"] not in ("video", "image"):
        raise ValueError(f"data_type {entry['data_type']!r}")
    yield {
        "id": f"{entry['data_source']}-{entry['problem_id']}",
        "task": task,
        entry["data_type"]: str(PurePosixPath(entry["path"])),
        "prompt": {"question": entry["problem"].strip()},
        **({"options": lettered(entry["options"])} if task == "multiple_choice" else {}),
        "answer": answer,
        "metadata": {"type": entry["problem_type"], "domain": entry["data_source"]},
    }


FORMATS = {
    "mvbench": Format(folder, _mvbench, "mvbench"),
    "perception_test": Format(mapping, _perception_test),
    "videomme": Format(listing, _videomme),
    "dream1k": Format(listing, _dream1k, "dream1k"),
    "video_r1": Format(listing, _video_r1),
}
