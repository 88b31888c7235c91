"""Tasks: prompts, parsers, rewards, metrics, blind baselines against values worked out by hand."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.data.records import Record
from vcr1_fast.rewards import box_ious
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.base import check_task, rows
from vcr1_fast.tasks.blind import constant_spans, most_common
from vcr1_fast.tasks.grounded_qa import GroundedAnswer

BOX = (0.0, 0.0, 0.5, 0.5)
OPTIONS = ("red circle", "blue square", "green star")
GOLDEN = Path(os.environ.get("VCR1_TEST_DATA", "../shared/data")) / "golden_rewards.jsonl"


def record(task, prompt, answer, **fields):
    return Record(id="r", task=task, video="v.mp4", prompt=prompt, answer=answer, **fields)


GROUNDING = record("temporal_grounding", {"event": "A dog runs."}, [2.0, 6.0])
TRACKING = record("tracking", {"object": "the dog"}, [list(BOX)] * 8)
GROUNDED = record(
    "grounded_qa",
    {"question": "What is seen?"},
    {"answer": "B", "glue": [[2.0, 6.0], [8.0, 10.0]]},
    options=OPTIONS,
)
CHOICE = record("multiple_choice", {"question": "What is seen?"}, "B", options=OPTIONS)
LABEL = record("classification", {"question": "What is seen?"}, "low", options=("low", "high"))
SINGLE = (
    record("caption", {"instruction": "What happens?"}, ["a dog runs", "it jumps over a fence"]),
    record("spatial_grounding", {"question": "Where is it?"}, [0.1, 0.2, 0.5, 0.6]),
    record("numeric", {"question": "How many?"}, 3),
    record("regression", {"question": "How far?"}, 2.5),
    record("boolean", {"question": "Is it red?"}, False),
    record("ocr", {"question": "What does the sign say?"}, "No entry"),
    record("open_ended", {"question": "Why?"}, "because the man pours water"),
)
MOMENTS = record("moment_retrieval", {"event": "A dog runs."}, [[2.0, 4.0], [6.0, 8.0]])
TUBE = record(
    "spatio_temporal_grounding",
    {"event": "a dog runs"},
    {"time": [1.5, 4.0], "boxes": {"2": [0.0, 0.0, 0.5, 0.5], "3": [0.5, 0.5, 1.0, 1.0]}},
)
BOXED = record(
    "image_grounded_qa",
    {"question": "What is seen?"},
    {"answer": "B", "glue": [0.1, 0.2, 0.5, 0.6]},
    options=OPTIONS,
)
RECORDS = (GROUNDING, TRACKING, GROUNDED, CHOICE, LABEL, *SINGLE, MOMENTS, TUBE, BOXED)


def metrics_of(task, prediction, sample):
    """The metrics of one sample."""
    return task.metrics(prediction, sample)


def by_name(item):
    return item.task if isinstance(item, Record) else None


@pytest.mark.parametrize("sample", RECORDS, ids=by_name)
@pytest.mark.parametrize("think", [False, True])
def test_the_right_answer_gets_every_reward_and_metric(sample, think):
    task = TASKS[sample.task]
    completion = task.target(sample)
    if think:
        completion = f"<think>It is <timestep>1 to 2</timestep>.</think>\n{completion}"
    assert set(task.score(completion, sample, 10.0, think).values()) == {1.0}
    assert set(metrics_of(task, task.parse(completion, sample), sample).values()) == {1.0}
    # The other form of prompt asks for something else: only the format reward may notice.
    other = task.score(completion, sample, 10.0, not think)
    assert [name for name, value in other.items() if value == 0.0] == ["format"]


@pytest.mark.parametrize("sample", RECORDS, ids=by_name)
def test_no_answer_gets_nothing(sample):
    task = TASKS[sample.task]
    assert set(task.score("I cannot tell.", sample, 10.0).values()) == {0.0}
    assert task.parse("I cannot tell.", sample) is None
    assert set(metrics_of(task, None, sample).values()) == {0.0}


@pytest.mark.parametrize("sample", RECORDS, ids=by_name)
def test_prompt_shows_the_format_that_its_reward_wants(sample):
    """An example answer in the prompt, completed where it is elided, earns the format reward."""
    task = TASKS[sample.task]
    for think in (False, True):
        prompt = task.prompt(sample, think)
        assert ("<think>" in prompt) == think
        example = re.search(r"<answer>.*(?:</answer>|</glue>)", prompt)[0]
        example = example.replace("...", ", ".join(["[0.1, 0.2, 0.3, 0.4]"] * 7))
        if think:
            example = f"<think>so</think>{example}"
        assert task.score(example, sample, 10.0, think)["format"] == 1.0
    assert len(task.prompt(sample, False)) < 260


def test_prompts_hold_the_question():
    prompts = [TASKS[r.task].prompt(r, False) for r in RECORDS]
    assert "A dog runs" in prompts[0]
    assert "the dog" in prompts[1]
    assert "[0.00, 0.00, 0.50, 0.50]" in prompts[1]
    for prompt in prompts[2:5]:
        assert "What is seen?" in prompt
    for sample, prompt in zip(RECORDS[5:], prompts[5:], strict=True):
        assert next(iter(sample.prompt.values())).rstrip(".") in prompt
    for prompt in prompts[2:4]:
        assert "(A) red circle (B) blue square (C) green star" in prompt


def test_temporal_grounding_values():
    task = TASKS["temporal_grounding"]
    assert task.score("<answer>4 to 8</answer>", GROUNDING) == {
        "format": 1.0,
        "iou": pytest.approx(1 / 3),
    }
    # 6 s of a 7 s clip: the answer's end is clipped to the clip, the annotation is inside.
    assert task.score("<answer>2 to 60</answer>", GROUNDING, 7.0)["iou"] == pytest.approx(4 / 5)
    assert task.score("4 to 8", GROUNDING) == {"format": 0.0, "iou": 0.0}
    assert task.score("<answer>8 to 4</answer>", GROUNDING) == {"format": 0.0, "iou": 0.0}
    assert metrics_of(task, (2.0, 4.0), GROUNDING) == {
        "mIoU": 0.5,
        "R@0.3": 1.0,
        "R@0.5": 1.0,
        "R@0.7": 0.0,
    }


def test_tracking_values():
    task = TASKS["tracking"]
    inverted = (0.5, 0.5, 0.0, 0.0)
    boxes = [BOX] * 4 + [inverted] * 4
    completion = f"<answer>{[list(b) for b in boxes]}</answer>"
    # The first box was given and earns nothing: 3 of the 7 others are right.
    assert task.score(completion, TRACKING) == {"format": 1.0, "iou": pytest.approx(3 / 7)}
    assert task.score(f"<answer>{[list(BOX)] * 7}</answer>", TRACKING) == {
        "format": 0.0,
        "iou": 0.0,
    }
    metrics = metrics_of(task, tuple(boxes), TRACKING)
    assert metrics["AO"] == metrics["SR@0.5"] == metrics["SR@0.7"] == 0.5
    assert metrics["AO_unseen"] == metrics["SR@0.5_unseen"] == pytest.approx(3 / 7)
    assert task.times(TRACKING, 14.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    timed = record("tracking", {"object": "x"}, [BOX] * 2, metadata={"times": [1, 2.5]})
    assert task.times(timed, 14.0) == [1.0, 2.5]
    assert TASKS["temporal_grounding"].times is None


@pytest.mark.parametrize(
    ("name", "answer", "value"),
    [
        ("numeric", "3.0", 1.0),
        ("numeric", "there are 3 dogs", 1.0),
        ("numeric", "3 or 4", 0.0),
        ("numeric", "1e999", 0.0),
        ("numeric", "\u22123", 0.0),
        ("regression", "2.5 m", 1.0),
        ("regression", "2.0", 0.6),  # an error of 0.2: below 0.5, 0.45, ... 0.25
        ("regression", "250 %", 1.0),
        ("regression", "5/2", 1.0),
        ("boolean", "No, it is blue.", 1.0),
        ("boolean", "TRUE", 0.0),
        ("boolean", "no, yes", 0.0),
        ("boolean", "not at all", 0.0),
        ("ocr", "no entry!", 1.0),
        ("ocr", "entry", 0.5),
        ("ocr", "no no entry", 0.5),
        ("ocr", "one two three four", 0.0),
        ("open_ended", "Because the man pours water.", 1.0),
        ("open_ended", "the man", (4 / 7 + 2 / 5 + 4 / 7) / 3),
        ("caption", "The dogs ran. Then it jumped over the fence.", 0.5),
        ("caption", "A running dog. It jumps a fence.", 1.0),
        ("spatial_grounding", "[0.1, 0.2, 0.5, 0.4]", 0.5),
        ("spatial_grounding", "[[0.1, 0.2, 0.5, 0.6]]", 1.0),
        ("spatial_grounding", "[0.5, 0.2, 0.1, 0.6]", 0.0),
    ],
)
def test_single_answers(name, answer, value):
    (sample,) = (s for s in SINGLE if s.task == name)
    task = TASKS[name]
    completion = f"<answer>{answer}</answer>"
    measure = task.primary
    assert task.score(completion, sample)[measure] == pytest.approx(value)
    prediction = task.parse(completion, sample)
    assert metrics_of(task, prediction, sample)[measure] == pytest.approx(value)
    assert task.score(completion, sample)["format"] == float(prediction is not None)
    assert task.score(answer, sample) == {"format": 0.0, measure: 0.0}


def test_blind_guesses_of_single_answers():
    def baseline(name, *answers):
        train = [record(name, {}, answer) for answer in answers]
        return TASKS[name].blind_baseline(train, train)[1][TASKS[name].primary]

    assert baseline("numeric", 3, 3, 4) == pytest.approx(2 / 3)
    assert baseline("boolean", True, False, True, True) == 0.75
    assert baseline("regression", 1.0, 2.0, 100.0) == pytest.approx(1 / 3)
    assert baseline("spatial_grounding", [0, 0, 0.5, 1], [0.5, 0, 1, 1]) == pytest.approx(1 / 3)
    assert baseline("caption", ["a dog runs"], ["a dog runs", "a cat sits"]) == pytest.approx(0.75)


def test_moment_retrieval_values():
    task = TASKS["moment_retrieval"]
    # Common: 2 to 4 and 6 to 7; together: 0 to 4, 6 to 9 (or to 8, the clip's end).
    answer = "<answer>[(0, 4), (6, 7), (8.5, 9)]</answer>"
    assert task.score(answer, MOMENTS, 8.0) == {"format": 1.0, "iou": pytest.approx(3 / 6)}
    assert task.score(answer, MOMENTS)["iou"] == pytest.approx(3 / 6.5)
    metrics = metrics_of(task, task.parse(answer, MOMENTS), MOMENTS)
    assert metrics["mIoU"] == pytest.approx(3 / 6.5) and metrics["R@0.3"] == 1.0
    assert metrics["R@0.5"] == 0.0
    for text in ("2 to 4", "[(4, 2)]", "[]", "[(1, 2)"):
        scores = task.score(f"<answer>{text}</answer>", MOMENTS)
        assert scores == {"format": 0.0, "iou": 0.0}, text
    baselines = task.blind_baselines([MOMENTS], [MOMENTS])
    assert baselines["whole video"]["mIoU"] == pytest.approx(4 / 8)


def tube(time, **boxes):
    content = {"time": time, "boxes": {name[1:]: box for name, box in boxes.items()}}
    return f"<answer>{json.dumps(content)}</answer>"


def test_spatio_temporal_grounding_prices_coverage():
    task = TASKS["spatio_temporal_grounding"]
    whole, half = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
    # One easy second right is not the whole tube: the missing one counts as 0.
    assert task.score(tube([1.5, 4.0], _2=whole), TUBE) == {
        "format": 1.0,
        "iou": 1.0,
        "tube_iou": 0.5,
    }
    # Nor does painting every second help: two of four seconds are right.
    every = tube([0.0, 4.0], _1=whole, _2=whole, _3=half, _4=half)
    assert task.score(every, TUBE) == {"format": 1.0, "iou": 2.5 / 4, "tube_iou": 0.5}
    # A box twice as high (IoU 1/2) and an impossible one (0).
    tall = tube([1.5, 4.0], _2=[0.0, 0.0, 0.5, 1.0], _3=[0.9, 0.5, 0.5, 1.0])
    assert task.score(tall, TUBE)["tube_iou"] == pytest.approx(0.25)
    metrics = metrics_of(task, task.parse(every, TUBE), TUBE)
    assert metrics == {"m_tIoU": 0.625, "m_vIoU": 0.5, "vIoU@0.3": 1.0, "vIoU@0.5": 1.0}
    assert task.score(tube([1.0, 90.0], _2=whole), TUBE, 4.0)["iou"] == pytest.approx(2.5 / 3)
    baseline = task.blind_baselines([TUBE], [TUBE])["whole video, mean box"]
    assert baseline["m_tIoU"] == pytest.approx(2.5 / 4)
    # The mean box is [0.25, 0.25, 0.75, 0.75]: IoU 1/7 at 2 and 3 s, shown at 0 to 4 s.
    assert baseline["m_vIoU"] == pytest.approx(2 / 7 / 5)


@pytest.mark.parametrize(
    "text",
    [
        '{"time": [4.0, 1.5], "boxes": {"2": [0, 0, 1, 1]}}',
        '{"time": [1, 2], "boxes": {}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1]}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, 1e999]}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, NaN]}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, true]}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, 1], "02": [0, 0, 1, 1]}}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, 1], "2": [0, 0, 1, 1]}}',
        '{"time": [1, 2], "boxes": {"2.5": [0, 0, 1, 1]}}',
        '{"time": [1, 2], "boxes": {"-2": [0, 0, 1, 1]}}',
        '{"time": [1, 2], "boxes": [[0, 0, 1, 1]]}',
        '{"time": [1, 2], "boxes": {"2": [0, 0, 1, 1]}, "more": 1}',
        '{"time": ["1", "2"], "boxes": {"2": [0, 0, 1, 1]}}',
        "[" * 100_000,
        '{"time": [' + "9" * 100_000 + ', 2], "boxes": {"2": [0, 0, 1, 1]}}',
        "null",
    ],
)
def test_texts_that_are_no_tube(text):
    task = TASKS["spatio_temporal_grounding"]
    assert task.parse(f"<answer>{text}</answer>", TUBE) is None
    assert set(task.score(f"<answer>{text}</answer>", TUBE).values()) == {0.0}


def test_image_grounded_qa_values():
    task = TASKS["image_grounded_qa"]
    answer = "<answer>B</answer> <glue>[0.1, 0.2, 0.5, 0.4]</glue>"
    assert task.score(answer, BOXED) == {
        "format": 1.0,
        "accuracy": 1.0,
        "iou": pytest.approx(0.5),
    }
    metrics = metrics_of(task, task.parse(answer.replace(">B<", ">A<"), BOXED), BOXED)
    assert metrics == {
        "accuracy": 0.0,
        "IoU": pytest.approx(0.5),
        "IoU@0.5": float(metrics["IoU"] >= 0.5),
        "Acc@IoU0.5": 0.0,
    }
    assert task.score("<answer>B</answer><glue>(1, 2)</glue>", BOXED) == {
        "format": 0.0,
        "accuracy": 1.0,
        "iou": 0.0,
    }
    baselines = task.blind_baselines([BOXED], [BOXED])
    assert baselines["most frequent letter, mean box"]["Acc@IoU0.5"] == 1.0


def test_classification_values():
    task = TASKS["classification"]
    assert task.score("<answer>Low.</answer>", LABEL) == {"format": 1.0, "accuracy": 1.0}
    assert task.score("<answer>high</answer>", LABEL) == {"format": 1.0, "accuracy": 0.0}
    assert task.score("<answer>low or high</answer>", LABEL) == {"format": 0.0, "accuracy": 0.0}
    assert task.parse("<answer> HIGH </answer>", LABEL) == "high"
    assert "low, high" in task.prompt(LABEL, False)
    seen = [replace(LABEL, answer="high"), replace(LABEL, answer="high"), LABEL]
    assert task.blind_baselines(seen, [LABEL, seen[0]]) == {
        "most frequent label": {"accuracy": 0.5}
    }


def test_grounded_qa_values():
    task = TASKS["grounded_qa"]
    completion = "<answer>(B)</answer> <glue>[(4, 6), (2, 5)]</glue>"
    assert task.score(completion, GROUNDED) == {
        "format": 1.0,
        "accuracy": 1.0,
        "iou": pytest.approx(4 / 6),
    }
    assert task.score("<answer>A</answer><glue>oops</glue>", GROUNDED) == {
        "format": 0.0,
        "accuracy": 0.0,
        "iou": 0.0,
    }
    assert task.score("<answer>B</answer>", GROUNDED)["accuracy"] == 1.0
    metrics = metrics_of(task, GroundedAnswer("B", ((0.0, 10.0),)), GROUNDED)
    assert metrics == {
        "accuracy": 1.0,
        "mIoU": 0.6,
        "mIoP": 0.6,
        "Acc@GQA": 1.0,
        "IoU@0.3": 1.0,
        "IoP@0.3": 1.0,
        "IoU@0.5": 1.0,
        "IoP@0.5": 1.0,
    }
    wrong = metrics_of(task, GroundedAnswer("A", ((2.0, 4.0),)), GROUNDED)
    assert (wrong["mIoU"], wrong["mIoP"], wrong["Acc@GQA"]) == (pytest.approx(2 / 6), 1.0, 0.0)


def test_multiple_choice_values():
    task = TASKS["multiple_choice"]
    assert task.score("<answer>C</answer>", CHOICE) == {"format": 1.0, "accuracy": 0.0}
    assert task.score("<answer>D</answer>", CHOICE) == {"format": 0.0, "accuracy": 0.0}
    assert task.score("<answer>blue square</answer>", CHOICE) == {
        "format": 1.0,
        "accuracy": 1.0,
    }


def grounded_at(start, end, duration):
    return record(
        "temporal_grounding", {"event": "x"}, [start, end], metadata={"duration": duration}
    )


def test_blind_spans_are_fitted_on_train_and_scored_on_test():
    train = [grounded_at(2.5, 7.5, 10), grounded_at(5, 15, 20)]
    test = [grounded_at(10, 30, 40), grounded_at(0, 10, 40)]
    baselines = TASKS["temporal_grounding"].blind_baselines(train, test)
    # Training events fill the middle half; so the constant span is [10, 30] of 40 s.
    assert baselines["constant span"]["mIoU"] == pytest.approx((1.0 + 0.0) / 2)
    assert baselines["whole video"]["mIoU"] == pytest.approx((0.5 + 0.25) / 2)
    assert TASKS["temporal_grounding"].blind_baseline(train, test)[0] == "constant span"


def test_blind_span_is_the_best_of_all_on_the_grid():
    """Against a brute-force search with the reward's own IoU, evidence sets included."""
    from vcr1_fast.rewards import span_set_ious

    answers = [[[0.0, 3.0], [2.0, 4.0]], [[1.0, 2.0], [6.0, 7.0]], [[5.0, 9.0]]]
    records = [
        record("grounded_qa", {}, {"glue": glue}, metadata={"duration": 10.0}) for glue in answers
    ]
    found = constant_spans(records, records, lambda r: r.answer["glue"], steps=10)
    best = max(
        sum(span_set_ious([[(a, b)]] * len(answers), answers))
        for a in range(10)
        for b in range(a + 1, 11)
    )
    span = found["constant span"][0]
    assert sum(span_set_ious([[span]] * len(answers), answers)) == pytest.approx(best)


def test_blind_span_without_durations_uses_the_latest_training_second():
    train = [record("temporal_grounding", {"event": "x"}, [4.0, 8.0])]
    baselines = TASKS["temporal_grounding"].blind_baselines(train, [GROUNDING])
    assert baselines["whole video"]["mIoU"] == pytest.approx(4 / 8)


def test_blind_letters():
    def asked(answer, *options):
        return record("multiple_choice", {"question": "?"}, answer, options=options)

    train = [asked("A", "x", "y"), asked("B", "y", "x"), asked("B", "z", "x"), asked("B", "w", "x")]
    test = [asked("A", "x", "y"), asked("B", "z", "y")]
    baselines = TASKS["multiple_choice"].blind_baselines(train, test)
    assert baselines["most frequent letter"]["accuracy"] == 0.5
    assert baselines["likeliest option"]["accuracy"] == 0.5
    assert (
        TASKS["multiple_choice"].blind_baselines(train, test[:1])["likeliest option"]["accuracy"]
        == 1.0
    )
    grounded = TASKS["grounded_qa"].blind_baselines([GROUNDED], [GROUNDED])
    assert grounded["most frequent letter, whole video"]["accuracy"] == 1.0


def test_blind_tracks():
    def moving(dx):
        return record(
            "tracking", {"object": "x"}, [[dx * i, 0.0, dx * i + 0.5, 0.5] for i in range(2)]
        )

    baselines = TASKS["tracking"].blind_baselines([moving(0.25)], [moving(0.25)])
    assert baselines["first box repeated"]["AO_unseen"] == pytest.approx(1 / 3)
    assert baselines["mean motion"]["AO_unseen"] == 1.0


TEXT = "<think> </think> <answer> </answer> <glue> </glue> 3 to 5 B [[0,0,1,1]] [(1,2)] 1e999"


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*TEXT.split(), " "]) | st.text(max_size=5)).map("".join))
def test_scores_are_in_range_for_any_text(text):
    for sample in RECORDS:
        task = TASKS[sample.task]
        for think in (False, True):
            scores = task.score(text, sample, 9.5, think).values()
            assert all(math.isfinite(v) and 0.0 <= v <= 1.0 for v in scores)
        for value in metrics_of(task, task.parse(text, sample), sample).values():
            assert 0.0 <= value <= 1.0


PLAIN = {
    "temporal_grounding": r".*<answer>\s*(from )?\d+(\.\d+)? (to|and) \d+(\.\d+)?\s*</answer>",
    "grounded_qa": r".*</answer>\s*<glue>\[(\(\d+(\.\d+)?, \d+(\.\d+)?\)(, |(?=\])))+\]</glue>",
    "tracking": r"(<think>[^<]*</think>)?\s*<answer>[^<(]*</answer>",
}


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"VCR1_TEST_DATA has no {GOLDEN.name}")
def test_plain_completions_score_as_released():
    """Where a completion meets none of the released functions' faults, the scores agree."""
    compared = dict.fromkeys(PLAIN, 0)
    for line in GOLDEN.read_text().splitlines():
        row = json.loads(line)
        answer, name = row["solution"], row["task"]
        if not re.fullmatch(PLAIN[name], row["completion"].strip(), re.DOTALL | re.ASCII):
            continue
        if row["completion"].count("<glue>") > 1:
            continue
        if name == "grounded_qa":
            answer = answer | {"answer": answer["answer"].strip("()")}
        one = record(name, {}, answer)
        score = TASKS[name].score(row["completion"], one)
        iou = score["iou"]
        if name == "tracking" and (boxes := TASKS[name].parse(row["completion"], one)):
            iou = (
                7 * iou + box_ious(boxes[:1], answer[:1])[0]
            ) / 8  # the released mean is over all
        assert iou == pytest.approx(row["iou"], abs=1e-9), row
        compared[name] += 1
    assert all(count > 2 for count in compared.values()), compared


def test_the_most_common_answer_is_found_in_one_pass():
    compared = []

    class Word(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    answers = [Word(f"w{i % 200}") for i in range(401)]
    assert most_common(answers) == "w0" and len(compared) < 10 * len(answers)
    assert most_common(["b", "a", "b", "a", "c"]) == "a"


# --- batches


@pytest.mark.parametrize("name", list(TASKS))
def test_built_in_tasks_pass_the_check_of_registered_ones(name):
    check_task(TASKS[name])


answers = st.sampled_from([*TEXT.split(), *(TASKS[one.task].target(one) for one in RECORDS)])
completions = st.lists(answers | st.sampled_from([" ", "A", "2 to 4"]), max_size=6).map("".join)


@pytest.mark.parametrize("sample", RECORDS, ids=by_name)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(completions, st.none() | st.floats(1, 12)), max_size=8))
def test_a_batch_is_each_completion_alone(sample, cases):
    task = TASKS[sample.task]
    cases = [(task.target(sample), 10.0), *cases]
    texts, durations = [text for text, _ in cases], [duration for _, duration in cases]
    records = [sample] * len(cases)
    parsed = task.answers(texts, records)
    for think in (None, False, True):
        columns = task.score_batch(parsed, records, durations, think=think)
        alone = [task.score(text, sample, d, think) for text, d in cases]
        assert rows(columns, len(cases)) == alone
    measured = task.measure([one.prediction for one in parsed], records)
    assert rows(measured, len(cases)) == [
        metrics_of(task, task.parse(text, sample), sample) for text in texts
    ]


seconds = st.integers(0, 600).map(lambda n: n / 10)
rising = st.tuples(seconds, st.integers(1, 100)).map(lambda p: [p[0], round(p[0] + p[1] / 10, 1)])
sides = st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda p: p[0] < p[1])
boxes = st.tuples(sides, sides).map(
    lambda p: [p[0][0] / 100, p[1][0] / 100, p[0][1] / 100, p[1][1] / 100]
)
words = st.lists(st.sampled_from(["a", "dog", "runs", "it", "jumps"]), min_size=1).map(" ".join)
numbers = st.integers(-999, 999).map(lambda n: n / 100)


def apart(spans):
    """The spans one after the other, so that rounding their union to tenths is exact."""
    out, end = [], 0.0
    for start, stop in spans:
        out.append([round(end + start, 1), round(end + stop, 1)])
        end = out[-1][1] + 0.1
    return out


@st.composite
def tubes(draw):
    start, end = draw(rising)
    inside = st.integers(math.ceil(start - 0.9), math.floor(end + 0.9))
    whole = inside.filter(lambda s: s >= 0 and start - 1 < s < end + 1).map(str)
    return {"time": [start, end], "boxes": draw(st.dictionaries(whole, boxes, min_size=1))}


ANNOTATED = {
    "temporal_grounding": rising,
    "moment_retrieval": st.lists(rising, min_size=1, max_size=5).map(apart),
    "tracking": st.lists(boxes, min_size=2, max_size=12),
    "spatio_temporal_grounding": tubes(),
    "grounded_qa": st.fixed_dictionaries(
        {"answer": st.sampled_from("ABC"), "glue": st.lists(rising, min_size=1, max_size=5)}
    ),
    "image_grounded_qa": st.fixed_dictionaries({"answer": st.sampled_from("ABC"), "glue": boxes}),
    "multiple_choice": st.sampled_from("ABC"),
    "classification": st.sampled_from(OPTIONS),
    "caption": st.lists(st.sampled_from(["A dog runs.", "It jumps."]), min_size=1),
    "spatial_grounding": boxes,
    "numeric": st.integers(-999, 999) | numbers,
    "regression": numbers.filter(bool),
    "boolean": st.booleans(),
    "ocr": words,
    "open_ended": words,
}


@pytest.mark.parametrize("name", list(TASKS))
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_annotated_answer_makes_the_round_trip(name, data):
    """The target of any record that passes the task's check earns every reward and metric."""
    task = TASKS[name]
    options = OPTIONS if task.label else ()
    sample = replace(task.example, answer=data.draw(ANNOTATED[name]), options=options)
    task.check(sample)
    scores = task.score(f"<think>so</think>{task.target(sample)}", sample, think=True)
    assert scores == dict.fromkeys(task.reward_names, pytest.approx(1.0))
    prediction = task.parse(task.target(sample), sample)
    assert all(v == pytest.approx(1.0) for v in metrics_of(task, prediction, sample).values())
