"""The tables of docs/dynamics.md, out of bench/results/dynamics.json: `python -m bench.dynamics_tables`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from bench.timing import RESULTS

RATE = "learning rate"


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by name: worlds, differences, rates, agreement, recipes."""
    plain = {name: found for name, found in result["worlds"].items() if RATE not in name}
    rates = {name: found for name, found in result["worlds"].items() if RATE in name}
    tried = next(iter(rates.values()))
    rates["gap"] = {system: what for system, what in plain["gap"].items() if system in tried}
    return {
        "worlds": _by_world(plain, _success, completions=True),
        "differences": _by_world(plain, _difference, leave_out="AVATAR"),
        "rates": _by_world({name: rates[name] for name in sorted(rates, key=_rate)}, _success),
        "agreement": _agreement(result["agreement"]),
        "recipes": _recipes(result["before"], result["recipes"]),
    }


def _rate(name: str) -> int:
    return ["low" in name, RATE not in name, "high" in name].index(True)


def _by_world(worlds: Mapping[str, Mapping], cell: Any, *, completions: bool = False, leave_out: str = "") -> str:
    """A row a system, a column a world; a dash where a system isn't tried."""
    first = max(worlds.values(), key=len)
    rows = [
        [system, *[f"{first[system]['completions']:,}"] * completions,
         *(cell(found, system) if system in found else "-" for found in worlds.values())]
        for system in first if system != leave_out
    ]  # fmt: skip
    return _table(["system", *["completions"] * completions, *worlds], rows)


def _success(found: Mapping[str, Any], system: str) -> str:
    low, high = found[system]["interval"]
    return f"{100 * found[system]['final']:.1f} ± {50 * (high - low):.1f}"


def _difference(found: Mapping[str, Any], system: str) -> str:
    """AVATAR minus the system, seed by seed, in points."""
    values = 100 * (np.array(found["AVATAR"]["by_seed"]) - np.array(found[system]["by_seed"]))
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    told = f"{values.mean():+.1f} ± {half:.1f}"
    return f"**{told}**" if abs(values.mean()) > half else told


def _agreement(rules: Mapping[str, Mapping[str, Any]]) -> str:
    return _table(["rule", "drift to the right answer", "success after a quarter of the steps, %", "at the end, %"], [
        [name, f"{found['drift']:+.3f}", f"{100 * found['early']:.1f} ± {_half(found['early_interval'])}",
         f"{100 * found['final']:.1f} ± {_half(found['interval'])}"]
        for name, found in rules.items()
    ])  # fmt: skip


def _half(interval: Sequence[float]) -> str:
    return f"{50 * (interval[1] - interval[0]):.1f}"


def _recipes(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> str:
    """Before, then now, in each cell."""

    def told(name: str, key: str) -> str:
        texts = [_value(rows[name][key], key) if name in rows else "none" for rows in (before, now)]
        return texts[0] if texts[0] == texts[1] else " → ".join(texts)

    heads = {"hinted": "hinted, of visits", "vanished": "vanished, of groups", "dead": "dead, of replayed",
             "visits_per_prompt": "visits a prompt", "mean_off_advantage": "mean advantage of replayed"}  # fmt: skip
    return _table(["recipe", *heads.values()], [[f"`{name}`", *(told(name, key) for key in heads)] for name in now])


def _value(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return (
        f"{value:+.2f}"
        if key == "mean_off_advantage"
        else f"{value:.1f}"
        if "visits" in key
        else f"{100 * value:.1f} %"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    for name, table in tables(json.loads((RESULTS / "dynamics.json").read_text())).items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
