"""What the paper prints (results.json), and which systems and benchmarks fill its tables (tables.yaml)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
Record = dict[str, Any]


@cache
def paper() -> Record:
    """The published numbers: {"supplement": {"table1": ...}, "main": {"av": ...}, "conflicts": [...]}."""
    return json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@cache
def spec() -> Record:
    """tables.yaml: `tables` by name, columns of `small` tables, the preferred `protocol`, `untrained` systems."""
    return yaml.safe_load((FOLDER / "tables.yaml").read_text(encoding="utf-8"))


def published(key: str | None) -> Record:
    """The paper's table "main.av": title, columns, rows, model; an empty one for a table of our own."""
    if not key:
        return {"title": "", "columns": [], "rows": []}
    part, _, name = key.partition(".")
    return paper()[part][name]


def place(key: str) -> str:
    """Where in the paper the table is: "supplement, Table 3"; "main paper, Audio-visual, 7B"."""
    part, _, name = key.partition(".")
    if part == "supplement":
        return f"supplement, Table {name.removeprefix('table')}"
    return f"main paper, {paper()[part][name]['title']}"


def contradictions(key: str, setting: str) -> list[str]:
    """What the paper prints elsewhere for the same thing as in a row of table `key`, one sentence a conflict."""
    found = []
    for conflict in paper()["conflicts"]:
        own = [c for c in conflict["cells"] if c["table"] == key and c["setting"] == setting]
        said = {(c["column"], c["value"]) for c in own}
        others = [c for c in conflict["cells"] if c["table"] != key and (c["column"], c["value"]) not in said]
        if own and others:
            where = "; ".join(f"{c['value']} ({c['column']}) in {place(c['table'])}: {c['setting']}" for c in others)
            remark = f"; {conflict['note']}" if "note" in conflict else ""
            found.append(f"for {conflict['what']} the paper also prints {where}{remark}.")
    return found


def gain(values: Record, setting: str, baseline: str) -> float | None:
    """The mean over a table's benchmarks of a published row minus the baseline row; None without either."""
    if setting == baseline or setting not in values or baseline not in values:
        return None
    gaps = [value - values[baseline][column] for column, value in values[setting].items()]
    return sum(gaps) / len(gaps)
