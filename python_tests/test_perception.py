"""Several passes over a clip: the frames of each, by hand, and a scripted model's questions."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcr1_fast.data.records import Record
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import Clip, VideoError
from vcr1_fast.engines import sampler as engines
from vcr1_fast.evaluate import greedy
from vcr1_fast.evaluate.config import EvalConfig, PerceptionConfig
from vcr1_fast.evaluate.perception import in_real_time, key_spans, same_spans, zoom
from vcr1_fast.evaluate.run import evaluate


def test_frames_by_hand():
    # 10 s, evidence from 4 to 6 at 1.5: 8 + 2 * 1.5 = 11 counted seconds, 1.1 of them a second.
    played = zoom([(4.0, 6.0)], 10.0, 1.5)
    assert played.real == (0.0, 4.0, 6.0, 10.0)
    assert played.shown == pytest.approx((0.0, 40 / 11, 70 / 11, 10.0))
    times = played.real_times(range(10))
    by_hand = [0.0, 1.1, 2.2, 3.3, 4 + (4.4 - 4) / 1.5, 5.0, 4 + (6.6 - 4) / 1.5, 6.7, 7.8, 8.9]
    assert times == pytest.approx(by_hand)
    assert sum(4 <= time <= 6 for time in times) == 3  # of 10 frames; the plain rule has 4 and 5
    assert played.real_spans([(40 / 11, 70 / 11)]) == [pytest.approx((4.0, 6.0))]


def test_two_spans_by_hand():
    # 12 s, evidence 0 to 2 and 6 to 8 at 2: 16 counted seconds; frames every 2 s are 2 2/3 apart.
    times = zoom([(0.0, 2.0), (6.0, 8.0)], 12.0, 2.0).real_times([0, 2, 4, 6, 8, 10, 12])
    by_hand = [0, 4 / 3, 2 + 4 / 3, 6.0, 6 + 4 / 3, 8 + 4 / 3, 12]
    assert times == pytest.approx(by_hand)


@pytest.mark.parametrize("spans", [[], [(0.0, 7.0)]])
def test_nothing_or_everything_as_evidence_is_the_plain_rule(spans):
    times = np.linspace(0, 7, 15)
    assert zoom(spans, 7.0, 1.5).real_times(times) == pytest.approx(times.tolist())


borders = st.lists(st.floats(-5, 25, allow_subnormal=False), min_size=2, max_size=10)


@given(borders, st.floats(1, 10), st.integers(1, 4))
def test_any_spans_give_ascending_times_in_the_clip_denser_where_the_evidence_is(
    values, density, limit
):
    spans = key_spans(list(zip(values[::2], values[1::2], strict=False)), 20.0, limit)
    assert len(spans) <= limit
    times = np.array(zoom(spans, 20.0, density).real_times(np.linspace(0, 20, 401)))
    assert times[0] == 0 and times[-1] == pytest.approx(20) and (np.diff(times) >= -1e-9).all()
    covered = sum(end - start for start, end in spans)
    inside = sum(np.sum((times >= start) & (times <= end)) for start, end in spans)
    expected = 401 * density * covered / (density * covered + 20 - covered)
    assert inside == pytest.approx(expected, abs=2 + 2 * len(spans))


def test_evidence_is_clipped_limited_and_merged():
    stated = [(8.0, 99.0), (-3.0, 1.0), (5.0, 4.0), (2.0, 2.0), (30.0, 40.0), (0.5, 2.0), (6, 7)]
    assert key_spans(stated, 10.0, 3) == ((0.0, 2.0), (8.0, 10.0))  # (6, 7) is the fourth
    assert key_spans([(float("nan"), 2.0), (1.0, float("inf"))], 10.0, 3) == ()
    assert key_spans(None, 10.0, 3) == ()
    assert same_spans([(1.0, 2.0)], [(1.2, 1.9)], 0.25)
    assert not same_spans([(1.0, 2.0)], [(1.3, 2.0)], 0.25)
    assert not same_spans([(1.0, 2.0)], [], 9.0)


def test_seconds_of_the_answer_are_those_of_the_clip():
    played = zoom([(4.0, 6.0)], 10.0, 1.5)
    text = "<answer>B</answer><glue>[(5.0, 7.0), (0, 99)]</glue>"
    assert (
        in_real_time(text, played) == "<answer>B</answer><glue>[(5.00, 6.70), (0.00, 10.00)]</glue>"
    )
    for other in (
        "<answer>B</answer>",
        "<glue>at the end</glue>",
        "<glue>[(2, 1)]</glue>",
        "<glue>",
    ):
        assert in_real_time(other, played) == other
    assert in_real_time("<glue>" * 20_000 + "[(1, 2)]", played).endswith("[(1, 2)]")


def question(name, task="multiple_choice"):
    answer = "B" if task == "multiple_choice" else {"answer": "B", "glue": [[4.0, 6.0]]}
    prompt = {"question": "Which one?"} if task != "temporal_grounding" else {"event": "it moves"}
    return Record(
        id=name,
        task=task,
        video=f"{name}.mp4",
        prompt=prompt,
        answer=[1.0, 2.0] if task == "temporal_grounding" else answer,
        options=("circle", "square"),
    )


@pytest.fixture
def script(monkeypatch):
    """Answers by record and pass in the place of a model, and what was shown and asked for them.
    Clips have 10 s; ten frames, one a second, unless other times are asked for."""
    said, shown, calls, texts = {}, {}, [], []

    class Reader:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, requests):
            for request in requests:
                name = request.path.removesuffix(".mp4")
                times = np.arange(10.0) if request.times is None else np.array(request.times)
                if name == "lost" and request.times is not None:
                    yield VideoError(request.path, "gone")
                    continue
                fps = 1.0 if request.times is None else 123.0
                # Every frame shows its time.
                frames = np.tile(times[:, None, None, None], (1, 2, 2, 3))
                yield Clip(frames, times, fps, 10.0, request.path)

    @dataclass
    class Processor:
        mrope: str = ""
        video_text: str = ""
        frames: FrameConfig = field(default_factory=FrameConfig)

        def with_frames(self, frames, **_):
            return Processor(frames=frames)

        def fit(self):
            return None

        def prompt(self, text, clips, *, system, think):
            name = clips[0].path.removesuffix(".mp4")
            assert (self.mrope, self.video_text) == ("installed", "installed")  # the run's settings
            # Positions and times as text stay those of the plain clip: answers are mapped back
            # from them.
            assert clips[0].fps == 1.0 and clips[0].times.tolist() == PLAIN
            real = clips[0].frames[:, 0, 0, 0].tolist()
            shown.setdefault(name, []).append(("glue" in text, real))
            texts.append(text)
            return [name] * 7

    def roll(model, processor, prompts, *_, vision, **__):
        names = [prompt[0] for prompt in prompts]
        for name, known in zip(names, vision, strict=True):
            # The encoder's features are used again for the same frames, and for no others.
            times = [times for _, times in shown[name]]
            assert known == (times[-1] if times[-1:] == times[-2:-1] else None)
        calls.append(names)
        texts = [said[name][len(shown[name]) - 1] for name in names]
        return SimpleNamespace(
            texts=[[text] for text in texts],
            tokens=[[range(len(text))] for text in texts],
            finished=[[True] for _ in texts],
            vision=[shown[name][-1][1] for name in names],
        )

    monkeypatch.setattr(greedy, "ClipReader", Reader)
    monkeypatch.setattr(engines, "rollout", roll)
    return SimpleNamespace(said=said, shown=shown, calls=calls, texts=texts, processor=Processor())


def run(script, records, passes=3, think=False):
    config = EvalConfig(
        frames=FrameConfig(),
        perception=PerceptionConfig(passes=passes),
        think=think,
        mrope="installed",
        video_text="installed",
        resize="worker",  # else the model says where
    )
    return evaluate(None, script.processor, records, config)


PLAIN = list(map(float, range(10)))
CLOSER = zoom([(4.0, 6.0)], 10.0, 1.5)
A, B = "<answer>A</answer>", "<answer>B</answer>"


def test_the_evidence_of_a_look_is_shown_more_densely_in_the_next(script):
    script.said["q"] = [f"{A}<glue>[(4.0, 6.0)]</glue>", f"{A}<glue>[(1.0, 2.0)]</glue>", B]
    result = run(script, [question("q")])
    asked, times = zip(*script.shown["q"], strict=True)
    assert asked == (True, True, False)  # evidence is asked for before the last pass
    assert times[0] == PLAIN
    assert list(times[1]) == CLOSER.real_times(PLAIN)
    # 1 to 2 s of what was shown is 1.1 to 2.2 s of the clip.
    assert list(times[2]) == pytest.approx(zoom([(1.1, 2.2)], 10.0, 1.5).real_times(PLAIN))
    assert result.tasks[0].metrics["accuracy"] == 1.0  # the last pass's answer counts
    first, second, third = result.predictions[0].completion.passes
    assert first.spans == () and second.spans == ((4.0, 6.0),)
    assert third.spans[0] == pytest.approx((1.1, 2.2))
    line = json.dumps(result.predictions[0].as_line())
    assert "seconds" not in line and line.count('"frames": 10') == 3


@pytest.mark.parametrize(
    "text",
    [A, f"{A}<glue>[]</glue>", f"{A}<glue>soon</glue>", f"{A}<glue>[(40, 60)]</glue>", "?"],
)
def test_looks_end_early_where_there_is_nothing_new_to_see(script, text):
    script.said["q"] = [text, B]
    result = run(script, [question("q")], passes=6)
    assert [times for _, times in script.shown["q"]] == [PLAIN, PLAIN]
    assert result.tasks[0].metrics["accuracy"] == 1.0


@pytest.mark.parametrize("think", [False, True])
def test_every_look_asks_for_reasoning_or_none_does(script, think):
    reason = "<think>from 1 to 2</think>" if think else ""
    script.said["q"] = [f"{reason}{A}<glue>[(4.0, 6.0)]</glue>", f"{reason}{B}"]
    result = run(script, [question("q")], passes=2, think=think)
    assert ["<think>" in text for text in script.texts] == [think, think]
    assert result.predictions[0].completion.passes[1].spans == ((4.0, 6.0),)
    assert result.tasks[0].metrics["accuracy"] == 1.0


def test_looks_end_early_where_the_evidence_repeats(script):
    # The second pass names, in its own seconds, what it was shown: 40/11 to 70/11 is 4 to 6.
    script.said["q"] = [f"{A}<glue>[(4, 6)]</glue>", f"{A}<glue>[(3.7, 6.4)]</glue>", B]
    run(script, [question("q")], passes=6)
    times = [times for _, times in script.shown["q"]]
    assert times == [PLAIN, CLOSER.real_times(PLAIN), CLOSER.real_times(PLAIN)]


def test_records_of_a_batch_are_asked_together_and_others_once(script):
    glue = "<glue>[(4, 6)]</glue>"
    script.said |= {
        "q": [A + glue, A + "<glue>[(0, 1)]</glue>", B],
        "g": [A, B + "<glue>[(5.0, 7.0)]</glue>"],
        "t": ["<answer>1.0 to 2.0</answer>"],
        "lost": [A + glue],
    }
    records = [
        question("q"),
        question("g", "grounded_qa"),
        question("t", "temporal_grounding"),
        question("lost"),
    ]
    result = run(script, records)
    assert script.calls == [["q", "g", "lost"], ["q"], ["q", "g", "t"]]
    assert [item.record_id for item in result.quarantined] == ["lost"]
    assert {task.task: task.metrics[task.primary] for task in result.tasks} == {
        "multiple_choice": 1.0,
        "grounded_qa": 1.0,
        "temporal_grounding": 1.0,
    }
    # g was never zoomed: its seconds stand as they are.
    assert result.predictions[1].prediction.spans == ((5.0, 7.0),)
    costs = {cost.number: cost for cost in result.cost}
    assert [costs[number].records for number in (1, 2, 3, 0)] == [3, 2, 1, 3]
    assert costs[0].frames == pytest.approx((30 + 20 + 10) / 3)
    assert costs[0].prompt_tokens == pytest.approx(7 * 6 / 3)
    assert costs[0].tokens == pytest.approx(
        sum(len(text) for name in "qgt" for text in script.said[name]) / 3
    )


def test_the_last_answer_is_scored_in_seconds_of_the_clip(script):
    shown = ", ".join(map(str, CLOSER.shown[1:3]))
    script.said["g"] = [f"{A}<glue>[(4, 6)]</glue>", f"{B}<glue>[({shown})]</glue>"]
    result = run(script, [question("g", "grounded_qa")], passes=2)
    assert result.tasks[0].metrics["mIoU"] == pytest.approx(1.0, abs=5e-3)
    assert result.tasks[0].metrics["Acc@GQA"] == 1.0


def test_one_look_is_the_default_and_settings_are_checked(script):
    script.said["q"] = [B]
    result = run(script, [question("q")], passes=1)
    assert script.calls == [["q"]] and [cost.number for cost in result.cost] == [1]
    assert EvalConfig().perception.passes == 1
    for bad in ({"passes": 0}, {"max_spans": 0}, {"density": 0.5}, {"density": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PerceptionConfig(**bad)
