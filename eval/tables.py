"""Accuracy of every system in a folder of predictions, by family, with 95 % bootstrap intervals.

    python -m eval.tables --out FOLDER runs/smoke/eval        (writes FOLDER/tables.md and FOLDER/tables.json)
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from eval.score import read_predictions
from eval.stats import Estimate, estimates


def measure(folder: Path) -> dict[str, dict[str, Estimate]]:
    """System -> family (and overall) -> accuracy. ValueError where nothing was predicted."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no predictions (*.jsonl): run eval.run first")
    return {path.stem: estimates(read_predictions(path)) for path in files}


def markdown(systems: dict[str, dict[str, Estimate]]) -> str:
    columns = list(dict.fromkeys(name for found in systems.values() for name in found))
    lines = [f"| system | {' | '.join(columns)} | n |", "|---" * (len(columns) + 2) + "|"]
    for name, found in systems.items():
        cells = [f"{100 * found[c].value:.1f} [{100 * found[c].low:.1f}, {100 * found[c].high:.1f}]" if c in found
                 else "not measured" for c in columns]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {max(e.n for e in found.values())} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="predictions, one file a system")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        systems = measure(chosen.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "tables.md").write_text(markdown(systems))
    found = {name: {key: asdict(value) for key, value in part.items()} for name, part in systems.items()}
    (chosen.out / "tables.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
