"""Predictions: reading, scoring again, scores of a system. Intervals and comparisons: eval/stats.py.

A prediction is one line of a file of eval/run.py. Every sample counts, failed ones as wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.stats import estimates
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import grade

Prediction = dict[str, Any]


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


def majority_scores(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy of always giving a family's most frequent answer: what a system without perception can reach."""
    hits = {
        name: Counter(p["gold"].casefold() for p in predictions if p["family"] == name).most_common(1)[0][1]
        for name in families(predictions)
    }
    sizes = Counter(p["family"] for p in predictions)
    by_family = {name: hits[name] / sizes[name] for name in hits}
    return {"overall": sum(hits.values()) / len(predictions), **by_family} if predictions else {}
