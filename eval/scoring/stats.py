"""Intervals over items and seeds, and the paired comparison of two systems. Pure functions over scores of items.

Scores come as an array [seeds, items], NaN where a seed has no answer to an item. Seeds and items are both samples, and
all seeds answer the same items: a crossed design with two random effects. The variance of the mean is that of the
seeds' means plus that of the items' means less what the chance in a single answer counts twice (mean squares of a
two-way analysis of variance, Cornfield and Tukey, 1956), with Satterthwaite's degrees of freedom for Student's t. Three
tenths of the items' part, or of the chance's if that is larger, are the least that it may be, since a difference of
estimates can come out near zero. Other statistics than the mean go through their influence function. With one seed the
items alone vary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
POWER = 0.8
LEAST_SHARE = 0.3  # by simulation: rejects a true null in 3.6 to 5.8 % at five seeds, 2.9 to 6.6 % at three
FEW = 30  # with fewer items that differ, sign flips have the last word
FLIPS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A statistic over n answers (of all seeds) with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1


@dataclass(frozen=True)
class Difference(Estimate):
    """First - second over the n answers that both systems gave; p of no difference, two-sided; the standard error and
    its degrees of freedom."""

    p: float = 1.0
    error: float = 0.0
    df: float = np.inf

    def visible(self, level: float = 1 - LEVEL) -> float:
        """The smallest true difference that a test at `level` shows with 80 % power, by its own standard error."""
        return float((student.isf(level / 2, self.df) + student.ppf(POWER, self.df)) * self.error)


@dataclass(frozen=True)
class Statistic:
    """What is made of the items' scores: the weighted mean of the strata's means, and its root where `root` is set.

    strata [items] numbers each item's stratum, weights [strata] are relative.
    """

    strata: np.ndarray
    weights: np.ndarray
    root: bool = False

    @classmethod
    def mean(cls, items: int) -> Statistic:
        return cls(np.zeros(items, int), np.ones(1))

    def of(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Its value for each seed of `scores` [seeds, items], and each answer's influence on that [seeds, items].

        A stratum without answers passes its weight on to the others. Influences are scaled by n / (n - 1) of their
        stratum, so that their squares add up to an unbiased variance.
        """
        one_hot = np.eye(len(self.weights))[self.strata]
        there = np.isfinite(scores)
        counts = there @ one_hot
        present = counts > 0
        means = np.nan_to_num(scores) @ one_hot / np.maximum(counts, 1)
        total = present @ self.weights
        share = self.weights * present / np.maximum(total, 1e-300)[:, None]
        values = (share * means).sum(axis=1)
        unbiased = np.sqrt(counts / np.maximum(counts - 1, 1))
        scale = (share * unbiased / np.maximum(counts, 1))[:, self.strata]
        influence = np.where(there, scale * (np.nan_to_num(scores) - means[:, self.strata]), 0.0)
        if self.root:
            values = np.sqrt(np.maximum(values, 0.0))
            influence = influence / (2 * np.maximum(values, 1e-12))[:, None]
        return np.where(total > 0, values, np.nan), influence


def estimate(scores: np.ndarray, statistic: Statistic | None = None) -> Estimate:
    """The statistic (the mean) of `scores` [seeds, items], averaged over seeds, with its 95 % interval.

    The interval doesn't leave the range of the scores. ValueError where there is no score at all.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    there = np.isfinite(scores)
    if not there.any():
        raise ValueError("no scores to average")
    kept = there.any(axis=1)[:, None] & there.any(axis=0)[None]
    statistic = _narrowed(statistic or Statistic.mean(scores.shape[1]), kept.any(axis=0))
    scores = scores[kept.any(axis=1)][:, kept.any(axis=0)]
    values, influence = statistic.of(scores)
    error, df = _error(values, influence, statistic)
    value, half = float(values.mean()), float(student.isf((1 - LEVEL) / 2, df)) * error
    found = np.sqrt(scores[np.isfinite(scores)]) if statistic.root else scores[np.isfinite(scores)]
    low, high = max(value - half, min(float(found.min()), value)), min(value + half, max(float(found.max()), value))
    return Estimate(value, low, high, int(there.sum()), len(scores))


def difference(first: np.ndarray, second: np.ndarray, statistic: Statistic | None = None) -> Difference:
    """The statistic of `first` minus that of `second` [seeds, items] over the answers that both gave.

    Paired by seed and item: what makes an item easy or a seed lucky for both cancels out. Where fewer than 30 items
    differ, p is not below that of swapping the systems in each item at random, for all seeds together, which is exact
    however few they are (McNemar's test for right and wrong). With one seed nothing here speaks of other seeds.
    ValueError where no answer is shared.
    """
    first, second = (np.atleast_2d(np.asarray(scores, float)) for scores in (first, second))
    assert first.shape == second.shape, (first.shape, second.shape)
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise ValueError("the two systems share no answered item of one seed; evaluate both on the same")
    rows, columns = both.any(axis=1), both.any(axis=0)
    statistic = _narrowed(statistic or Statistic.mean(first.shape[1]), columns)
    parts = [statistic.of(np.where(both, scores, np.nan)[rows][:, columns]) for scores in (first, second)]
    values, influence = parts[0][0] - parts[1][0], parts[0][1] - parts[1][1]
    error, df = _error(values, influence, statistic)
    value = float(values.mean())
    half = float(student.isf((1 - LEVEL) / 2, df)) * error
    p = float(2 * student.sf(abs(value) / error, df)) if error > 0 else float(value == 0)
    apart = np.where(both, first - second, 0.0)[rows][:, columns].mean(axis=0)
    if (np.abs(apart) > 1e-12).sum() < FEW:
        share = statistic.weights / np.maximum(np.bincount(statistic.strata, minlength=len(statistic.weights)), 1)
        p = max(p, _flips(apart * share[statistic.strata]))
    return Difference(value, value - half, value + half, int(both.sum()), len(values), p, error, df)


def measured(scores: np.ndarray, statistic: Statistic) -> float:
    """The statistic of `scores` [seeds, items] as they are, averaged over seeds, without an interval."""
    return float(statistic.of(scores)[0].mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, by Holm's step-down method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def _narrowed(statistic: Statistic, columns: np.ndarray) -> Statistic:
    """The same statistic of the items in `columns` [items] alone."""
    return Statistic(statistic.strata[columns], statistic.weights, statistic.root)


def _error(values: np.ndarray, influence: np.ndarray, statistic: Statistic) -> tuple[float, float]:
    """Standard error of the mean of `values` [seeds] and its degrees of freedom, from influences [seeds, items]."""
    seeds, items = influence.shape
    own = max(items - len(np.unique(statistic.strata)), 1)
    mean = influence.mean(axis=0)
    of_items = float((mean**2).sum())
    if seeds == 1:
        return np.sqrt(of_items), own
    of_seeds = float(values.var(ddof=1)) / seeds
    of_chance = float(((influence - mean) ** 2).sum()) / (seeds * (seeds - 1))
    variance = max(of_seeds + of_items - of_chance, LEAST_SHARE * max(of_items, of_chance))
    spread = of_seeds**2 / (seeds - 1) + of_items**2 / own + of_chance**2 / ((seeds - 1) * own)
    return float(np.sqrt(variance)), max(variance**2 / spread, seeds - 1) if spread > 0 else seeds - 1


def _flips(apart: np.ndarray) -> float:
    """How often differences [items] of random signs add up to at least as much as they do, the measured signs counted
    among them; exact for up to 13 items that differ."""
    apart = apart[np.abs(apart) > 1e-12]
    if len(apart) <= 13:
        signs = 1 - 2 * (np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart)) & 1)
        return float((np.abs(signs @ apart) >= abs(apart.sum()) - 1e-12).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPS, len(apart)))
    return float((np.abs(signs @ apart) >= abs(apart.sum()) - 1e-12).sum() + 1) / (FLIPS + 1)


def estimates(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Accuracy "overall" and for each family of one run's predictions, in the order of appearance."""
    groups = {"overall": list(predictions)}
    for prediction in predictions:
        groups.setdefault(prediction["groups"]["family"][0], []).append(prediction)
    return {
        name: estimate(np.array([p["scores"]["accuracy"] for p in group], float))
        for name, group in groups.items()
        if group
    }


def paired_difference(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]) -> Difference:
    """Accuracy of `first` minus that of `second`; ValueError if the two answered different samples."""
    scores = [{p["id"]: p["scores"]["accuracy"] for p in system} for system in (first, second)]
    if not scores[0] or scores[0].keys() != scores[1].keys():
        odd = sorted(scores[0].keys() ^ scores[1].keys())[:3]
        raise ValueError(f"the two systems did not answer the same samples (for example {odd}); evaluate both anew")
    pair = np.array([[system[key] for key in scores[0]] for system in scores], float)
    return difference(pair[0], pair[1])
