"""An evaluation whose captions a model judges, and what another judge changes in its folder."""

import json

import pytest

from vcr1_fast import cli
from vcr1_fast.data.records import Record, write_records
from vcr1_fast.evaluate.completions import Completion
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.identity import claim_folder, given_identity
from vcr1_fast.evaluate.run import evaluate_predictions
from vcr1_fast.evaluate.score import score
from vcr1_fast.rewards.judge import JudgeConfig, ModelJudge, Recorded


def test_captions_are_judged_by_the_replies_a_file_holds(tmp_path):
    captions = {"c1": "A man opens a door. He sings.", "c2": "Rain falls."}
    events = {"c1": ["a man opens a door", "a dog barks"], "c2": ["it rains"]}
    records = [
        Record(name, "caption", "v.mp4", prompt={"instruction": "Tell."}, answer=reported)
        for name, reported in events.items()
    ]
    data, said = tmp_path / "test.jsonl", tmp_path / "said.jsonl"
    write_records(data, records)
    texts = {name: f"<answer>{text}</answer>" for name, text in captions.items()}
    lines = [json.dumps({"id": name, "completion": text}) for name, text in texts.items()]
    said.write_text("\n".join(lines) + "\n")

    def model(prompts):
        """Finds the door and the rain, and draws two and one events."""
        for prompt in prompts:
            if "yes or no" in prompt:
                reported = prompt[prompt.index("Event: ") :]
                yield "Yes." if "door" in reported or "rain" in reported.lower() else "perhaps"
            else:
                yield "a man opens a door\nhe sings" if "door" in prompt else "rain falls"

    recorded = ModelJudge(Recorded(model, "judge", tmp_path / "replies.jsonl"))
    answered = [(item, Completion(item.id, texts[item.id])) for item in records]
    score(answered, lambda task, *batch: task.measure(*batch, recorded))

    out = tmp_path / "out"
    paths = ["--predictions", str(said), "--data", str(data), "--output", str(out)]
    options = ["kind=http", "model=judge", f"cache={tmp_path / 'replies.jsonl'}", "replay=true"]
    settings = ["eval.pictured=0", *(f"eval.judge.{option}" for option in options)]
    assert cli.main(["eval", *paths, *settings]) == 0
    summary = json.loads((out / "summary.json").read_text())
    # recall (1/2 + 1) / 2, precision (1/2 + 1) / 2; F1 of these. Words would not find the rain.
    assert summary["tasks"]["caption"]["metrics"] == {"recall": 0.75, "precision": 0.75, "F1": 0.75}
    (note,) = summary["notes"]
    assert "judged by a model" in note and "2 replies were neither" in note
    assert evaluate_predictions(said, data, tmp_path / "words").notes == []

    # Another judge gives other scores; how it is reached does not matter.
    judge = JudgeConfig(kind="http", model="judge", retries=9, cache=str(tmp_path / "none.jsonl"))
    assert given_identity(said, data, EvalConfig(judge=judge))["judge"] == summary["run"]["judge"]
    judge = JudgeConfig(kind="local", model="judge", concurrency=3)
    assert given_identity(said, data, EvalConfig(judge=judge))["judge"] == {
        "kind": "local",
        "model": "judge",
        "max_tokens": 512,
        "concurrency": 3,
    }
    with pytest.raises(ValueError, match=r"judge was .*'model': 'judge'.*, now .*'offline'"):
        evaluate_predictions(said, data, out)


def test_another_judge_is_given_the_same_completions(tmp_path):
    for name in ("completions.0-of-1.jsonl", "summary.json", "predictions.jsonl"):
        (tmp_path / name).touch()
    claim_folder(tmp_path, {"max_new_tokens": 8, "judge": {"kind": "offline"}})
    other = {"kind": "local", "model": "m"}
    claim_folder(tmp_path, {"max_new_tokens": 8, "judge": other}, restart=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"completions.0-of-1.jsonl", "run.json"}
    claim_folder(tmp_path, {"max_new_tokens": 9, "judge": {"kind": "offline"}}, restart=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}
