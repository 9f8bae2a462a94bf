"""Intervals over items and seeds, paired tests, Holm's correction."""

import itertools
import time
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.scoring.stats import Statistic, difference, estimate, holm

scores_of = st.integers(1, 4).flatmap(
    lambda seeds: st.lists(
        st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=seeds, max_size=seeds), min_size=1, max_size=12
    )
).map(lambda rows: np.array(rows).T)  # fmt: skip


def scipy_interval(parts, statistic, **other):
    rng = np.random.default_rng(2)
    found = stats.bootstrap(
        parts, statistic, method="percentile", n_resamples=20_000, vectorized=True, rng=rng, **other
    ).confidence_interval
    return found.low, found.high


@pytest.mark.parametrize("values", ["two values", "all different"])
def test_one_seed_agrees_with_scipy(values):
    random = np.random.default_rng(1)
    x = (random.random(300) < 0.3).astype(float) if values == "two values" else random.random(300)
    ours = estimate(x)
    assert ours.value == pytest.approx(x.mean()) and (ours.n, ours.seeds) == (300, 1)
    assert (ours.low, ours.high) == pytest.approx(scipy_interval((x,), np.mean), abs=0.008)


def test_a_mean_over_groups_keeps_their_sizes_and_agrees_with_scipy():
    random = np.random.default_rng(1)
    a, b = random.random(40), random.random(160) ** 3
    statistic = Statistic(np.repeat([0, 1], [40, 160]), np.array([0.5, 0.5]))
    ours = estimate(np.concatenate([a, b]), statistic)
    theirs = scipy_interval((a, b), lambda x, y, axis: (x.mean(axis=axis) + y.mean(axis=axis)) / 2)
    assert ours.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.006)


def test_a_root_mean_square_agrees_with_scipy():
    errors = np.random.default_rng(5).integers(0, 9, 200).astype(float)
    ours = estimate(errors**2, Statistic(np.zeros(200, int), np.ones(1), root=True))
    theirs = scipy_interval((errors,), lambda x, axis: np.sqrt((x * x).mean(axis=axis)))
    assert ours.value == pytest.approx(np.sqrt((errors**2).mean()))
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.05)


def test_seeds_alone_give_every_mean_of_all_but_one_draw():
    level = np.array([0.1, 0.2, 0.4, 0.5, 0.9])
    ours = estimate(np.repeat(level[:, None], 50, axis=1))
    means = [np.mean(draw) for draw in itertools.product(level, repeat=4)]
    assert ours.value == pytest.approx(level.mean()) and ours.seeds == 5 and ours.n == 250
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.011)
    assert np.var(means) == pytest.approx(np.var(level, ddof=1) / 5)  # why it is four draws, not five


def test_both_levels_agree_with_a_plain_loop():
    random = np.random.default_rng(3)
    scores = (random.random((3, 60)) < random.random(60) * 0.5 + np.array([[0.1], [0.3], [0.5]])).astype(float)
    drawn = []
    for _ in range(6000):
        items = random.integers(60, size=60)
        drawn.append(np.mean([scores[seed, items].mean() for seed in random.integers(3, size=2)]))
    ours = estimate(scores)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.012)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random, held = np.random.default_rng(0), 0
    for trial in range(200):
        effects = 0.04 * random.normal(size=(5, 1)) + 0.3 * random.normal(size=(1, 100))
        found = estimate(effects + 0.3 * random.normal(size=(5, 100)), seed=trial, resamples=400)
        held += found.low <= 0 <= found.high
    assert 180 <= held <= 199


@settings(deadline=None, max_examples=60)
@given(scores_of, st.integers(0, 3))
def test_an_interval_lies_among_the_scores_and_repeats(scores, seed):
    found = estimate(scores, seed=seed, resamples=300)
    assert scores.min() - 1e-9 <= found.low <= found.high <= scores.max() + 1e-9
    assert found.value == pytest.approx(scores.mean())
    assert found == estimate(scores, seed=seed, resamples=300)


@settings(deadline=None, max_examples=60)
@given(scores_of, st.integers(0, 99))
def test_what_is_not_answered_counts_nowhere(scores, place):
    wider = np.insert(scores, place % (scores.shape[1] + 1), np.nan, axis=1)
    taller = np.insert(wider, place % (len(wider) + 1), np.nan, axis=0)
    found, plain = estimate(taller, resamples=300), estimate(scores, resamples=300)
    assert astuple(found) == pytest.approx(astuple(plain))
    found = difference(taller, np.zeros_like(taller), resamples=300)
    assert astuple(found)[:-1] == pytest.approx(astuple(difference(scores, np.zeros_like(scores), resamples=300))[:-1])


def test_a_group_without_answers_passes_its_weight_on():
    statistic = Statistic(np.array([0, 0, 1, 2]), np.array([0.25, 0.25, 0.5]))
    found = estimate(np.array([1.0, 0.0, np.nan, 0.8]), statistic)
    assert found.value == pytest.approx((0.25 * 0.5 + 0.5 * 0.8) / 0.75) and found.n == 3


def test_a_difference_is_paired():
    random = np.random.default_rng(4)
    hard = random.random(300)
    first, second = (hard < 0.6).astype(float), (hard < 0.5).astype(float)
    ours = difference(first, second)
    theirs = scipy_interval((first, second), lambda x, y, axis: (x - y).mean(axis=axis), paired=True)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.007)
    assert ours.p < 0.001 and ours.value == pytest.approx(first.mean() - second.mean())
    mirrored = difference(second, first)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-ours.value, -ours.high, -ours.low))
    assert mirrored.p == pytest.approx(ours.p, abs=0.01)
    assert difference(first, first).p == 1.0


def test_the_p_value_agrees_with_a_sign_flip_test():
    random = np.random.default_rng(3)
    a, b = (random.random(200) < 0.55).astype(float), (random.random(200) < 0.45).astype(float)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=9999, rng=np.random.default_rng(4),
    ).pvalue  # fmt: skip
    assert difference(a, b).p == pytest.approx(theirs, abs=0.015)


def test_few_items_are_no_proof_however_equal_their_differences():
    assert difference(np.ones(1), np.zeros(1)).p == 1.0
    for n in (3, 5, 6):  # all coins alike: 2 of 2^n
        assert difference(np.ones(n), np.zeros(n)).p == pytest.approx(2 / 2**n, abs=0.01)
    first, second = np.array([1.0] * 7 + [0.0] + [1.0] * 90), np.array([0.0] * 7 + [1.0] + [1.0] * 90)
    assert difference(first, second).p == pytest.approx(stats.binomtest(7, 8).pvalue, abs=0.01)
    squares = Statistic(np.zeros(4, int), np.ones(1), root=True)
    assert difference(np.full(4, 9.0), np.zeros(4), squares).p == pytest.approx(2 / 16, abs=0.012)


def test_seeds_that_disagree_are_no_proof():
    random = np.random.default_rng(6)
    first = (random.random((5, 400)) < np.array([[0.65], [0.45], [0.62], [0.48], [0.60]])).astype(float)
    second = (random.random((5, 400)) < 0.5).astype(float)
    assert difference(first.ravel(), second.ravel()).p < 0.005  # 2,000 items of one seed would be a proof
    assert difference(first, second).p > 0.05
    assert difference(np.clip(second + (random.random((5, 400)) < 0.2), 0, 1), second).p < 0.001


def test_three_seeds_that_vary_are_seldom_taken_for_an_effect():
    """By the bootstrap alone, one in five would be: three seeds say little about how seeds vary."""
    random, wrong, held = np.random.default_rng(0), 0, 0
    for trial in range(200):
        items = random.normal(size=(1, 60))
        first = items + 0.2 * random.normal(size=(3, 1)) + 0.1 * random.normal(size=(3, 60))
        found = difference(first, items + 0.1 * random.normal(size=(3, 60)), seed=trial, resamples=400)
        wrong += found.p < 0.05
        held += found.low <= 0 <= found.high
    assert wrong <= 20 and held >= 180


def test_the_interval_spans_student_s_on_the_seeds():
    first = np.repeat([[0.5], [0.7], [0.9]], 40, axis=1)
    found, theirs = difference(first, np.zeros((3, 40))), stats.ttest_1samp([0.5, 0.7, 0.9], 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.p == pytest.approx(theirs.pvalue)


def test_only_shared_answers_are_compared():
    first = np.array([[1.0, 1.0, np.nan, 1.0]])
    second = np.array([[0.0, 1.0, 1.0, np.nan]])
    found = difference(first, second)
    assert (found.value, found.n, found.seeds) == (0.5, 2, 1)
    with pytest.raises(ValueError, match="share no answered item"):
        difference(np.array([[1.0, np.nan]]), np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="no scores"):
        estimate(np.full((2, 3), np.nan))


def test_a_difference_of_roots_is_no_root_of_differences():
    first, second = np.array([9.0, 16.0]), np.array([1.0, 1.0])
    found = difference(first, second, Statistic(np.zeros(2, int), np.ones(1), root=True))
    assert found.value == pytest.approx(np.sqrt(12.5) - 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.6]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=20))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = np.array(holm(p_values))
    p = np.array(p_values)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1.0, len(p) * p.min()))


def test_ten_thousand_resamples_are_quick():
    random = np.random.default_rng(0)
    first, second = (random.random((2, 5, 400)) < 0.5).astype(float)
    began = time.process_time()
    estimate(first)
    difference(first, second)
    assert time.process_time() - began < 1.5
