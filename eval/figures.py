"""Draw a reproduction's figures.

    python -m eval.figures OUT [--family omni_7b|omni_3b|vl_7b|tiny]    # OUT/figures/, figures.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.paper.figures.build import build
from eval.paper.figures.folder import FAMILIES, families


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m eval.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a reproduction's folder, which holds runs/ and predictions/")
    parser.add_argument("--family", choices=FAMILIES, help="by default the first that the folder has")
    chosen = parser.parse_args(arguments)
    try:
        there = families(chosen.out)
        found = build(chosen.out, chosen.family or there[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in found["figures"]:
        print(f"{entry['files']['svg']}: {entry['title']}")
    for entry in found["unmeasured"]:
        print(f"not measured: {entry['name']}, {entry['title']}: {entry['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
