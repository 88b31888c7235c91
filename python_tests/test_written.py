"""Targets of fine-tuning: every task's own answer reads back and earns its own reward."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards import box_ious, span_set_ious
from vcr1_fast.tasks import TASKS, FieldError, Record
from vcr1_fast.tasks.written import LEAST_OVERLAP, box_text, number_text, span_texts

words = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30
).filter(str.strip)
numbers = st.integers(-(10**11), 10**11) | st.floats(-1e11, 1e11) | st.floats(-10, 10)
seconds = st.floats(0, 1e4) | st.integers(0, 100) | st.decimals(0, 500, places=2).map(float)
spans = st.tuples(seconds, seconds).filter(lambda s: abs(s[1] - s[0]) > 1e-6).map(sorted)
side = (
    st.tuples(st.floats(0, 1), st.floats(0, 1))
    .filter(lambda s: abs(s[1] - s[0]) > 1e-6)
    .map(sorted)
)
boxes = st.tuples(side, side).map(lambda s: [s[0][0], s[1][0], s[0][1], s[1][1]])
options = st.lists(words, min_size=2, max_size=5, unique_by=lambda text: text.strip().lower())


def letters(choices):
    return st.sampled_from([chr(ord("A") + i) for i in range(len(choices))])


def grounded(glue):
    return options.flatmap(
        lambda o: st.builds(lambda a, g: ({"answer": a, "glue": g}, o), letters(o), glue)
    )


ANSWERS = {
    "temporal_grounding": spans.map(lambda a: (a, ())),
    "tracking": st.lists(boxes, min_size=2, max_size=9).map(lambda a: (a, ())),
    "grounded_qa": grounded(st.lists(spans, min_size=1, max_size=16)),
    "multiple_choice": options.flatmap(lambda o: letters(o).map(lambda a: (a, o))),
    "classification": options.flatmap(lambda o: st.sampled_from(o).map(lambda a: (a, o))),
    "caption": st.lists(words, min_size=1, max_size=4).map(lambda a: (a, ())),
    "spatial_grounding": boxes.map(lambda a: (a, ())),
    "image_grounded_qa": grounded(boxes),
    "moment_retrieval": st.lists(spans, min_size=1, max_size=16).map(lambda a: (a, ())),
    "spatio_temporal_grounding": st.builds(
        lambda start, tube: (
            {
                "time": [start, start + len(tube)],
                "boxes": {str(int(start) + i): box for i, box in enumerate(tube)},
            },
            (),
        ),
        seconds,
        st.lists(boxes, min_size=1, max_size=6),
    ),
    "numeric": numbers.map(lambda a: (a, ())),
    "regression": numbers.map(lambda a: (a, ())),
    "boolean": st.booleans().map(lambda a: (a, ())),
    "ocr": words.map(lambda a: (a, ())),
    "open_ended": words.map(lambda a: (a, ())),
}
PROMPT = {"question": "q", "event": "e", "object": "o", "instruction": "i"}
TEXTS = ("multiple_choice", "numeric", "regression", "boolean")
"""Tasks whose answers are read back exactly."""


def test_every_task_has_answers_here():
    assert set(ANSWERS) == set(TASKS)


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_target_earns_its_own_reward(name, data):
    answer, choices = data.draw(ANSWERS[name])
    record = Record("r", name, "v.mp4", PROMPT, answer, options=tuple(choices))
    task = TASKS[name]
    try:
        task.check(record)
    except FieldError:  # a record that no completion can answer is refused when it is loaded
        assert name in ("classification", "caption", "ocr", "open_ended")
        return
    completion = task.target(record)
    scores = task.score(completion, record, None)
    assert scores["format"] == 1.0, completion
    assert all(value >= LEAST_OVERLAP for value in scores.values()), (completion, scores)
    prediction = task.parse(completion, record)
    if name in TEXTS:
        assert prediction == answer
    if name in ("grounded_qa", "image_grounded_qa"):
        assert prediction.letter == answer["answer"]
    if name == "classification":
        assert prediction == answer
        assert (
            [scores["accuracy"]] == task.batch_metrics([prediction], [record])["accuracy"] == [1.0]
        )
    thinking = task.score(f"why\n</think>\n{completion}", record, None, True)
    assert thinking == task.score(f"<think>why</think>{completion}", record, None, True) == scores


@settings(deadline=None)
@given(numbers)
def test_numbers_are_written_in_digits_and_read_back(value):
    text = number_text(value)
    assert float(text) == value
    assert "e" not in text or 0 < abs(value) < 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1000000, "1000000"),
        (12345.678, "12345.678"),
        (2.5, "2.5"),
        (-0.0, "0"),
        (1e6, "1000000"),
        (123456789012, "123456789012"),
        (0.1, "0.1"),
        (1e-30, "1e-30"),
    ],
)
def test_number_text(value, text):
    assert number_text(value) == text


def test_decimals_grow_only_where_rounding_costs():
    assert span_texts([[2.0, 6.0]]) == [("2.0", "6.0")]
    assert span_texts([[12.34, 20.17]]) == [("12.3", "20.2")]
    assert span_texts([[3.16, 3.24]]) == [("3.16", "3.24")]
    assert span_texts([[3.0, 3.0]]) == [("3.0", "3.0")]
    assert box_text([0.1, 0.2, 0.5, 0.6]) == "[0.10, 0.20, 0.50, 0.60]"
    assert box_text([0.5, 0.5, 0.504, 0.6]) == "[0.500, 0.500, 0.504, 0.600]"
    assert box_text([0.996, 0.2, 1.0, 0.3]) == "[0.996, 0.200, 1.000, 0.300]"


@settings(deadline=None)
@given(st.lists(spans, min_size=1, max_size=5), boxes)
def test_what_is_written_overlaps_what_is_annotated(rows, box):
    written = [list(map(float, texts)) for texts in span_texts(rows)]
    assert span_set_ious([written], [rows])[0] >= LEAST_OVERLAP
    read = list(map(float, box_text(box)[1:-1].split(",")))
    assert box_ious([read], [box])[0] >= LEAST_OVERLAP


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["snake_case", "snakecase"], "snake_case"),
        (["C*", "C"], "C*"),
        (["yes", "Yes."], "yes"),
        (["__init__", "init"], "__init__"),
        (["...", '"'], "..."),
        (["a  b", "a c"], "a  b"),
    ],
)
def test_labels_that_fall_together_are_reported_apart(choices, answer):
    record = Record("r", "classification", "v", PROMPT, answer, options=tuple(choices))
    task = TASKS["classification"]
    task.check(record)
    completion = task.target(record)
    assert task.score(completion, record) == {"format": 1.0, "accuracy": 1.0}
    assert task.batch_metrics([task.parse(completion, record)], [record]) == {"accuracy": [1.0]}
    (other,) = set(choices) - {answer}
    wrong = f"<answer>{other}</answer>"
    assert task.score(wrong, record) == {"format": 1.0, "accuracy": 0.0}
    assert task.batch_metrics([task.parse(wrong, record)], [record]) == {"accuracy": [0.0]}


def test_a_label_between_two_options_is_none_of_them():
    record = Record("r", "classification", "v", PROMPT, "yes", options=("yes", "Yes."))
    assert TASKS["classification"].parse("<answer>YES</answer>", record) is None


@pytest.mark.parametrize(
    ("name", "answer", "options"),
    [
        ("classification", "low", ("low", " low")),
        ("ocr", "</answer>", ()),
        ("ocr", "a <think> b", ()),
        ("open_ended", "!!!", ()),
        ("open_ended", "<answer>x</answer>", ()),
        ("caption", ["a dog runs", "!!!"], ()),
        ("moment_retrieval", [[i, i + 0.5] for i in range(17)], ()),
        ("spatio_temporal_grounding", {"time": [0, 9], "boxes": {"9" * 5000: [0, 0, 1, 1]}}, ()),
    ],
)
def test_answers_that_no_completion_can_give_are_refused(name, answer, options):
    with pytest.raises(FieldError):
        TASKS[name].check(Record("r", name, "v", PROMPT, answer, options=options))


def test_a_prefilled_think_tag_is_known():
    record = Record("r", "temporal_grounding", "v", PROMPT, [1, 2])
    task = TASKS["temporal_grounding"]
    good = "it starts at one\n</think>\n<answer>1.0 to 2.0</answer>"
    assert task.score(good, record, 4.8, True) == {"format": 1.0, "iou": 1.0}
    assert task.score(good, record, 4.8, False)["format"] == 0.0
    # Not so: an empty reasoning, a second closing tag, an answer inside the reasoning.
    assert task.score("</think><answer>1 to 2</answer>", record, 4.8, True)["format"] == 0.0
    twice = "a</think></think><answer>1 to 2</answer>"
    assert task.score(twice, record, 4.8, True)["format"] == 0.0
    inside = "<answer>1 to 2</answer></think>"
    assert task.score(inside, record, 4.8, True) == {"format": 0.0, "iou": 0.0}
