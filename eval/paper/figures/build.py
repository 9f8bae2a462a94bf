"""All figures of a reproduction's folder: OUT/figures/NAME.svg, .pdf and .png, and figures.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.paper.figures import comparison, completions, from_metrics, from_predictions, gain, style
from eval.paper.figures.entry import Entry
from eval.paper.figures.folder import Folder

KINDS = ("svg", "pdf", "png")
FIGURES = (
    from_predictions.position,
    from_predictions.on_off_ratio,
    from_metrics.solvability,
    from_predictions.tas_lambda,
    from_predictions.over_training,
    from_predictions.families,
    from_metrics.training,
    comparison.comparison,
    from_metrics.advantages,
    gain.tas_gain_by_length,
    from_metrics.sample_efficiency,
    completions.by_completions,
)


def build(out: Path, family: str, more: Sequence[Entry] = ()) -> dict[str, Any]:
    """Draw what a reproduction's folder has measured of one model family, and `more`, and write it; returns
    figures.json's content.

    {"family", "figures": [{name, title, caption, files, sources}], "unmeasured": [{name, title, reason}]}. Files are
    relative to OUT. Raises ValueError naming the file for damaged or contradictory predictions.
    """
    folder = Folder(out, family)
    entries = [*more, *(figure(folder) for figure in FIGURES)]
    target = folder.out / "figures"
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        for stale in target.glob(f"{entry.name}.*"):
            stale.unlink()
    style.save({e.name: e.figure for e in entries if e.figure is not None}, target, KINDS)
    for entry in entries:
        if entry.page:
            (target / f"{entry.name}.html").write_text(entry.page, encoding="utf-8")
    found = {
        "family": family,
        "figures": [_described(entry) for entry in entries if entry.figure is not None],
        "unmeasured": [{"name": e.name, "title": e.title, "reason": e.reason} for e in entries if e.figure is None],
    }
    (target / "figures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _described(entry: Entry) -> dict[str, Any]:
    kinds = (*KINDS, "html") if entry.page else KINDS
    files = {kind: f"figures/{entry.name}.{kind}" for kind in kinds}
    told = {key: getattr(entry, key) for key in ("name", "title", "caption", "sources")}
    return {**told, "files": files}
