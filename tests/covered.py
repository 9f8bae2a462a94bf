"""What the tests ran: lines and branches of every room, from coverage's data.

    python -m tests.covered [--files]

--files lists the files below a room, the least covered first. `make test-all` prints it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import coverage
from rich.console import Console
from rich.table import Table

Counts = tuple[int, int, int, int]  # lines there and run, branches there and taken


def measured() -> dict[str, Counts]:
    """File -> its counts."""
    data = coverage.Coverage()
    data.load()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        data.json_report(outfile=file.name)
        files = json.loads(Path(file.name).read_text())["files"]
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {name: tuple(entry["summary"][n] for n in names) for name, entry in files.items()}


def room_of(name: str) -> str:
    """megatron_avatar/rl of megatron_avatar/rl/replay/store.py, slurm of slurm/jobs.py."""
    parts = Path(name).parts
    deep = parts[0] in ("megatron_avatar", "eval") and len(parts) > 2
    return "/".join(parts[: 2 if deep else 1])


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def main() -> None:
    files = measured()
    rooms: dict[str, list[str]] = defaultdict(list)
    for name in files:
        rooms[room_of(name)].append(name)
        rooms["all"].append(name)
    table = Table("", "lines", "run", "branches", "taken")
    for room in [*sorted(rooms.keys() - {"all"}), "all"]:
        there, ran, branches, taken = (sum(files[name][k] for name in rooms[room]) for k in range(4))
        table.add_row(room, str(there), share(ran, there), str(branches), share(taken, branches), style="bold")
        if "--files" in sys.argv and room != "all":
            for name in sorted(rooms[room], key=lambda n: files[n][1] / max(files[n][0], 1)):
                there, ran, branches, taken = files[name]
                table.add_row(f"  {name}", str(there), share(ran, there), str(branches), share(taken, branches))
    Console().print(table)


if __name__ == "__main__":
    main()
