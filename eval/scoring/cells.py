"""From prediction lines to the cells of tables: scores by item, headlines, breakdowns, comparisons of two systems.

A line carries `scores` (metric -> value; null while a judge hasn't answered) and `groups` (breakdown -> values), see
eval/predict.py. An aggregate is a benchmark's {metric, over, merge}: the mean of the metric over items, or over
the means of the values of the breakdown `over`, where the values that `merge` lists are averaged into one first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.scoring.stats import Difference, Estimate, Statistic, difference, estimate, measured

Aggregate = Mapping[str, Any]
Breakdown = tuple[str, str]  # name of a group, and one of its values


@dataclass(frozen=True)
class Scored:
    """One run's counted items in arrays [items]: a score for each metric (NaN: none yet), values of each breakdown.

    Sampled completions of an item are averaged. left_out: lines that the protocol doesn't count; unheard: answers to
    clips whose sound left no room in the context.
    """

    ids: list[str]
    scores: dict[str, np.ndarray]
    groups: dict[str, list[tuple[str, ...]]]
    left_out: int = 0
    unheard: int = 0
    judges: frozenset[str] = frozenset()  # language models that read or judged replies


def scored(predictions: Iterable[Mapping[str, Any]]) -> Scored:
    """The predictions of one run, without their texts. ValueError for a line that lacks a metric of the others."""
    index: dict[str, int] = {}
    places: list[int] = []
    columns: dict[str, list[float]] = {}
    groups: dict[str, list[tuple[str, ...]]] = {}
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # few distinct values, many items
    left_out, unheard, judges = 0, 0, set[str]()
    for line in predictions:
        judges |= {line[key] for key in ("extracted_by", "judged_by") if line.get(key)}
        unheard += line.get("without_sound", False)
        if not line.get("counted", True):
            left_out += 1
            continue
        item = sys.intern(line["id"])
        if item not in index:
            index[item] = len(index)
            for name, values in line["groups"].items():
                own = tuple(values)
                rows = groups.setdefault(name, [])
                rows += [()] * (len(index) - 1 - len(rows))
                rows.append(known.setdefault(own, own))
        scores = line["scores"]
        if places and scores.keys() != columns.keys():
            raise ValueError(f"{line['id']} has the scores {sorted(scores)}, others have {sorted(columns)}; score anew")
        places.append(index[item])
        for metric, value in scores.items():
            value = np.nan if value is None else float(value)
            columns.setdefault(metric, []).append(value * value if metric.endswith("rmse") else value)
    for rows in groups.values():
        rows += [()] * (len(index) - len(rows))
    means = {m: _means(places, v, len(index)) for m, v in columns.items()}
    return Scored(list(index), means, groups, left_out, unheard, frozenset(judges))


def _means(places: list[int], values: list[float], items: int) -> np.ndarray:
    """Mean value of each item; NaN as soon as one of its completions has none."""
    return np.bincount(places, values, items) / np.bincount(places, minlength=items)


def check_headline(run: Scored, aggregate: Aggregate) -> None:
    """ValueError unless the headline's metric is there, and one value of the breakdown that it goes over an item."""
    metric, over = aggregate["metric"], aggregate.get("over")
    if run.ids and metric not in run.scores:
        raise ValueError(f"no score {metric!r}, only {sorted(run.scores)}; score the predictions anew")
    for item, own in zip(run.ids, run.groups.get(over, [()] * len(run.ids)) if over else [], strict=False):
        if len(own) != 1:
            raise ValueError(f"{item} has the values {list(own)} of {over!r}: the headline needs exactly one")


def headline(run: Scored, aggregate: Aggregate) -> float:
    """A benchmark's number for one run, without an interval."""
    scores, statistic = _matrix([{0: run}], aggregate, None)
    return measured(scores[0], statistic)


def cell(by_seed: Mapping[int, Scored], aggregate: Aggregate, breakdown: Breakdown | None = None) -> Estimate | None:
    """Headline, or mean over one value of a breakdown, of one system over its seeds; None where nothing is scored."""
    scores, statistic = _matrix([by_seed], aggregate, breakdown)
    return estimate(scores[0], statistic) if np.isfinite(scores).any() else None


def compare(
    first: Mapping[int, Scored],
    second: Mapping[int, Scored],
    aggregate: Aggregate,
    breakdown: Breakdown | None = None,
) -> Difference | None:
    """`first` minus `second` over the items that both answered with the same seed; None where there is none."""
    scores, statistic = _matrix([first, second], aggregate, breakdown)
    return difference(scores[0], scores[1], statistic) if np.isfinite(scores).all(axis=0).any() else None


def _matrix(
    systems: list[Mapping[int, Scored]], aggregate: Aggregate, breakdown: Breakdown | None
) -> tuple[np.ndarray, Statistic]:
    """Scores [systems, seeds, items] over the union of seeds and items, and what the aggregate makes of them."""
    metric, over = aggregate["metric"], None if breakdown else aggregate.get("over")
    runs = [run for by_seed in systems for run in by_seed.values()]
    strata: dict[str, str] = {}
    for run in runs:
        check_headline(run, {"metric": metric, "over": over})
        values = run.groups.get(breakdown[0] if breakdown else over or "", [()] * len(run.ids))
        for item, own in zip(run.ids, values, strict=True):
            if not breakdown or breakdown[1] in own:
                strata.setdefault(item, own[0] if over else "")
    place = {item: i for i, item in enumerate(strata)}
    seeds = sorted({seed for by_seed in systems for seed in by_seed})
    scores = np.full((len(systems), len(seeds), len(place)), np.nan)
    for number, by_seed in enumerate(systems):
        for seed, run in by_seed.items():
            here = np.array([place.get(item, -1) for item in run.ids], int)
            if len(here):
                scores[number, seeds.index(seed), here[here >= 0]] = run.scores[metric][here >= 0]
    return scores, _statistic(list(strata.values()), aggregate if over else {}, root=metric.endswith("rmse"))


def _statistic(strata: list[str], aggregate: Aggregate, *, root: bool) -> Statistic:
    """Weights of the strata that there are: equal for all, and inside those that are merged into one."""
    merged = {value: name for name, values in (aggregate.get("merge") or {}).items() for value in values}
    names = list(dict.fromkeys(strata))
    units = [merged.get(name, name) for name in names]
    weights = np.array([1 / units.count(unit) for unit in units])
    number = {name: i for i, name in enumerate(names)}
    return Statistic(np.array([number[name] for name in strata], int), weights, root)
