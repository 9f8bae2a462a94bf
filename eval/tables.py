"""The paper's tables beside what was measured.

    python -m eval.tables OUT [--family omni_7b|omni_3b|vl_7b|tiny|all] [--protocol ours|released]

Reads OUT/predictions (and OUT/runs for the number of updates), writes OUT/tables/NAME.md .tex .csv .html, and
tables.json, which holds all of it. Tables of the released protocol are called NAME-released. What rows and columns are:
eval/paper/tables.yaml; the published numbers: eval/paper/results.json. They never appear as measured: a cell without
predictions says "not measured". A tiny model's tables have the paper's rows, and columns of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.paper import contradictions, gain, published, render, spec
from eval.paper.results import Results, Run, check_comparable
from eval.scoring.cells import Breakdown, Scored, cell, compare
from eval.scoring.stats import holm

TINY = "tiny"
TINY_BASE = "tiny base"
Record = dict[str, Any]
Seeds = dict[int, Run]


def build(results: Results, name: str, protocol: str, *, small: bool) -> Record:
    """Table `name` as tables.json holds it, in percent. ValueError naming files that don't belong together."""
    plan = spec()["tables"][name]
    printed = published(plan.get("paper"))
    values = {row["setting"]: row["values"] for row in printed["rows"]}
    family = TINY if small else plan["family"]
    columns = _columns(plan, small, results)
    title = plan.get("title") or printed["title"]
    table: Record = {
        "name": f"small_{name}" if small else name,
        "title": f"{plan.get('small_title', title)}, in small" if small else title,
        "paper": plan.get("paper"),
        "paper_model": printed.get("model", "Qwen2.5-Omni-7B") if plan.get("paper") else None,
        "small": small,
        "family": family,
        "protocol": protocol,
        "control": "",
        "baseline": plan["baseline"],
        "columns": columns,
        "rows": [],
        "data": {},
        "notes": [],
    }
    runs: dict[str, dict[str, Seeds]] = {}
    for setting, aliases in plan["rows"].items():
        if small and not aliases:
            continue
        system = _system(results, family, aliases, columns, protocol)
        runs[setting] = {
            column["name"]: results.find(family, system, column["benchmark"], protocol) if system else {}
            for column in columns
        }
        row = {"setting": setting, "system": system, "out_of_scope": not aliases, "marks": "", "cells": {}}
        row |= _origin(results, runs[setting])
        row["paper_gain"] = gain(values, setting, plan["baseline"]) if small else None
        table["rows"].append(row)
    for column in columns:
        _fill(table, column, {setting: found[column["name"]] for setting, found in runs.items()}, values)
    table["tests"] = _adjust(table["rows"])
    if plan.get("paper") and not small:
        _note_contradictions(table)
    table["notes"] = list(dict.fromkeys(table["notes"]))
    return named_as_run(table) if small else table


def named_as_run(table: Record) -> Record:
    """A small table with the base that was run in the place of the published one's name."""

    def own(text: str) -> str:
        return re.sub(r"Qwen2\.5[- ](?:Omni|VL)(?:-\d+B)?", TINY_BASE, text)

    for row in table["rows"]:
        row["setting"] = own(row["setting"])
    return table | {"baseline": own(table["baseline"]), "notes": [own(note) for note in table["notes"]]}


def _columns(plan: Record, small: bool, results: Results) -> list[Record]:
    """The columns: name, benchmark, and the breakdown [group, value] or None."""
    if small:
        benchmark, group = (spec()["small"][key] for key in ("benchmark", "breakdown"))
        parts = [
            {"name": value.replace("_", " "), "benchmark": benchmark, "breakdown": [group, value]}
            for value in results.values(TINY, benchmark, group)
        ]
        return [{"name": "overall", "benchmark": benchmark, "breakdown": None}, *parts]
    group = plan.get("breakdown")
    return [
        {"name": name, "benchmark": benchmark, "breakdown": [group, name] if group else None}
        for name, benchmark in plan["columns"].items()
    ]


def _system(results: Results, family: str, aliases: list[str], columns: list[Record], protocol: str) -> str | None:
    """The first of equal systems with any predictions for the table: one system a row."""
    for system in aliases:
        if any(results.find(family, system, column["benchmark"], protocol) for column in columns):
            return system
    return None


def _origin(results: Results, row: dict[str, Seeds]) -> Record:
    """Seeds, model folders and training updates behind a row."""
    runs = [run for by_seed in row.values() for run in by_seed.values()]
    trained = {(run.system, run.seed): results.updates(run) for run in runs}
    return {
        "seeds": sorted({run.seed for run in runs}),
        "models": sorted({run.meta["model"] for run in runs}),
        "updates": sorted({steps for steps in trained.values() if steps is not None}),
    }


def _fill(table: Record, column: Record, found: dict[str, Seeds], values: Record) -> None:
    """Give each row its cell in `column`; `found` holds the rows' runs, `values` the paper's numbers."""
    name, benchmark = column["name"], column["benchmark"]
    check_comparable([run for by_seed in found.values() for run in by_seed.values()])
    for row in table["rows"]:
        setting = row["setting"]
        shown = None if table["small"] else values.get(setting, {}).get(name)
        row["cells"][name], remarks = _cell(found[setting], column, shown)
        table["notes"] += [f"{name}, {setting}: {remark}." for remark in remarks]
        if setting != table["baseline"]:
            row["cells"][name]["against_baseline"] = _against(found[setting], found[table["baseline"]], column)
    if runs := [run for by_seed in found.values() for run in by_seed.values()]:
        table["data"][benchmark], remarks = _data(runs)
        table["notes"] += [f"{benchmark}: {remark}." for remark in remarks]


def _cell(by_seed: Seeds, column: Record, shown: float | None) -> tuple[Record, list[str]]:
    """One cell and what has to be said about it; `shown` is the paper's value."""
    empty: Record = {
        "paper": shown, "measured": None, "low": None, "high": None, "difference": None, "n": 0, "answered": 0,
        "expected": None, "partial": False, "seeds": sorted(by_seed), "files": [], "against_baseline": None,
    }  # fmt: skip
    if not by_seed:
        return empty, []
    parts, metas, remarks = _scored(by_seed), [run.meta for run in by_seed.values()], []
    aggregate = metas[0]["aggregate"]
    left_out = sum(part.left_out for part in parts.values())
    waiting = sum(int(np.isnan(part.scores[aggregate["metric"]]).sum()) for part in parts.values() if part.ids)
    items, expected = (sum(meta["dataset"][key] or 0 for meta in metas) for key in ("items", "expected"))
    answered = sum(len(part.ids) for part in parts.values()) + left_out - waiting
    empty |= {
        "answered": answered,
        "expected": expected or items,
        "partial": answered < (expected or items),
        "files": [run.name for run in by_seed.values()],
    }
    if waiting:
        remarks.append(f"{waiting} answers wait for a judge and aren't counted yet")
    if left_out:
        remarks.append(f"{left_out} answers are left out of the denominator, as the protocol does")
    if unheard := sum(part.unheard for part in parts.values()):
        remarks.append(f"{unheard} answers without the clip's sound, which left no room in the context")
    estimate = cell(parts, aggregate, _breakdown(column))
    if estimate is None:
        return empty, remarks
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    gap = None if shown is None else value - shown
    return {**empty, "measured": value, "low": low, "high": high, "difference": gap, "n": estimate.n}, remarks


def _scored(by_seed: Seeds) -> dict[int, Scored]:
    return {seed: run.scored for seed, run in by_seed.items()}


def _breakdown(column: Record) -> Breakdown | None:
    return tuple(column["breakdown"]) if column["breakdown"] else None


def _against(own: Seeds, baseline: Seeds, column: Record) -> Record | None:
    """The row minus the baseline row on the seeds and items of both; an untrained system's run serves all seeds."""
    if not own or not baseline:
        return None
    first, second = _beside(own, baseline), _beside(baseline, own)
    aggregate = next(iter(own.values())).meta["aggregate"]
    found = compare(_scored(first), _scored(second), aggregate, _breakdown(column))
    if found is None:
        return None
    points = {key: 100 * getattr(found, key) for key in ("value", "low", "high")}
    return {**points, "visible": 100 * found.visible(), "n": found.n, "seeds": found.seeds, "p": found.p}


def _beside(by_seed: Seeds, other: Seeds) -> Seeds:
    """`by_seed`, or an untrained system's only run at each seed of `other`."""
    (run, *rest) = by_seed.values()
    return dict.fromkeys(other, run) if not rest and run.system in spec()["untrained"] else by_seed


def _adjust(rows: list[Record]) -> int:
    """Add Holm's adjusted p over all of the table's tests; their number."""
    tests = [c["against_baseline"] for row in rows for c in row["cells"].values() if c["against_baseline"]]
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["holm"] = adjusted
    return len(tests)


def _data(runs: list[Run]) -> tuple[Record, list[str]]:
    """What a column was measured on and how; remarks where the data set isn't the one that the owners count."""
    meta = runs[0].meta
    data = meta["dataset"]
    revisions = sorted({str(run.meta["dataset"].get("revision")) for run in runs})
    remarks = []
    if data["expected"] and data["items"] != data["expected"]:
        remarks.append(f"the data set has {data['items']:,} items where {data['expected']:,} are expected")
    if len(revisions) > 1:
        remarks.append(f"read at several revisions of equal content: {', '.join(revisions)}")
    judges = sorted({judge for run in runs for judge in run.scored.judges})
    said = {"revision": ", ".join(revisions), "temperature": meta["temperature"], "quirks": meta["quirks"],
            "judges": judges}  # fmt: skip
    return {**data, **said}, remarks


def _note_contradictions(table: Record) -> None:
    """Mark the rows whose published values the paper contradicts elsewhere, with a note each."""
    marks = iter("abcdefghijklmnopqrstuvwxyz")
    for row in table["rows"]:
        for sentence in contradictions(table["paper"], row["setting"]):
            mark = next(marks)
            row["marks"] += mark
            table["notes"].append(f"({mark}) {row['setting']}: {sentence}")


def build_all(out: Path, family: str = "all", protocol: str = "") -> list[Record]:
    """Every table of the family. With "all" a tiny model's tables come along if there are predictions of it."""
    results, protocol = Results(out), protocol or spec()["protocol"]
    plans = spec()["tables"]
    wanted = [name for name, plan in plans.items() if plan["family"] != TINY and family in ("all", plan["family"])]
    tables = [build(results, name, protocol, small=False) for name in wanted]
    if family == TINY or (family == "all" and any(key[0] == TINY for key in results.runs)):
        tables += [build(results, name, protocol, small=True) for name, plan in plans.items() if plan.get("small")]
    return tables


def write(tables: list[Record], folder: Path, protocol: str) -> None:
    """Each table in four formats, and all of them in tables.json."""
    folder.mkdir(parents=True, exist_ok=True)
    end = "" if protocol == spec()["protocol"] else f"-{protocol}"
    for table in tables:
        for suffix, text in render.formats(table).items():
            (folder / f"{table['name']}{end}.{suffix}").write_text(text, encoding="utf-8")
    text = json.dumps(tables, indent=1, ensure_ascii=False)
    (folder / f"tables{end}.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    families = sorted({plan["family"] for plan in spec()["tables"].values()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the reproduction")
    parser.add_argument("--family", choices=[*families, "all"], default="all")
    parser.add_argument("--protocol", choices=["ours", "released"], default=spec()["protocol"])
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.out.is_dir():
            raise ValueError(f"{chosen.out} is no folder of a reproduction")
        tables = build_all(chosen.out, chosen.family, chosen.protocol)
        write(tables, chosen.out / "tables", chosen.protocol)
        Results(chosen.out).tell_unfinished()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = sum(c["measured"] is not None for t in tables for row in t["rows"] for c in row["cells"].values())
    print(f"{len(tables)} tables in {chosen.out / 'tables'}, {measured} cells measured")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
