"""What each large recipe takes, as a table: `python -m megatron_avatar.planning.recipes [cluster.gpu=a100 ...]`.

Estimates, in seconds and without torch. Whether it fits isn't asked here: `dry_run=true` has every rank's memory to the
byte.
"""

from __future__ import annotations

import sys

from megatron_avatar.config.load import CONFIG_DIR, load_config
from megatron_avatar.config.validate import check_world
from megatron_avatar.planning import outline

HEAD = ("recipe", "GPUs", "layout", "steps", "hours", "disk, GiB")


def rows(overrides: list[str]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """A row a recipe, under the settings that are given; and of the recipes that can't be run with them, why."""
    found: list[tuple[str, ...]] = []
    refused = {}
    for path in sorted((CONFIG_DIR / "recipe").glob("*.yaml")):
        if path.stem.startswith("tiny_"):
            continue
        config = load_config([f"recipe={path.stem}", "model.path=-", "data.manifest=-", "output_dir=-", *overrides])
        try:
            where, shape = outline.layout(config), outline.shape_of(config)
            check_world(config, where.gpus)
        except ValueError as error:
            refused[path.stem] = str(error)
            continue
        hours = sum(outline.stage_hours(config, where).values())
        parallel = config.parallel
        parts = [f"tp {parallel.tp}", *[f"pp {parallel.pp}"] * (parallel.pp > 1), *[f"dp {where.dp}"] * (where.dp > 1)]
        steps = sum(stage.steps for stage in config.stages.values())
        found.append((f"`{path.stem}`", str(where.gpus), ", ".join(parts), f"{steps:,}", f"{hours:.1f}",
                      f"{outline.kept_bytes(config, shape) / outline.GIB:,.0f}"))  # fmt: skip
    return found, refused


def main(arguments: list[str]) -> int:
    if "--help" in arguments:
        print(__doc__)
        return 0
    try:
        table, refused = rows(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in (HEAD, ("---",) * len(HEAD), *table):
        print(f"| {' | '.join(line)} |")
    for name, why in refused.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    return 0 if table else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
