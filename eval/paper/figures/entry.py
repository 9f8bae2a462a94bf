"""One figure of a reproduction: what it shows, in words, and what it was drawn from; or why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.paper import paper
from eval.paper.figures.folder import PROTOCOL, Training
from eval.paper.results import Run


@dataclass(frozen=True)
class Entry:
    """A drawn figure with its caption, or none and the `reason`; `page`: its HTML form, where it has one.

    sources: what it was drawn from (systems with seeds and updates, protocol, files).
    """

    name: str
    title: str
    figure: Figure | None
    caption: str = ""
    reason: str = ""
    sources: dict[str, Any] = field(default_factory=dict)
    page: str = ""

    def __post_init__(self) -> None:
        assert (self.figure is None) == bool(self.reason), self.name


def sources(
    out: Path, trainings: Mapping[str, Mapping[int, Training]], predictions: Sequence[Run] = ()
) -> dict[str, Any]:
    """What a figure was drawn from; paths relative to the reproduction's folder."""
    runs = [run for by_seed in trainings.values() for run in by_seed.values()]
    systems: dict[str, dict[str, list[int]]] = {}
    for run in runs:
        entry = systems.setdefault(run.system, {"seeds": [], "updates": []})
        entry["seeds"].append(run.seed)
        entry["updates"].append(run.updates)
    for run in predictions:
        entry = systems.setdefault(run.system, {"seeds": [], "updates": []})
        entry["seeds"] = sorted({*entry["seeds"], run.seed})
    files = [run.folder / "metrics.jsonl" for run in runs] + [run.path for run in predictions]
    return {
        "systems": systems,
        "protocol": PROTOCOL if predictions else None,
        "files": [str(path.relative_to(out)) for path in dict.fromkeys(files)],
    }


def seeds_told(seeds: Mapping[str, Iterable[int]] | Sequence[Run]) -> str:
    """A sentence on the seeds of each system of a figure (or of predictions), one for all if they have the same."""
    if not isinstance(seeds, Mapping):
        seeds = {run.system: {r.seed for r in seeds if r.system == run.system} for run in seeds}
    by_system = {label: sorted(own) for label, own in seeds.items()}
    if len({tuple(seeds) for seeds in by_system.values()}) == 1:
        return f"{_listed(next(iter(by_system.values())))}."
    return "; ".join(f"{label}: {_listed(seeds)}" for label, seeds in by_system.items()) + "."


def _listed(seeds: Sequence[int]) -> str:
    return f"{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}"


def partial_told(runs: Sequence[Run]) -> str:
    """A sentence on the predictions that don't hold all items yet; empty if all do."""
    short = [f"{run.system}, seed {run.seed}, {run.meta['benchmark']}: {len(run.scored.ids) + run.scored.left_out} of "
             f"{run.meta['dataset']['expected'] or run.meta['dataset']['items']} items"
             for run in runs if len(run.scored.ids) + run.scored.left_out
             < (run.meta["dataset"]["expected"] or run.meta["dataset"]["items"])]  # fmt: skip
    return f"Partial: {'; '.join(short)}." if short else ""


def published(key: str) -> str:
    """The paper's figure in its own words, as a note; it gives shapes, and they are never drawn. Empty if unknown."""
    found = {**paper()["supplement"], **paper()["main"]}.get(key)
    if not found:
        return ""
    if key == "tas_gain_by_length":
        parts = [f"{name}: {', '.join(map(str, values))} points" for name, values in found.items() if name != "bins"]
        words = f"by bins {', '.join(found['bins'])}: {'; '.join(parts)}"
    elif key == "sample_efficiency":
        ours, theirs = found["AVATAR"], found["GRPO"]
        words = (f"accuracy reward {found['target_accuracy_reward']} after {ours['unique_completions']:,} completions "
                 f"with AVATAR, not reached after {theirs['unique_completions']:,} with GRPO")  # fmt: skip
    else:
        series = found.get("series", [])
        told = [f"{name}: {shape}" for name, shape in series.items()] if isinstance(series, dict) else series
        words = "; ".join([*told, *([found["shape"]] if "shape" in found else [])])
    return f"Published shape: {words}." if words else ""


def joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
