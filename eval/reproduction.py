"""The report of a reproduction: every table and figure, what the small study says, and where each number comes from.

    python -m eval.reproduction OUT        (OUT/report.html, provenance.json, study.json, tables/, figures/)

It may be called at any time: what has not been measured yet says so.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from eval import tables
from eval.paper import render
from eval.paper.figures import build as figures
from eval.paper.figures.effects import effects
from eval.paper.figures.folder import families
from eval.paper.figures.series import read_metrics, series
from eval.paper.results import Results
from eval.paper.study import FAMILY, study

HEAD = ("effects", "completions", "families", "figure5", "sample_efficiency", "training")  # first: what shows best


def build(out: Path) -> Path:
    """Write everything; returns the report. ValueError for a folder without runs, or whose files contradict others."""
    there = families(out)
    written = tables.build_all(out)
    tables.write(written, out / "tables", "ours")
    results = Results(out)
    results.tell_unfinished()
    released = any(key[2].partition(".")[2] == "released" for key in results.runs)
    if released:
        tables.write(tables.build_all(out, protocol="released"), out / "tables", "released")
    answers = study(out) if FAMILY in there else None
    more = [effects(answers["effects"], answers["parts"])] if answers else []
    drawn = figures.build(out, there[0], more)
    origin = provenance(out)
    for name, content in (("study", answers), ("provenance", origin)):
        if content is not None:
            (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    small = [table for table in written if table["small"]]
    there_are = [entry["name"] for entry in drawn["figures"]]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": _points, "share": _share, "p_value": render.p_value}
    text = environment.get_template("reproduction.html.j2").render(
        name=out.name,
        families=there,
        first=_first(answers),
        contents=[(render.anchor(table), table["title"]) for table in written
                  if table["small"] or _again([table])["measured"]],
        again=_again(written),
        shown=next((name for name in (*HEAD, *there_are) if name in there_are), None),
        study=answers,
        sections=[render.section(table) for table in small],
        paper_sections=[render.section(table) for table in written if not table["small"]],
        figures=[{**entry, "svg": _svg(out / entry["files"]["svg"]), "page": _page(out, entry)}
                 for entry in drawn["figures"]],
        unmeasured=drawn["unmeasured"],
        origin=origin,
        released=released,
        unfinished=[str(path.relative_to(out)) for path in results.unfinished],
    )  # fmt: skip
    path = out / "report.html"
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    return path


def provenance(out: Path) -> dict[str, Any]:
    """trainings, predictions, and sums: commits, devices, versions, hours; all of it read from what the runs wrote."""
    trainings = []
    for path in sorted(out.glob("runs/*/*/seed_*")):
        if path.parent.is_symlink() or path.is_symlink() or not (path / "config.yaml").exists():
            continue
        about = _read(path / "provenance.json")
        done = _read(path / "done.json")
        records = read_metrics(path / "metrics.jsonl")
        family, system, seed = path.parts[-3:]
        hours = float(series(records, "time/step")[1].sum()) / 3600
        trainings.append({
            "family": family, "system": system, "seed": int(seed.removeprefix("seed_")),
            "updates": int(records[-1]["step"]) if records else 0, "complete": bool(done),
            "completions": done.get("completions_generated"), "hours": round(hours, 3),
            "gpu_hours": round(hours * about.get("gpus", 0), 3),
            "configuration": f"{path.relative_to(out)}/config.yaml", "set_aside": len(done.get("quarantined", {})),
            **{key: about.get(key) for key in ("commit", "device", "processes", "layout", "versions")},
        })  # fmt: skip
    predictions = []
    for path in sorted(out.resolve().glob("predictions/*/*/seed_*/**/*.meta.json")):
        if path.resolve() == path:  # no link to another system's
            predictions.append({"file": str(path.relative_to(out.resolve())), **_read(path)})
    everything = [*trainings, *predictions]
    linked = sorted(f"{p.parent.name}/{p.name}" for p in out.glob("runs/*/*/seed_*") if p.is_symlink())
    return {
        "commits": dict(Counter(entry["commit"] for entry in everything if entry.get("commit"))),
        "devices": dict(Counter(entry["device"] for entry in everything if entry.get("device"))),
        "versions": list({json.dumps(e["versions"]): e["versions"] for e in everything if e.get("versions")}.values()),
        "training_hours": round(sum(t["hours"] for t in trainings), 2),
        "evaluation_hours": round(sum(p.get("seconds", 0.0) for p in predictions) / 3600, 2),
        "gpu_hours": round(sum(entry.get("gpu_hours", 0.0) for entry in everything), 2),
        "linked": linked,
        "trainings": trainings,
        "predictions": predictions,
    }  # fmt: skip


def _first(answers: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What came out, for the head of the page: the main effects that were measured."""
    effects = [effect for effect in (answers or {}).get("effects", ()) if effect["found"]]
    return [effect for effect in effects if effect["tests"] in ("primary", "secondary")][:4]


def _again(written: list[dict[str, Any]]) -> dict[str, int]:
    """Of the paper's own tables: cells, those measured, of these those with a number of the paper's, and
    those whose 95 % interval holds it."""
    cells = [cell for table in written if not table["small"] for row in table["rows"] for cell in row["cells"].values()]
    measured = [cell for cell in cells if cell["measured"] is not None]
    published = [cell for cell in measured if cell["paper"] is not None]
    inside = sum(cell["low"] <= cell["paper"] <= cell["high"] for cell in published)
    return {"cells": len(cells), "measured": len(measured), "published": len(published), "inside": inside}


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _svg(path: Path) -> Markup:
    """The `<svg>` element of a drawing of our own."""
    text = path.read_text(encoding="utf-8")
    return Markup(text[text.index("<svg") :])


def _page(out: Path, entry: dict[str, Any]) -> Markup | None:
    """The fragment that a figure brings along for a page."""
    name = entry["files"].get("html")
    return Markup((out / name).read_text(encoding="utf-8")) if name else None


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m eval.reproduction OUT", file=sys.stderr)
        return 2
    try:
        print(build(Path(arguments[0])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
