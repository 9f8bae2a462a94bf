"""Intervals over items and seeds, paired tests, Holm's correction."""

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


def interval(sample):
    found = stats.ttest_1samp(sample, 0.0).confidence_interval(0.95)
    return found.low, found.high


def bootstrapped(parts, statistic, **other):
    found = stats.bootstrap(parts, statistic, method="percentile", n_resamples=20_000, vectorized=True,
                            rng=np.random.default_rng(2), **other).confidence_interval  # fmt: skip
    return found.low, found.high


def test_one_seed_is_student_s_t_over_items():
    x = np.random.default_rng(1).random(300)
    ours = estimate(x)
    assert (ours.value, ours.n, ours.seeds) == (pytest.approx(x.mean()), 300, 1)
    assert (ours.low, ours.high) == pytest.approx(interval(x))
    paired = difference(x, x[::-1] ** 2)
    assert (paired.low, paired.high) == pytest.approx(interval(x - x[::-1] ** 2))
    assert paired.p == pytest.approx(stats.ttest_rel(x, x[::-1] ** 2).pvalue)


def test_items_that_say_the_same_leave_student_s_t_over_seeds():
    level = np.array([0.1, 0.2, 0.4, 0.5, 0.9])
    ours = estimate(np.repeat(level[:, None], 50, axis=1))
    assert (ours.seeds, ours.n) == (5, 250)
    assert (max(ours.low, 0.1), min(ours.high, 0.9)) == pytest.approx(np.clip(interval(level), 0.1, 0.9))
    found = difference(np.repeat([[0.5], [0.7], [0.9]], 40, axis=1), np.zeros((3, 40)))
    assert (found.low, found.high) == pytest.approx(interval([0.5, 0.7, 0.9]))
    assert found.p == pytest.approx(stats.ttest_1samp([0.5, 0.7, 0.9], 0.0).pvalue)


def test_both_levels_are_the_two_way_analysis_of_variance():
    """Variance of the mean by hand: mean squares of seeds and items, less that of what is left."""
    random = np.random.default_rng(3)
    x = random.normal(size=(4, 1)) + random.normal(size=(1, 60)) + random.normal(size=(4, 60))
    rows, columns = x.mean(axis=1), x.mean(axis=0)
    seeds, items = 60 * rows.var(ddof=1), 4 * columns.var(ddof=1)
    rest = ((x - rows[:, None] - columns + x.mean()) ** 2).sum() / (3 * 59)
    df = (seeds + items - rest) ** 2 / (seeds**2 / 3 + items**2 / 59 + rest**2 / (3 * 59))
    half = stats.t.isf(0.025, df) * np.sqrt((seeds + items - rest) / 240)
    found = estimate(x)
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half))


def test_a_mean_over_groups_keeps_their_sizes_and_agrees_with_scipy():
    random = np.random.default_rng(1)
    a, b = random.random(40), random.random(160) ** 3
    statistic = Statistic(np.repeat([0, 1], [40, 160]), np.array([0.5, 0.5]))
    ours = estimate(np.concatenate([a, b]), statistic)
    theirs = bootstrapped((a, b), lambda x, y, axis: (x.mean(axis=axis) + y.mean(axis=axis)) / 2)
    assert ours.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.006)


def test_a_root_mean_square_agrees_with_scipy():
    errors = np.random.default_rng(5).integers(0, 9, 200).astype(float)
    ours = estimate(errors**2, Statistic(np.zeros(200, int), np.ones(1), root=True))
    theirs = bootstrapped((errors,), lambda x, axis: np.sqrt((x * x).mean(axis=axis)))
    assert ours.value == pytest.approx(np.sqrt((errors**2).mean()))
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.05)


def world(random, seeds, items, seed_effect, shift=0.0, item_effect=0.0):
    """Right and wrong answers of two systems whose true difference is zero (for `shift` 0): items from easy to hard,
    each seed of each system luckier or not, items that suit one system and not the other."""
    ability = stats.logistic.ppf(np.clip(random.beta(0.6, 0.5, size=items), 0.005, 0.995))
    suits = item_effect * random.normal(size=items)
    return [
        (random.random((seeds, items)) < stats.logistic.cdf(
            ability + sign * (suits + shift) / 2 + seed_effect * random.normal(size=(seeds, 1)))).astype(float)
        for sign in (1, -1)
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_true_null_is_rejected_in_five_of_a_hundred_and_intervals_hold_in_the_others(seeds):
    """Over 100 and 400 items, with and without variance over seeds and items that suit one of the two."""
    random, wrong = np.random.default_rng(11), []
    for items in (100, 400):
        for seed_effect in (0.0, 0.3):
            for item_effect in (0.0, 1.0):
                found = [difference(*world(random, seeds, items, seed_effect, 0.0, item_effect)) for _ in range(400)]
                assert all((d.p < 0.05) == (not d.low <= 0 <= d.high) for d in found)
                wrong.append(np.mean([d.p < 0.05 for d in found]))
    assert 0.04 <= np.mean(wrong) <= 0.06
    assert 0.015 <= min(wrong) and max(wrong) <= 0.09, wrong


def test_the_smallest_visible_difference_is_seen_four_times_in_five():
    random = np.random.default_rng(4)
    first, second = world(random, 5, 200, 0.1)
    planned = difference(first, second)
    error, df = planned.error, planned.df
    assert planned.visible() == pytest.approx((stats.t.isf(0.025, df) + stats.t.ppf(0.8, df)) * error)
    seen = [abs(planned.visible() + error * draw) > error * stats.t.isf(0.025, df)
            for draw in stats.t.rvs(df, size=4000, random_state=1)]  # fmt: skip
    assert np.mean(seen) == pytest.approx(0.8, abs=0.02)
    assert planned.visible(0.01) > planned.visible(0.05)


def test_an_effect_is_seen_at_five_seeds_where_the_seeds_alone_would_see_it():
    random = np.random.default_rng(7)
    pairs = [world(random, 5, 200, 0.1, shift=0.4) for _ in range(200)]
    ours = np.mean([difference(*pair).p < 0.05 for pair in pairs])
    alone = np.mean([stats.ttest_1samp(a.mean(axis=1) - b.mean(axis=1), 0.0).pvalue < 0.05 for a, b in pairs])
    assert ours > alone - 0.02 and ours > 0.5


@settings(deadline=None, max_examples=60)
@given(scores_of)
def test_an_interval_lies_among_the_scores(scores):
    found = estimate(scores)
    assert scores.min() - 1e-9 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high
    assert found.high <= scores.max() + 1e-9 and found.value == pytest.approx(scores.mean())


@settings(deadline=None, max_examples=60)
@given(scores_of, st.integers(0, 99))
def test_what_is_not_answered_counts_nowhere(scores, place):
    wider = np.insert(scores, place % (scores.shape[1] + 1), np.nan, axis=1)
    taller = np.insert(wider, place % (len(wider) + 1), np.nan, axis=0)
    assert astuple(estimate(taller)) == pytest.approx(astuple(estimate(scores)))
    pair = difference(taller, np.zeros_like(taller)), difference(scores, np.zeros_like(scores))
    assert astuple(pair[0]) == pytest.approx(astuple(pair[1]))


def test_a_group_without_answers_passes_its_weight_on():
    statistic = Statistic(np.array([0, 0, 1, 2]), np.array([0.25, 0.25, 0.5]))
    found = estimate(np.array([1.0, 0.0, np.nan, 0.8]), statistic)
    assert found.value == pytest.approx((0.25 * 0.5 + 0.5 * 0.8) / 0.75) and found.n == 3


def test_a_difference_is_paired():
    hard = np.random.default_rng(4).random(300)
    first, second = (hard < 0.6).astype(float), (hard < 0.5).astype(float)
    ours = difference(first, second)
    theirs = bootstrapped((first, second), lambda x, y, axis: (x - y).mean(axis=axis), paired=True)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.007)
    assert ours.p < 0.001 and ours.value == pytest.approx(first.mean() - second.mean())
    mirrored = difference(second, first)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-ours.value, -ours.high, -ours.low))
    assert mirrored.p == pytest.approx(ours.p)
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
        assert difference(np.ones(n), np.zeros(n)).p == pytest.approx(2 / 2**n)
        assert difference(np.ones((5, n)), np.zeros((5, n))).p == pytest.approx(2 / 2**n)
    first, second = np.array([1.0] * 7 + [0.0] + [1.0] * 90), np.array([0.0] * 7 + [1.0] + [1.0] * 90)
    assert difference(first, second).p == pytest.approx(stats.binomtest(7, 8).pvalue)
    many = np.arange(20) < 16
    assert difference(many.astype(float), (~many).astype(float)).p == pytest.approx(
        stats.binomtest(16, 20).pvalue, abs=0.004)  # fmt: skip
    squares = Statistic(np.zeros(4, int), np.ones(1), root=True)
    assert difference(np.full(4, 9.0), np.zeros(4), squares).p == pytest.approx(2 / 16)


def test_seeds_that_disagree_are_no_proof():
    random = np.random.default_rng(6)
    first = (random.random((5, 400)) < np.array([[0.65], [0.45], [0.62], [0.48], [0.60]])).astype(float)
    second = (random.random((5, 400)) < 0.5).astype(float)
    assert difference(first.ravel(), second.ravel()).p < 0.005  # 2,000 items of one seed would be a proof
    assert difference(first, second).p > 0.05
    assert difference(np.clip(second + (random.random((5, 400)) < 0.2), 0, 1), second).p < 0.001


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
