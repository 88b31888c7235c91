"""Prompts from a file: what is filled in, what is refused, and that runs use them."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import configure, write_inputs

from vcr1_fast import cli
from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import (
    PromptTemplate,
    load_prompts,
    placeholder_names,
    prompts_from,
)
from vcr1_fast.train.loop import train

EVENT = Record("a", "temporal_grounding", "a.mp4", {"event": "a {x} opens{{"}, [1.0, 2.0])
TRACK = Record(
    "b", "tracking", "b.mp4", {"object": "dog"}, [[0.125, 0.25, 0.5, 0.75], [0, 0, 1, 1]]
)
CHOICE = Record(
    "c", "multiple_choice", "c.mp4", {"question": "Which?"}, "B", options=("red", "blue's")
)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_placeholders_are_filled_once_and_doubled_braces_are_braces(tmp_path):
    text = 'Find "{event}" as {{"answer"}}: <answer>12.54 to 17.83</answer>'
    path = write(tmp_path / "p.json", {"temporal_grounding": {"no_think": text}})
    before = TASKS["temporal_grounding"]
    with prompts_from(path, TASKS, think=False):
        filled = TASKS["temporal_grounding"].prompt(EVENT, False)
        with pytest.raises(ValueError, match="no think text"):
            TASKS["temporal_grounding"].prompt(EVENT, True)
    # The text of a record is not parsed as a template.
    assert filled == 'Find "a {x} opens{{" as {"answer"}: <answer>12.54 to 17.83</answer>'
    assert TASKS["temporal_grounding"] is before


def test_an_image_is_not_asked_for_times():
    still = dataclasses.replace(CHOICE, video=None, image="c.png")
    video, image = (TASKS["multiple_choice"].prompt(one, True) for one in (CHOICE, still))
    assert ", giving the times you rely on as <timestep>2.0 to 3.5</timestep>. Then" in video
    assert "inside <think> </think>. Then reply" in image and "time" not in image


def test_yaml_with_both_forms_and_several_tasks(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        """
tracking:
  no_think: "{object} from {box_list}, {count} boxes in <answer>"
  think: "<think> {object} from {box}, <answer>"
multiple_choice:
  think: "<think> {question} {option_list} <answer>"
""",
    )
    templates = load_prompts(path, TASKS)
    assert set(templates) == {"tracking", "multiple_choice"}
    with prompts_from(path, TASKS, think=True):
        assert TASKS["tracking"].prompt(TRACK, True) == (
            "<think> dog from [0.12, 0.25, 0.50, 0.75], <answer>"
        )
        assert TASKS["tracking"].prompt(TRACK, False) == (
            "dog from [0.125, 0.25, 0.5, 0.75], 2 boxes in <answer>"
        )
        # As Python writes a list of texts, quotes included.
        shown = "<think> Which? ['(A) red', \"(B) blue's\"] <answer>"
        assert TASKS["multiple_choice"].prompt(CHOICE, True) == shown
        own = TASKS["temporal_grounding"].prompt(EVENT, False)
    assert own == TASKS["temporal_grounding"].prompt(EVENT, False)


GOOD = "{event} <answer>"
BAD = {
    "unknown task": ({"grounding": {"no_think": GOOD}}, "unknown task 'grounding'"),
    "unknown kind": ({"ocr": {"thinking": GOOD}}, "expected think and no_think"),
    "no kinds": ({"ocr": {}}, "ocr: expected think and no_think"),
    "a text": ({"ocr": "{question} <answer>"}, "ocr: expected think and no_think"),
    "empty": ({}, "expected task"),
    "a list": ([1], "expected task"),
    "number": ({"ocr": {"think": 3}}, "expected a text, got 3"),
    "lacks its field": (
        {"temporal_grounding": {"no_think": "When? <answer>"}},
        r"temporal_grounding.no_think: {event} is missing",
    ),
    "lacks one of two": (
        {"tracking": {"no_think": "{object} <answer>"}},
        r"{box} or {box_list} is missing",
    ),
    "unknown field": (
        {"temporal_grounding": {"no_think": "{event} {question} <answer>"}},
        r"unknown field {question}; the task has {event}, {times}",
    ),
    "the released placeholder": (
        {"temporal_grounding": {"no_think": "[EVENT] <answer>"}},
        r"{event} is missing",
    ),
    "attribute": ({"temporal_grounding": {"no_think": "{event.__class__} <answer>"}}, "doubled"),
    "index": ({"temporal_grounding": {"no_think": "{event[0]} <answer>"}}, "doubled"),
    "conversion": ({"temporal_grounding": {"no_think": "{event!r} <answer>"}}, "doubled"),
    "width": ({"temporal_grounding": {"no_think": "{event:>99999} <answer>"}}, "doubled"),
    "position": ({"temporal_grounding": {"no_think": "{} {event} <answer>"}}, "doubled"),
    "open": ({"temporal_grounding": {"no_think": "{event} <answer> {"}}, "doubled"),
    "no answer tag": ({"temporal_grounding": {"no_think": "{event}?"}}, "ask for <answer>"),
    "no glue tag": (
        {"grounded_qa": {"no_think": "{question} {options} <answer>"}},
        "ask for <glue>",
    ),
    "no think tag": ({"temporal_grounding": {"think": GOOD}}, "ask for <think>"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_task_is_refused(tmp_path, name):
    content, reason = BAD[name]
    path = write(tmp_path / "p.json", content)
    with pytest.raises(ValueError) as caught:
        load_prompts(path, TASKS)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"p\.yaml: not YAML"):
        load_prompts(write(tmp_path / "p.yaml", "a: [}"), TASKS)
    with pytest.raises(ValueError, match=r"p\.yaml: not YAML"):
        load_prompts(write(tmp_path / "p.yaml", "a: !!python/name:os.system"), TASKS)
    with pytest.raises(ValueError, match=r"p\.json: not JSON"):
        load_prompts(write(tmp_path / "p.json", "[" * 100_000), TASKS)
    with pytest.raises(OSError, match="none"):
        load_prompts(tmp_path / "none.yaml", TASKS)


def test_a_run_that_needs_the_other_form_is_refused_at_once(tmp_path):
    path = write(tmp_path / "p.json", {"temporal_grounding": {"no_think": GOOD}})
    with (
        pytest.raises(ValueError, match="temporal_grounding has no think text"),
        prompts_from(path, TASKS, think=True),
    ):
        pass
    with pytest.raises(RuntimeError), prompts_from(path, TASKS, think=False):
        raise RuntimeError
    assert TASKS["temporal_grounding"].prompt_template.think is not None  # restored


@given(st.text(st.sampled_from("{}ab_1.[ ")))
def test_names_are_those_of_the_standard_formatter(text):
    """Where Python's formatter reads plain names, ours reads the same; it takes nothing more."""
    from string import Formatter

    try:
        parsed = [piece[1:] for piece in Formatter().parse(text) if piece[1] is not None]
        plain = all(n.isidentifier() and not spec and not conv for n, spec, conv in parsed)
    except ValueError:
        plain = False
    if not plain:
        with pytest.raises(ValueError, match="doubled"):
            placeholder_names(text)
        return
    assert placeholder_names(text) == [name for name, _, _ in parsed]
    values = {name: f"<{name}>" for name in placeholder_names(text)}
    assert PromptTemplate(text, None).fill(False, values.__getitem__) == text.format(**values)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_training_and_evaluation_ask_in_the_words_of_the_file(inputs, tmp_path, capsys):
    model, records = inputs
    text = "Given the event {event}, name its span within <answer></answer>."
    path = write(tmp_path / "p.json", {"temporal_grounding": {"no_think": text}})
    train(configure(model, records, tmp_path / "run", f"data.prompts={path}"))
    rows = [json.loads(row) for row in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    asked = {row["prompt"] for row in rows if row["task"] == "temporal_grounding"}
    assert asked and all(prompt.startswith("Given the event ") for prompt in asked)
    assert {row["task"] for row in rows} > {"temporal_grounding"}

    events = [r for r in load_records(records) if r.task == "temporal_grounding"][:2]
    write_records(tmp_path / "events.jsonl", events)
    settings = {"max_new_tokens": 8, "decode_workers": 0}
    outputs = []
    for number, prompts in enumerate((None, str(path))):
        config = EvalConfig(prompts=prompts, **settings)
        out = tmp_path / str(number)
        evaluation = evaluate_checkpoint(model, tmp_path / "events.jsonl", out, config)
        outputs.append([item.completion.text for item in evaluation.predictions])
    assert outputs[0] != outputs[1]
    with pytest.raises(ValueError, match="another evaluation: prompts was"):
        evaluate_checkpoint(model, tmp_path / "events.jsonl", tmp_path / "0", config)

    write(path, {"temporal_grounding": {"no_think": "When? <answer>"}})
    for command in ("train", "sft", "eval"):
        arguments = [command, "--model", str(model), "--data", str(records), "--prompts", str(path)]
        assert cli.main([*arguments, "--output", str(tmp_path / command)]) == 2
        assert "temporal_grounding.no_think: {event} is missing" in capsys.readouterr().err


def test_the_answer_of_the_released_checkpoints_is_read():
    """Their prompt asks for two decimals and reasoning; both parse as ours do."""
    task = TASKS["temporal_grounding"]
    answer = "<think>at <timestep>12 to 18</timestep></think>\n<answer>12.54 to 17.83</answer>"
    assert task.parse(answer, EVENT) == (12.54, 17.83)
    boxes = "<answer>[[0.1, 0.2, 0.5, 0.8], [0.125, 0.2, 0.5, 0.8]]</answer>"
    assert TASKS["tracking"].parse(boxes, TRACK) is not None
