"""Frame sampling and sizes against formulas written independently, and against transformers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcr1_fast.data.sampling import FrameConfig, frame_indices, smart_nframes
from vcr1_fast.model.qwen2_5_vl.preprocessor import VideoProcessorConfig, smart_resize

# A shared machine may stall any example; examples are counted, not timed.
unhurried = settings(deadline=None)

totals = st.integers(1, 5000)
rates = st.sampled_from([1.0, 7.5, 10.0, 23.976, 25.0, 30000 / 1001, 30.0, 59.94, 120.0])


@unhurried
@given(totals, st.integers(1, 800))
@example(30, 26)  # transformers' float rule gives 27 indices here, the last out of range
def test_hf_indices_are_exact_floors(total, count):
    expected = [math.floor(Fraction(i * total, count)) for i in range(count)]
    assert frame_indices(total, count, "hf").tolist() == expected
    assert expected[0] >= 0 and expected[-1] < total


@unhurried
@given(totals, st.integers(1, 800))
def test_linspace_indices_are_exact_roundings(total, count):
    step = Fraction(total - 1, max(count - 1, 1))
    indices = frame_indices(total, count, "linspace")
    assert indices.tolist() == [round(i * step) for i in range(count)]  # round() is half to even
    assert indices[0] == 0 and (count == 1 or indices[-1] == total - 1)


@unhurried
@given(st.integers(2, 3000), st.integers(2, 400))
def test_linspace_agrees_with_torch_up_to_ties(total, count):
    torch = pytest.importorskip("torch")
    theirs = torch.linspace(0, total - 1, count, dtype=torch.float64).round().numpy()
    differs = theirs != frame_indices(total, count)
    exact = np.arange(count) * (total - 1) / (count - 1)
    assert np.all(np.abs(exact[differs] % 1 - 0.5) < 1e-9)  # only where floats break a tie


@unhurried
@given(totals, rates, st.floats(0.1, 40), st.integers(2, 40), st.integers(0, 800))
def test_counts_follow_both_published_rules(total, video_fps, fps, low, more):
    high = low + more
    wanted = total / video_fps * fps

    qwen = min(min(max(wanted, math.ceil(low / 2) * 2), math.floor(high / 2) * 2), total)
    hf = min(max(wanted, low), math.floor(min(high, total) / 2) * 2, total)
    for rule, value in (("linspace", qwen), ("hf", hf)):
        expected = math.floor(value / 2) * 2
        arguments = dict(fps=fps, min_frames=low, max_frames=high, rule=rule)
        if expected < 2:
            with pytest.raises(ValueError, match=f"it has {total}"):
                smart_nframes(total, video_fps, **arguments)
        else:
            assert smart_nframes(total, video_fps, **arguments) == expected <= total


@pytest.mark.parametrize(
    ("asked", "taken"), [(2, 2), (3, 4), (5, 4), (7, 8), (8, 8), (9, 8), (11, 12)]
)
def test_num_frames_is_rounded_to_even(asked, taken):
    assert smart_nframes(100, 25.0, num_frames=asked) == taken
    assert FrameConfig(num_frames=asked).count(100, 25.0) == taken


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2000), rates, st.floats(0.2, 30))
def test_hf_rule_matches_transformers_where_that_is_in_range(total, video_fps, fps):
    torch = pytest.importorskip("torch")
    count = smart_nframes(total, video_fps, fps=fps, min_frames=2, rule="hf")
    theirs = torch.arange(0, total, total / count).int().numpy()[:count]
    ours = frame_indices(total, count, "hf")
    exact = [Fraction(i * total, count) for i in range(count)]
    near_whole = np.array([abs(x - round(x)) < Fraction(1, 10**3) for x in exact])
    assert np.array_equal(theirs[~near_whole], ours[~near_whole])
    assert np.abs(theirs - ours).max() <= 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 2000), st.integers(0, 20000))
def test_sizes_match_transformers(height, width, low_tokens, more):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    low, high = low_tokens * 784, (low_tokens + more) * 784
    try:
        expected = module.smart_resize(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(ValueError, match=f"{height} x {width}"):
            smart_resize(height, width, min_pixels=low, max_pixels=high)
    else:
        assert smart_resize(height, width, min_pixels=low, max_pixels=high) == expected


@unhurried
@given(st.integers(28, 2200), st.integers(28, 2200), st.integers(1, 384), st.integers(16, 4000))
def test_total_pixels_is_the_budget_of_qwen_vl_utils(height, width, pairs, tokens):
    frames, low, total = 2 * pairs, 16 * 784, tokens * 784
    cap = max(min(768 * 784, total / frames * 2), int(low * 1.05))
    size = smart_resize(
        height, width, min_pixels=low, max_pixels=768 * 784, total_pixels=total, num_frames=frames
    )
    assert size == smart_resize(height, width, min_pixels=low, max_pixels=cap)
    if height * width >= low * 2 and cap > 2 * low and max(size) / min(size) < 4:
        # With room between the limits, the tokens of the clip keep within the budget.
        assert size[0] * size[1] // 784 * pairs <= tokens


def test_default_config_is_the_videochat_r1_budget():
    config = FrameConfig()
    frames = config.count(900, 30.0)
    assert frames == 60
    bounds = VideoProcessorConfig(
        min_pixels=config.min_pixels, max_pixels=config.max_pixels, total_pixels=config.total_pixels
    )
    rows, columns = bounds.size(frames, 360, 640)
    tokens = frames // 2 * (rows // 28) * (columns // 28)
    assert 3000 < tokens <= 3584


@pytest.mark.parametrize(
    "fields",
    [
        {"fps": 0.0},
        {"fps": math.nan},
        {"min_frames": 1},
        {"min_frames": 10, "max_frames": 8},
        {"num_frames": 1},
        {"min_pixels": 0},
        {"min_pixels": 10, "max_pixels": 5},
        {"total_pixels": 0},
        {"rule": "random"},
    ],
)
def test_impossible_configs_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        FrameConfig(**fields)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="rule 'floor'"):
        frame_indices(10, 4, "floor")
    with pytest.raises(ValueError, match="total=0"):
        frame_indices(0, 4)
    with pytest.raises(ValueError, match="cannot take 12 frames of 11"):
        smart_nframes(11, 25.0, num_frames=12)
    with pytest.raises(ValueError, match="0 at 25"):
        smart_nframes(0, 25.0)
    with pytest.raises(ValueError, match="28 x 5628"):
        smart_resize(28, 5628)
    assert smart_resize(28, 5600, max_pixels=10**9)[1] == 5600
    with pytest.raises(ValueError, match="num_frames"):
        smart_resize(100, 100, total_pixels=10000)
