"""Headline, further metrics and breakdowns of one file of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.asking.benchmark import Benchmark
from eval.scoring.cells import cell, scored
from eval.scoring.predictions import Prediction
from eval.scoring.stats import Estimate

ERRORS = ("mae", "rmse")  # metrics that are no shares


def summarise(benchmark: Benchmark, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """headline and metrics (name -> Estimate), breakdowns (group -> value -> Estimate), and counts: items answered,
    expected by the owners, failed, left out, asked without a sound that was too long, not judged yet.

    Several completions of an item count as their mean.
    """
    aggregate = asdict(benchmark.aggregate)
    run = {0: scored(predictions)}
    values = {group: sorted({v for own in rows for v in own}) for group, rows in run[0].groups.items()}
    counts = {
        "items": len({p["id"] for p in predictions}), "expected": benchmark.source.items,
        "failed": len({p["id"] for p in predictions if p["error"] is not None}),
        "left out": len({p["id"] for p in predictions if not p["counted"]}),
        "without sound": run[0].unheard,
        "not judged": sum(p["counted"] and p["scores"][aggregate["metric"]] is None for p in predictions),
    }  # fmt: skip
    return {
        "headline": cell(run, aggregate),
        "metrics": _measured({name: cell(run, {"metric": name}) for name in run[0].scores}),
        "breakdowns": {
            group: _measured({value: cell(run, aggregate, (group, value)) for value in values[group]})
            for group in benchmark.records.groups if group in values
        },
        "counts": counts,
    }  # fmt: skip


def _measured(found: dict[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: estimate for name, estimate in found.items() if estimate is not None}


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
        scale, unit = (1, "") if name in ERRORS else (100, " %")
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
    console = console or Console(markup=False)  # groups are the owners' words
    console.print(table)
    counts = summary["counts"]
    partial = "" if counts["items"] == counts["expected"] or not counts["expected"] else " (partial)"
    items = f"{counts['items']} of {counts['expected'] or counts['items']} items{partial}"
    others = ", ".join(f"{counts[name]} {name}" for name in ("failed", "left out", "without sound", "not judged"))
    console.print(f"{items}, {others}", highlight=False)
