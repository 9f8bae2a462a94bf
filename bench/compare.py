"""Benchmarks against the results that are kept of this machine: what has become slower or larger by more than 5 %.

    python -m bench.compare [--keep] NAME ...        (generation, group_update, logprobs, replay, decode, gpu ...)

Runs `python -m bench.NAME --json` and leaves bench/results as it is. Results of another machine (processor, cores, GPU,
versions) are not compared; --keep writes this machine's to bench/results/NAME.MACHINE.json, for the next time. Exit
status 1 where a figure is worse by more than 5 %, 2 where there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.timing import RESULTS

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.05
# How a figure's name ends or begins, and whether more of it is better. The first that fits counts.
MORE = ("tok_s", "tflops", "tb_s", "per_s", "speedup", "mfu", "fraction", "memory_ratio")
LESS = ("_s", "_ms", "_mib", "_mb", "_gib")
NO_FIGURES = ("machine", "date", "versions", "largest_difference")


def figures(result: dict[str, Any], before: str = "") -> Iterator[tuple[str, float, bool]]:
    """(dotted name, value, whether more is better) of all that can get worse."""
    for key, value in result.items():
        name = f"{before}{key}"
        if key in NO_FIGURES:
            continue
        if isinstance(value, dict):
            yield from figures(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if any(part in key for part in MORE):
                yield name, value, True
            elif key.endswith(LESS):
                yield name, value, False


def worse_by(old: float, new: float, more_is_better: bool) -> float:
    """By how much of the old value a figure has become worse; negative where it is better."""
    if not old:
        return 0.0
    return (old - new) / old if more_is_better else (new - old) / old


def compare(kept: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(name, kept, now, worse by) of the figures that both have, the worst first."""
    before = {name: value for name, value, _ in figures(kept)}
    found = [(name, before[name], value, worse_by(before[name], value, better))
             for name, value, better in figures(now) if name in before]  # fmt: skip
    return sorted(found, key=lambda row: -row[3])


def machine_file(name: str, machine: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:8]
    return RESULTS / f"{name}.{digest}.json"


def kept_here(name: str, machine: dict[str, Any]) -> dict[str, Any] | None:
    """The result that was kept of such a machine."""
    for path in (machine_file(name, machine), RESULTS / f"{name}.json"):
        if path.exists() and (kept := json.loads(path.read_text())).get("machine") == machine:
            return kept
    return None


def measure(name: str) -> dict[str, Any]:
    """A benchmark's result; the files that it keeps by itself, its figures among them, stay as they were."""
    before = {path: path.read_bytes() for path in RESULTS.glob(f"{name}.*")}
    try:
        command = [sys.executable, "-m", f"bench.{name}", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench.{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def show(name: str, rows: list[tuple[str, float, float, float]], console: Console) -> None:
    table = Table("figure", "kept", "now", "change for the worse", title=name)
    for figure, old, new, worse in rows:
        style = "red" if worse > LIMIT else None
        table.add_row(figure, f"{old:.5g}", f"{new:.5g}", f"{100 * worse:+.1f} %", style=style)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep this machine's results")
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    console, status = Console(), 0
    for name in arguments.names:
        now = measure(name)
        kept = kept_here(name, now["machine"])
        if arguments.keep:
            machine_file(name, now["machine"]).write_text(json.dumps(now, indent=1) + "\n")
        elif kept is None:
            what = f"{name}: no result of such a machine is kept ({now['machine']}): --keep this one"
            console.print(what, soft_wrap=True)
            status = status or 2
            continue
        if kept is not None:
            rows = compare(kept, now)
            show(name, rows, console)
            if any(worse > LIMIT for *_, worse in rows) and not arguments.keep:
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
