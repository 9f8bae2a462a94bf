"""Bootstrap intervals and the paired comparison of two systems. Pure functions over scores of items.

Scores come as an array [seeds, items], NaN where a seed has no answer to an item. Both levels are resampled: seeds,
and items. All seeds answer the same items, so a resample holds the same items for every seed (Owen, The pigeonhole
bootstrap, 2007). That errs on the wide side, since the chance in a single answer counts up to three times; it makes up
in part for what a percentile interval over few seeds lacks. With one seed the items alone vary. Of S seeds S - 1 are
drawn (Rao and Wu, 1988): S draws would make the variance between seeds too small by (S - 1) / S, half of it with two
seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 4_000_000  # drawn items held at a time


@dataclass(frozen=True)
class Estimate:
    """A statistic over n answers (of all seeds) with its bootstrap percentile interval."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1


@dataclass(frozen=True)
class Difference(Estimate):
    """First - second over the n answers that both systems gave; p of no difference, two-sided."""

    p: float = 1.0


@dataclass(frozen=True)
class Statistic:
    """What is made of the items' scores: the weighted mean of the strata's means, and its root where `root` is set.

    strata [items] numbers each item's stratum, weights [strata] are relative. Resamples keep the strata's sizes.
    """

    strata: np.ndarray
    weights: np.ndarray
    root: bool = False

    @classmethod
    def mean(cls, items: int) -> Statistic:
        return cls(np.zeros(items, int), np.ones(1))

    def finish(self, means: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(means, 0.0)) if self.root else means


def estimate(
    scores: np.ndarray, statistic: Statistic | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The statistic (the mean) of `scores` [seeds, items], averaged over seeds, with its 95 % interval.

    ValueError where there is no score at all.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    answered = int(np.isfinite(scores).sum())
    if not answered:
        raise ValueError("no scores to average")
    scores = scores[np.isfinite(scores).any(axis=1)]
    statistic = statistic or Statistic.mean(scores.shape[1])
    value = measured(scores, statistic)
    low, high = _interval(_resampled(scores[None], statistic, seed, resamples)[:, 0])
    return Estimate(value, low, high, answered, len(scores))


def difference(
    first: np.ndarray,
    second: np.ndarray,
    statistic: Statistic | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """The statistic of `first` minus that of `second` [seeds, items] over the answers that both gave.

    Every resample draws the same seeds and items for both, so what makes an item easy or a seed lucky for both cancels
    out. p is the largest of three. Bootstrap: the share of resamples, centred on no difference, that lie at least as
    far out as the one measured; it takes account of seeds, but of few or equal differences it makes a certainty.
    Sign flips: the same share when the two systems are swapped at random in each item, for all seeds together; it is
    exact however few items differ (McNemar's test for right and wrong), but knows nothing of other seeds. Student's t
    on the seeds' own differences: what few seeds that disagree allow, where a bootstrap of them promises too much. The
    interval spans the bootstrap's and t's. With one seed nothing here speaks of other seeds.
    ValueError where no answer is shared.
    """
    first, second = (np.atleast_2d(np.asarray(scores, float)) for scores in (first, second))
    assert first.shape == second.shape, (first.shape, second.shape)
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise ValueError("the two systems share no answered item of one seed; evaluate both on the same")
    pair = np.where(both, np.stack([first, second]), np.nan)[:, both.any(axis=1)]
    statistic = statistic or Statistic.mean(first.shape[1])
    value = measured(pair[0], statistic) - measured(pair[1], statistic)
    resampled = _resampled(pair, statistic, seed, resamples)
    deltas = resampled[:, 0] - resampled[:, 1]
    low, high = _interval(deltas)
    p_seeds, (low_seeds, high_seeds) = _between_seeds(pair, statistic)
    nulls = (deltas - value, _flipped(pair, statistic, seed, resamples))
    # The measured sample is one of those that no difference could bring about: hence the 1.
    p = max(p_seeds, *(float((np.abs(null) >= abs(value) - 1e-12).sum() + 1) / (resamples + 1) for null in nulls))
    low, high = min(low, low_seeds), max(high, high_seeds)
    return Difference(value, low, high, int(both.sum()), pair.shape[1], p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, by Holm's step-down method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def measured(scores: np.ndarray, statistic: Statistic) -> float:
    """The statistic of `scores` [seeds, items] as they are, averaged over seeds, without an interval."""
    one_hot = np.eye(len(statistic.weights))[statistic.strata]
    means = _strata_means(np.isfinite(scores) @ one_hot, np.nan_to_num(scores) @ one_hot)
    return float(statistic.finish(_weighted(means, statistic.weights)).mean())


def _between_seeds(pair: np.ndarray, statistic: Statistic) -> tuple[float, tuple[float, float]]:
    """p and interval of Student's t on the differences of the seeds of `pair` [2, seeds, items]; of one: no bound."""
    own = [measured(a[None], statistic) - measured(b[None], statistic) for a, b in zip(*pair, strict=True)]
    if len(own) < 2:
        return 0.0, (np.inf, -np.inf)
    if np.ptp(own) < 1e-12:  # t of equal differences is 0 / 0
        return 0.0, (own[0], own[0])
    test = ttest_1samp(own, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return float(test.pvalue), (float(low), float(high))


def _strata_means(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts


def _weighted(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the last axis of `means` by `weights`; what is not there (NaN) passes its weight on to the others."""
    present = np.isfinite(means) @ weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(means) @ weights / present


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _resampled(scores: np.ndarray, statistic: Statistic, seed: int, resamples: int) -> np.ndarray:
    """The statistic [resamples, systems] of resamples of `scores` [systems, seeds, items], the same for all systems."""
    systems, seeds, items = scores.shape
    rng = np.random.default_rng(seed)
    rows = scores.reshape(systems * seeds, items)
    means = np.empty((resamples, systems * seeds, len(statistic.weights)))
    for stratum in range(len(statistic.weights)):
        means[:, :, stratum] = _resampled_means(rows[:, statistic.strata == stratum], rng, resamples)
    finished = statistic.finish(_weighted(means, statistic.weights)).reshape(resamples, systems, seeds)
    if seeds == 1:
        return finished[:, :, 0]
    drawn = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=resamples)[:, None, :] * np.isfinite(finished)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.nan_to_num(finished) * drawn).sum(axis=2) / drawn.sum(axis=2)


def _flipped(pair: np.ndarray, statistic: Statistic, seed: int, resamples: int) -> np.ndarray:
    """Differences [resamples] of the two systems of `pair` [2, seeds, items] when they are swapped in random items."""
    rng, seeds = np.random.default_rng(seed), pair.shape[1]
    means = np.full((resamples, 2, seeds, len(statistic.weights)), np.nan)
    for stratum in range(len(statistic.weights)):
        values, present, counts = _patterns(pair[:, :, statistic.strata == stratum].reshape(2 * seeds, -1))
        first, second = values[:seeds], values[seeds:]
        block = max(1, BLOCK // max(len(counts), 1))
        for start in range(0, resamples, block):
            part = means[start : start + block, :, :, stratum]
            moved = rng.binomial(counts, 0.5, size=(len(part), len(counts))) @ (second - first).T
            sums = np.stack([first @ counts + moved, second @ counts - moved], axis=1)
            part[:] = _strata_means(present[:seeds] @ counts, sums)
    finished = statistic.finish(_weighted(means, statistic.weights))
    return np.nanmean(finished[:, 0] - finished[:, 1], axis=1)


def _patterns(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct columns of `rows` [rows, items]: values (0 where there is none), which are present, how often each is.

    Items with the same scores in every row are interchangeable: only how often each pattern is drawn matters.
    """
    rows = rows[:, np.isfinite(rows).any(axis=0)]
    patterns, counts = np.unique(np.where(np.isfinite(rows), rows, np.inf), axis=1, return_counts=True)
    present = np.isfinite(patterns)
    return np.where(present, patterns, 0.0), present.astype(float), counts


def _resampled_means(rows: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means [resamples, rows] of bootstrap samples of the items of `rows` [rows, items]."""
    values, present, counts = _patterns(rows)
    if not len(counts):
        return np.full((resamples, len(rows)), np.nan)
    return np.concatenate(
        [_strata_means(drawn @ present.T, drawn @ values.T) for drawn in _draws(counts, rng, resamples)]
    )


def _draws(counts: np.ndarray, rng: np.random.Generator, resamples: int) -> Iterator[np.ndarray]:
    """How often each pattern is drawn [block, patterns] when as many items are drawn as `counts` [patterns] holds."""
    n, kinds = int(counts.sum()), len(counts)
    items = np.repeat(np.arange(kinds), counts)
    block = max(1, BLOCK // max(n, 1))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        if kinds * 8 < n:  # a multinomial's cost grows with the patterns, that of single draws with the items
            yield rng.multinomial(n, counts / n, size=size).astype(float)
        else:
            drawn = items[rng.integers(n, size=(size, n))] + kinds * np.arange(size)[:, None]
            yield np.bincount(drawn.ravel(), minlength=kinds * size).reshape(size, kinds).astype(float)


def estimates(
    predictions: Sequence[Mapping[str, Any]], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Accuracy "overall" and for each family of one run's predictions, in the order of appearance."""
    groups = {"overall": list(predictions)}
    for prediction in predictions:
        groups.setdefault(prediction["groups"]["family"][0], []).append(prediction)
    return {
        name: estimate(np.array([p["scores"]["accuracy"] for p in group], float), seed=seed, resamples=resamples)
        for name, group in groups.items()
        if group
    }


def paired_difference(
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Accuracy of `first` minus that of `second`; ValueError if the two answered different samples."""
    scores = [{p["id"]: p["scores"]["accuracy"] for p in system} for system in (first, second)]
    if not scores[0] or scores[0].keys() != scores[1].keys():
        odd = sorted(scores[0].keys() ^ scores[1].keys())[:3]
        raise ValueError(f"the two systems did not answer the same samples (for example {odd}); evaluate both anew")
    pair = np.array([[system[key] for key in scores[0]] for system in scores], float)
    return difference(pair[0], pair[1], seed=seed, resamples=resamples)
