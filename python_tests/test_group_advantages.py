"""group_advantages against the formulae, group by group in numpy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast import ops
from vcr1_fast.ops import group_advantages
from vcr1_fast.ops.group_advantages import (
    DEFAULT_SCALE,
    ESTIMATORS,
    SCALES,
    group_advantages_op,
)

BACKENDS = group_advantages_op.backends("cpu")


def spec(rewards, groups, estimator, scale, lengths=None, stds=None, eps=1e-4):
    """Rewards (N,) without nan; groups: lists of row numbers, each of two or more."""
    out = np.zeros(len(rewards))
    for rows in groups:
        r = rewards[rows]
        for i in rows:
            if estimator == "rloo":
                baseline = np.mean([rewards[j] for j in rows if j != i])
            elif estimator == "opo":
                baseline = np.average(r, weights=lengths[rows])
            else:
                baseline = r.mean()
            out[i] = rewards[i] - baseline
            if scale == "group":
                out[i] /= r.std(ddof=1) + eps
            elif scale == "given":
                out[i] /= stds[i] + eps
    if scale == "batch":
        source = out if estimator == "reinforce_plus_plus_baseline" else rewards
        out = out / (source.std(ddof=1) + eps)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "gdpo"])
def test_matches_the_formula(estimator, scale, backend):
    generator = np.random.default_rng(0)
    rewards, lengths = generator.normal(size=24), generator.integers(1, 90, 24)
    stds = generator.uniform(0.1, 2, 24) if scale == "given" else None
    index = np.array([3, 7, 3, 9] * 6)
    shuffled = [list(np.flatnonzero(index == g)) for g in (3, 7, 9)]
    consecutive = [list(range(i, i + 6)) for i in range(0, 24, 6)]
    for groups, named in (
        (shuffled, {"group_index": torch.from_numpy(index)}),
        (consecutive, {"group_size": 6}),
    ):
        with ops.use(backend):
            got = group_advantages(
                torch.from_numpy(rewards), **named, estimator=estimator, scale=scale,
                lengths=torch.from_numpy(lengths),
                stds=None if stds is None else torch.from_numpy(stds),
            )  # fmt: skip
        assert got.dtype == torch.float32
        expected = spec(rewards, groups, estimator, scale, lengths, stds)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=1e-6)


def test_recorded_values():
    """TRL's numbers for rewards 1, 0, 0, 1 | 0, 0, 0, 1: std 0.57735027 and 0.5, unbiased."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    first, second = 0.5 / (0.57735027 + 1e-4), np.array([-0.25, 0.75]) / (0.5 + 1e-4)
    expected = [first, -first, -first, first, *second[[0, 0, 0, 1]]]
    np.testing.assert_allclose(group_advantages(rewards, 4), expected, rtol=1e-6)
    np.testing.assert_allclose(
        group_advantages(rewards, 4, scale="none"),
        [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75],
    )
    np.testing.assert_allclose(
        group_advantages(rewards, 4, estimator="rloo"),
        np.array([2, -2, -2, 2, -1, -1, -1, 3]) / 3,
        rtol=1e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ("group", "none"))
def test_gdpo(backend, scale):
    rewards = np.random.default_rng(1).normal(size=(12, 3))
    weights = np.array([1.0, 0.5, 2.0])
    groups = rewards.reshape(3, 4, 3)
    z = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (z * weights).sum(-1).reshape(-1)
    if scale == "group":
        expected = (expected - expected.mean()) / (expected.std(ddof=1) + 1e-4)
    with ops.use(backend):
        got = group_advantages(
            torch.from_numpy(rewards), 4, estimator="gdpo", scale=scale,
            weights=torch.from_numpy(weights),
        )  # fmt: skip
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reward_functions_are_summed_with_weights(backend):
    rewards = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.0, 2.0])
    with ops.use(backend):
        got = group_advantages(rewards, 4, weights=weights)
        expected = group_advantages(rewards[:, 0] + 2 * rewards[:, 2], 4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ("grpo", "gdpo"))
def test_weights_may_differ_from_row_to_row(backend, estimator):
    """Two tasks with different weights, in one call and in two."""
    rewards = torch.rand(16, 3, generator=torch.Generator().manual_seed(3))
    first, second = torch.tensor([1.0, 0.1, 0.0]), torch.tensor([2.0, 1.0, 0.5])
    weights = torch.stack([first] * 8 + [second] * 8)
    options = {"estimator": estimator, "scale": "none" if estimator == "gdpo" else "group"}
    with ops.use(backend):
        got = group_advantages(rewards, 4, weights=weights, **options)
        apart = [
            group_advantages(rewards[:8], 4, weights=first, **options),
            group_advantages(rewards[8:], 4, weights=second, **options),
        ]
    torch.testing.assert_close(got, torch.cat(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guard_lets_an_unusual_group_take_its_own_spread(backend):
    """OneThinker's guard: |r - mean| / std above 5 anywhere in a group."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.4, 0.6])
    stds = torch.full((6,), 0.05)
    with ops.use(backend):
        got = group_advantages(rewards, 2, scale="given", stds=stds, guard=5, eps=0.0)
        free = group_advantages(rewards, 2, scale="given", stds=stds, eps=0.0)
    torch.testing.assert_close(free, torch.tensor([-10.0, 10, -10, 10, -2, 2]))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1, -1, 1, -2, 2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_give_exactly_zero(estimator, backend):
    # 0.1 and 1/3 are not binary fractions, so a rounded mean would leave a residue.
    rewards = torch.cat([torch.full((7,), 0.1), torch.full((7,), 1 / 3)])
    with ops.use(backend):
        got = group_advantages(rewards, 7, estimator=estimator, lengths=torch.arange(1, 15))
    assert torch.equal(got, torch.zeros(14))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "opo"])
def test_a_group_of_equal_rewards_among_others_gets_exactly_zero(estimator, backend):
    rewards = torch.rand(12, 2, generator=torch.Generator().manual_seed(5))
    rewards[4:8] = torch.tensor([0.1, 1 / 3])
    with ops.use(backend):
        got = group_advantages(rewards, 4, estimator=estimator)
    assert torch.equal(got[4:8], torch.zeros(4))
    assert got[:4].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_rewards(backend):
    rewards = torch.tensor([1.0, math.nan, 0.0, 0.5, 1.0, 0.0])
    with ops.use(backend):
        with pytest.raises(ValueError, match=r"rows \[1\] are nan"):
            group_advantages(rewards, 3)
        got = group_advantages(rewards, 3, nan="ignore")
        expected = group_advantages(
            torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0]), group_index=torch.tensor([0, 0, 1, 1, 1])
        )
        assert got[1] == 0
        torch.testing.assert_close(got[[0, 2, 3, 4, 5]], expected)
        matrix = torch.tensor([[1.0, math.nan], [0.5, 0.5], [math.nan, 3.0], [math.nan, math.nan]])
        got = group_advantages(matrix, 4, nan="ignore")
        assert got[3] == 0
        torch.testing.assert_close(got[:3], group_advantages(torch.tensor([1.0, 1.0, 3.0]), 3))
        got = group_advantages(matrix, 4, nan="ignore", estimator="gdpo")
        assert torch.isfinite(got).all() and got[3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_of_one(backend):
    index = torch.tensor([0, 1, 1])
    rewards = torch.tensor([3.0, 1.0, 0.0])
    with ops.use(backend):
        for estimator in ("grpo", "rloo"):
            zero = group_advantages(rewards, group_index=index, estimator=estimator)
            keep = group_advantages(
                rewards, group_index=index, estimator=estimator, singleton="keep"
            )
            assert zero[0] == 0 and keep[0] == 3 and torch.equal(zero[1:], keep[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with ops.use(backend):
        for rewards in (torch.zeros(0), torch.zeros(0, 2)):
            assert group_advantages(rewards, 4).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(
    rewards=st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=32),
    estimator=st.sampled_from(ESTIMATORS),
    shift=st.floats(-5, 5),
    data=st.data(),
)
def test_properties(rewards, estimator, shift, data):
    """Moving every reward changes nothing, and neither does the order of the rows."""
    values = torch.tensor(rewards, dtype=torch.float64)
    index = torch.tensor([i % 3 for i in range(len(rewards))])
    lengths = torch.arange(1, len(rewards) + 1)
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))

    def advantages(x, i, n):
        return group_advantages(x, group_index=i, estimator=estimator, scale="none", lengths=n)

    base = advantages(values, index, lengths)
    assert torch.isfinite(base).all()
    if estimator != "gdpo":  # its normalisation magnifies the rounding of tiny differences
        torch.testing.assert_close(
            advantages(values + shift, index, lengths), base, rtol=1e-5, atol=1e-5
        )
    permuted = advantages(values[order], index[order], lengths[order])
    torch.testing.assert_close(permuted, base[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend, estimator):
    rewards, lengths = torch.rand(8), torch.arange(1, 9)
    index = torch.tensor([0, 1, 1, 0, 2, 2, 0, 2])

    def step(r):
        by_size = group_advantages(r, 4, estimator=estimator, lengths=lengths)
        return by_size + group_advantages(
            r, group_index=index, estimator=estimator, lengths=lengths
        )

    with ops.use(backend):
        options = {"estimator": estimator, "scale": DEFAULT_SCALE[estimator], "nan": "error"}
        options |= {"singleton": "zero", "eps": 1e-4, "guard": 0.0}
        options |= {"weights": None, "lengths": lengths, "stds": None}
        for groups, size in ((None, 4), (index, 0)):
            torch.library.opcheck(
                torch.ops.vcr1_fast.group_advantages.default,
                (rewards,),
                {"group_index": groups, "group_size": size, **options},
            )
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rewards), step(rewards))


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    (
        (torch.zeros(6), {"group_size": 4}, "6 rewards do not make groups of 4"),
        (torch.zeros(6), {}, "either group_size or group_index"),
        (torch.zeros(6), {"group_size": 2, "group_index": torch.zeros(6)}, "either"),
        (torch.zeros(6), {"group_index": torch.zeros(5).long()}, "group_index has shape"),
        (torch.zeros(6, 2), {"group_size": 2, "weights": torch.ones(3)}, "weights has shape"),
        (torch.zeros(6), {"group_size": 2, "estimator": "gae"}, "unknown estimator 'gae'"),
        (torch.zeros(6), {"group_size": 2, "estimator": "opo"}, "opo needs lengths"),
        (torch.zeros(6), {"group_size": 2, "scale": "std"}, "unknown scale 'std'"),
        (torch.zeros(6), {"group_size": 2, "scale": "given"}, "given.*go together"),
        (torch.zeros(6), {"group_size": 2, "stds": torch.ones(6)}, "together, got scale 'group'"),
        (
            torch.zeros(6),
            {"group_size": 2, "scale": "given", "stds": torch.ones(5)},
            r"stds has shape \(5,\), expected \(6,\)",
        ),
        (
            torch.zeros(6),
            {"group_size": 2, "scale": "given", "stds": torch.ones(6), "guard": 0.0},
            "guard must be above 0, got 0.0",
        ),
        (torch.zeros(2, 2, 2), {"group_size": 2}, "must be"),
        (torch.tensor([0.0, math.inf]), {"group_size": 2}, r"rows \[1\] are nan or infinite"),
        (torch.tensor([-math.inf, 0.0]), {"group_size": 2, "nan": "ignore"}, r"rows \[0\] are"),
    ),
)
def test_errors(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)
