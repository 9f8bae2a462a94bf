"""A run small enough for tests: 22 synthetic clips, a random model of the demo's classes, three short RL stages.

`python -m tests.training.small FOLDER` makes model and data; everything else goes through the product's commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.faults import make_world as make
from tests.ranks import Done, Ranks
from tests.training.disturbed import train as train_disturbed

ROOT = Path(__file__).parents[2]


def arguments(folder: Path, out: Path, *overrides: str, recipe: str = "tiny_avatar", steps: int = 2) -> list[str]:
    """Command-line settings of a short run on `make`'s folder."""
    stages = ["sft"] if recipe == "tiny_sft" else ["visual", "audio_visual", "localisation"]
    return [
        f"recipe={recipe}", f"model.path={folder / 'base'}", f"data.manifest={folder / 'data' / 'manifest.jsonl'}",
        f"output_dir={out}", "data.workers=0", "log.wandb=disabled", "rl.replay.min_fill=4", "rl.hints.patience=1",
        "rl.replay.live=false",  # a random model earns nothing: none of its completions has an advantage
        "rl.sampling.max_new_tokens=12",
        # A random model's groups often vanish: AdamW would make steps of full length from a gradient of rounding alone.
        "optim.eps=1e-5",
        *(f"stages.{s}.steps={steps}" for s in stages), *(f"stages.{s}.prompts_per_step=4" for s in stages), *overrides,
    ]


def start(*arguments: str, ranks: int = 1, disturbed: str = "", **environment: str) -> Ranks:
    """Start the product's entry point, or one that is `disturbed`, on several ranks."""
    return Ranks(train_disturbed, disturbed, list(arguments), ranks=ranks, **environment)


def train(*arguments: str, timeout: float = 600, **options) -> Done:
    """The same to its end."""
    return start(*arguments, **options).wait(timeout)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
