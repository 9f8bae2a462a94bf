"""Accuracy with bootstrap intervals, and the paired comparison of two systems. Pure functions over predictions.

A prediction is one line of a file of eval/run.py. Every sample counts, failed ones as wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import grade

Prediction = dict[str, Any]
RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n items with its bootstrap percentile interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean of (first - second) over the n items that both systems answered; p of no difference, two-sided."""

    p: float


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of one system; ValueError naming file and line for a damaged file or a repeated sample."""
    predictions, seen = [], {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                prediction = json.loads(line)
                key = prediction["id"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no prediction ({error!r}); run eval.run again") from None
            if key in seen:
                raise ValueError(f"{path}, line {number}: {key!r} is also on line {seen[key]}; remove one of them")
            seen[key] = number
            predictions.append(prediction)
    return predictions


def rescore(prediction: Prediction) -> Prediction:
    """The prediction, graded again from its text by today's rules; a failed one stays wrong."""
    if prediction["error"] is not None:
        return prediction
    sample = Sample(
        id=prediction["id"],
        stage=prediction["stage"],
        split="",
        family=prediction["family"],
        question="",
        answer=prediction["gold"],
        problem_type=prediction["problem_type"],
        choices=tuple(prediction["choices"]),
    )
    return {**prediction, **grade(sample, prediction["text"])}


def families(predictions: Iterable[Prediction]) -> list[str]:
    """Families in the order in which they first appear."""
    return list(dict.fromkeys(p["family"] for p in predictions))


def system_scores(predictions: list[Prediction]) -> dict[str, float]:
    """results.json's entry for one system: accuracy overall and by family, and the number of samples n."""
    scores = {name: estimate.value for name, estimate in estimates(predictions, resamples=1).items()}
    return {**scores, "n": len(predictions)}


def estimates(predictions: list[Prediction], *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Accuracy "overall" and for each family, each with its 95 % interval."""
    groups = {"overall": predictions}
    groups |= {name: [p for p in predictions if p["family"] == name] for name in families(predictions)}
    return {
        name: _estimate(np.array([p["correct"] for p in group], float), seed, resamples)
        for name, group in groups.items()
        if group
    }


def paired_difference(
    first: list[Prediction], second: list[Prediction], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Accuracy of `first` minus that of `second`, resampling samples with both answers together.

    p is the share of resamples, centred on no difference, that lie at least as far out as the one measured.
    Raises ValueError if the two answered different samples.
    """
    scores = [{p["id"]: p["correct"] for p in system} for system in (first, second)]
    if not scores[0] or scores[0].keys() != scores[1].keys():
        odd = sorted(scores[0].keys() ^ scores[1].keys())[:3]
        raise ValueError(f"the two systems did not answer the same samples (for example {odd}); evaluate both anew")
    deltas = np.array([scores[0][key] - scores[1][key] for key in scores[0]], float)
    estimate = _estimate(deltas, seed, resamples)
    distances = np.abs(_resampled_means(deltas, seed, resamples) - estimate.value)
    extreme = int(np.sum(distances >= abs(estimate.value) - 1e-12))
    p = (extreme + 1) / (resamples + 1)  # the measured sample is one of those that no difference could bring about
    return Difference(estimate.value, estimate.low, estimate.high, estimate.n, p)


def majority_scores(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy of always giving a family's most frequent answer: what a system without perception can reach."""
    hits = {
        name: Counter(p["gold"].casefold() for p in predictions if p["family"] == name).most_common(1)[0][1]
        for name in families(predictions)
    }
    sizes = Counter(p["family"] for p in predictions)
    by_family = {name: hits[name] / sizes[name] for name in hits}
    return {"overall": sum(hits.values()) / len(predictions), **by_family} if predictions else {}


def _estimate(values: np.ndarray, seed: int, resamples: int) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(_resampled_means(values, seed, resamples), [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means [resamples] of bootstrap samples of `values` [n], drawn as counts of its few distinct values."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return drawn @ distinct / len(values)
