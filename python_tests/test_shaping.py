"""Length, repetition and order terms: hand-computed values, and TRL's own for the length."""

import gc
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcr1_fast.rewards.shaping import (
    length_bonuses,
    repetition,
    soft_overlong,
    temporal_bonuses,
)


def test_soft_overlong_by_hand():
    # Limit 100, buffer 20: free up to 80, then a twentieth a token, -1 from 100 on.
    lengths = [0, 80, 81, 90, 99, 100, 101, 500]
    expected = [0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    assert [soft_overlong(n, 100, 20) for n in lengths] == pytest.approx(expected)


def test_soft_overlong_is_trls():
    rewards = pytest.importorskip("trl.rewards")
    for limit, buffer in ((100, 20), (64, 64), (1024, 1)):
        theirs = rewards.get_soft_overlong_punishment(limit, buffer)
        lengths = [1, limit - buffer, limit - buffer + 1, limit - 1, limit, limit + 1]
        ours = [soft_overlong(n, limit, buffer) for n in lengths]
        assert ours == pytest.approx(theirs([[0] * n for n in lengths]))


@pytest.mark.parametrize("buffer", [0, 101, -1])
def test_soft_overlong_refuses_a_buffer_that_does_not_fit(buffer):
    with pytest.raises(ValueError, match=f"got {buffer} and 100"):
        soft_overlong(10, 100, buffer)


def test_length_bonus_goes_to_right_answers_in_the_band():
    lengths = [319, 320, 400, 512, 513, 400]
    accuracies = [1.0, 1.0, 0.5, 0.11, 1.0, 0.1]
    assert length_bonuses(lengths, accuracies) == [0.0, 0.2, 0.2, 0.2, 0.0, 0.0]
    assert length_bonuses([400, 400], [1.0, 0.0]) == [0.0, 0.0]  # one right answer alone
    assert length_bonuses([4, 5], [1.0, 1.0], bonus=1.5, band=(5, 5)) == [0.0, 1.5]


def test_repetition_by_hand():
    assert repetition("a b c d") == 0.0
    assert repetition("a b c a b c") == pytest.approx(3 / 4 - 1)  # abc bca cab abc
    assert repetition("no No NO no no", ngram=2) == pytest.approx(1 / 4 - 1)
    assert repetition("a b") == repetition("") == 0.0


@given(st.text(max_size=60), st.integers(1, 4))
def test_repetition_lies_in_its_range(text, ngram):
    assert -1.0 < repetition(text, ngram) <= 0.0


def test_repetition_takes_linear_time():
    """The best of three, of this thread alone and without the collector's walks over what other
    tests have left."""

    def seconds(size):
        times = []
        for _ in range(3):
            started = time.thread_time()
            repetition("no " * size)
            times.append(time.thread_time() - started)
        return min(times)

    gc.disable()
    try:
        assert seconds(40_000) < 10 * seconds(10_000) + 0.1
    finally:
        gc.enable()


def test_temporal_bonus_by_hand():
    right, wrong = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    # Means 0.5 and 0.5: 0.5 >= 0.8 * 0.5.
    assert temporal_bonuses(right, [1.0, 0.0]) == [0.3, 0.3, 0.0, 0.0]
    # 0.25 < 0.8 * 0.5: the order of the frames does not help.
    assert temporal_bonuses(wrong, [1.0, 0.0]) == [0.0] * 4
    # Equal means are enough at ratio 1; an accuracy of 0.1 is not right, one above is.
    assert temporal_bonuses([0.25, 0.75], [0.5], ratio=1.0, bonus=1.0) == [1.0, 1.0]
    assert temporal_bonuses([0.1, 0.75], [0.5], bonus=1.0) == [0.0, 1.0]
    assert temporal_bonuses([0.2, 0.6], [1.0], ratio=0.5) == [0.0, 0.0]
    assert temporal_bonuses([0.0, 0.0], [0.0]) == [0.0, 0.0]
    with pytest.raises(ValueError, match="got 2 and 0 shuffled"):
        temporal_bonuses([1.0, 1.0], [])
