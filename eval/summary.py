"""Headline, further metrics and breakdowns of one file of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.benchmark import Benchmark
from eval.score import Prediction
from eval.stats import Estimate, Statistic, estimate

ROOTS = ("rmse",)  # metrics whose items' errors are squared, averaged, and put under a root


def summarise(benchmark: Benchmark, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """headline and metrics (name -> Estimate), breakdowns (group -> value -> Estimate), and counts: items answered,
    that the owners expect, failed, not judged yet. Several completions of an item count as their mean (rmse: that of
    their squares)."""
    counted = [p for p in predictions if p["counted"]]
    aggregate = benchmark.aggregate
    names = list(dict.fromkeys(name for p in counted for name in p["scores"]))
    metrics = {name: found for name in names if (found := _estimate(counted, name)) is not None}
    over = aggregate.over
    headline = _headline(counted, aggregate.metric, over, aggregate.merge) if over else metrics.get(aggregate.metric)
    breakdowns = {}
    for group in benchmark.records.groups:
        values = sorted({value for p in counted for value in p["groups"].get(group, ())})
        parts = {value: [p for p in counted if value in p["groups"][group]] for value in values}
        breakdowns[group] = {
            value: found for value, part in parts.items() if (found := _estimate(part, aggregate.metric)) is not None
        }
    counts = {
        "items": len({p["id"] for p in predictions}), "expected": benchmark.source.items,
        "failed": len({p["id"] for p in predictions if p["error"] is not None}),
        "left out": len({p["id"] for p in predictions if not p["counted"]}),
        "not judged": sum(p["scores"].get(aggregate.metric, 0.0) is None for p in counted),
    }  # fmt: skip
    return {"headline": headline, "metrics": metrics, "breakdowns": breakdowns, "counts": counts}


def _values(predictions: Sequence[Prediction], metric: str) -> dict[str, float]:
    """Item -> mean over its completions, of squares for ROOTS; what is not judged yet is left out."""
    found: dict[str, list[float]] = {}
    for p in predictions:
        if (value := p["scores"].get(metric)) is not None:
            found.setdefault(p["id"], []).append(value**2 if metric in ROOTS else value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def _estimate(predictions: Sequence[Prediction], metric: str) -> Estimate | None:
    values = np.array(list(_values(predictions, metric).values()))
    if not len(values):
        return None
    return estimate(values, Statistic(np.zeros(len(values), int), np.ones(1), metric in ROOTS))


def _headline(
    predictions: Sequence[Prediction], metric: str, over: str, merge: dict[str, list[str]]
) -> Estimate | None:
    """Mean over the breakdown's values, merged ones averaged first."""
    values = _values(predictions, metric)
    if not values:
        return None
    stratum_of = {p["id"]: p["groups"][over][0] for p in predictions if p["id"] in values}
    present = sorted(set(stratum_of.values()))
    parent = {child: name for name, children in merge.items() for child in children}
    parents = sorted({parent.get(name, name) for name in present})
    siblings = {name: sum(parent.get(other, other) == name for other in present) for name in parents}
    weights = np.array([1 / len(parents) / siblings[parent.get(name, name)] for name in present])
    strata = np.array([present.index(stratum_of[key]) for key in values])
    return estimate(np.array(list(values.values())), Statistic(strata, weights))


def as_json(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with its estimates as plain objects."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return asdict(value)
        return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value

    return plain(summary)


def show(summary: dict[str, Any], title: str, console: Console | None = None) -> None:
    """Print the summary as a table."""
    table = Table("", "value", "95 % interval", "items", title=title)

    def row(name: str, found: Estimate) -> None:
        scale, unit = (1, "") if name.strip() in ("mae", *ROOTS) else (100, " %")
        table.add_row(name, f"{scale * found.value:.1f}{unit}", f"{scale * found.low:.1f} to {scale * found.high:.1f}",
                      str(found.n))  # fmt: skip

    if summary["headline"] is not None:
        row("headline", summary["headline"])
    for name, found in summary["metrics"].items():
        row(name, found)
    for group, values in summary["breakdowns"].items():
        table.add_section()
        for value, found in values.items():
            row(f"{group}: {value}", found)
    console = console or Console()
    console.print(table)
    counts = summary["counts"]
    partial = "" if counts["items"] == counts["expected"] or not counts["expected"] else " (partial)"
    items = f"{counts['items']} of {counts['expected'] or counts['items']} items{partial}"
    others = ", ".join(f"{counts[name]} {name}" for name in ("failed", "left out", "not judged"))
    console.print(f"{items}, {others}", highlight=False)
