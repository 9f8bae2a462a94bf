"""Reference losses: a few steps of each kind of training, to be the same before and after a change.

    python -m bench.reference [--write]

Trains the tiny base model on synthetic data with a fixed seed: supervised fine-tuning, and from there GRPO and AVATAR
through two stages. Every number of bench/results/reference.json comes out identical on the same processor and versions.
On others they agree within a thousandth of a run's largest, until a token is drawn otherwise, from which on that run is
another one. Exit status 1 where they don't. --write keeps the numbers of now: say why they moved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.timing import RESULTS, machine

ROOT = Path(__file__).resolve().parents[1]
KEPT = RESULTS / "reference.json"
KEYS = ("loss", "grad_norm", "reward", "kl", "entropy", "logprob_error", "tokens", "replay/completions", "lr")
TOLERANCE = 1e-3  # of a run's largest number of a key, on another processor or other versions
DRAWN = ("reward", "tokens", "replay/completions")  # by these one sees that a token was drawn otherwise
DRAWING = ("grpo", "avatar")
SETTINGS = ("log.wandb=disabled", "data.workers=0", "parallel.threads=1", "eval.every=0")
# Two stages, both of clips and rewards by which a model that has learnt the format alone earns something.
RL = ("optim.lr=1e-4", "rl.sampling.max_new_tokens=64", "rl.replay.min_fill=4", "rl.hints.patience=1", "~stages.visual",
      "stages.audio_visual.data=[localisation]",
      "+stages.audio_visual.rewards.judge=0.3",
      *(f"stages.{name}.steps=3" for name in ("audio_visual", "localisation")),
      *(f"stages.{name}.prompts_per_step=4" for name in ("audio_visual", "localisation")))  # fmt: skip
RUNS = {
    "sft": ("recipe=tiny_sft", "optim.lr=2e-3", "stages.sft.steps=40", "stages.sft.prompts_per_step=8"),
    "grpo": ("recipe=tiny_grpo", *RL),
    "avatar": ("recipe=tiny_avatar", *RL, "rl.revisit_share=0.25", "rl.replay.max_age=100"),
}
Curves = dict[str, list[dict[str, Any]]]


def make_data(folder: Path) -> Path:
    """22 synthetic clips; returns their manifest."""
    subprocess.run([sys.executable, "-m", "data_tools.synthesize", "--out", str(folder), "--size", "tiny"], cwd=ROOT,
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return folder / "manifest.jsonl"


def train(name: str, model: Path, manifest: Path, out: Path) -> list[dict[str, Any]]:
    """The steps of one of RUNS: what KEYS say of each. RuntimeError where the training fails."""
    from megatron_avatar.train import main

    status = main([*SETTINGS, *RUNS[name], f"model.path={model}", f"data.manifest={manifest}", f"output_dir={out}"])
    if status:
        raise RuntimeError(f"{name} ended with status {status}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in KEYS if key in record} for record in records]


def measure() -> Curves:
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        runs = Path(folder)
        manifest, base = make_data(runs / "data"), ROOT / "assets" / "tiny_base"
        curves = {"sft": train("sft", base, manifest, runs / "sft")}
        for name in ("grpo", "avatar"):  # what has learnt the format earns rewards
            curves[name] = train(name, runs / "sft" / "export" / "sft", manifest, runs / name)
        return curves


def differences(kept: Curves, now: Curves, *, parting: bool = False) -> list[tuple[str, Any, Any, float]]:
    """(run, step and key; kept; now; difference) of all that isn't identical; with `parting` up to the step in which a
    token was drawn otherwise."""
    found = []
    for name in [*kept, *(name for name in now if name not in kept)]:
        before, after = kept.get(name, []), now.get(name, [])
        if len(before) != len(after):
            found.append((f"{name}: steps", len(before), len(after), math.inf))
        for step, (old, new) in enumerate(zip(before, after, strict=False), 1):
            if parting and name in DRAWING and drawn_otherwise(old, new):
                break
            for key in old | new:
                if old.get(key) != new.get(key):
                    largest = max((abs(r[key]) for r in before if isinstance(r.get(key), int | float)), default=0.0)
                    found.append((f"{name}: step {step}: {key}", old.get(key), new.get(key),
                                  relative(old.get(key), new.get(key), largest)))  # fmt: skip
    return found


def drawn_otherwise(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a step's completions are others."""
    return any(not math.isclose(old.get(key, 0), new.get(key, 0), rel_tol=1e-6) for key in DRAWN)


def parted(kept: Curves, now: Curves) -> dict[str, int]:
    """Run -> the first step whose completions are others."""
    steps = {name: [drawn_otherwise(*pair) for pair in zip(kept.get(name, []), now.get(name, []), strict=False)]
             for name in DRAWING}  # fmt: skip
    return {name: others.index(True) + 1 for name, others in steps.items() if True in others}


def relative(old: Any, new: Any, unit: float) -> float:
    """|new - old| in units of `unit`, unless that is 0; infinite where one of them is no number."""
    if not all(isinstance(value, int | float) for value in (old, new)):
        return math.inf
    return abs(new - old) / (unit or 1.0)


def judge(kept: dict[str, Any], now: Curves, here: dict[str, Any], console: Console) -> int:
    """Say how `now` compares with what was kept; the exit status."""
    found = differences(kept["curves"], now)
    if not found:
        console.print(f"identical in {sum(len(record) for steps in now.values() for record in steps)} numbers")
        return 0
    other = {key: (kept["machine"].get(key), value) for key, value in here.items() if kept["machine"].get(key) != value}
    if other:
        found = differences(kept["curves"], now, parting=True)
    table = Table("", "kept", "now", "of the largest")
    for place, old, new, ratio in found[:40]:
        table.add_row(place, str(old), str(new), f"{ratio:.1e}")
    console.print(table)
    worst = max((ratio for *_, ratio in found), default=0.0)
    parts = parted(kept["curves"], now)
    if other and worst <= TOLERANCE and list(parts.values()) != [1] * len(DRAWING):  # of one run it may be chance
        moved = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in other.items())
        until = "".join(f"; {name} is compared up to step {step}, in which a token is drawn otherwise"
                        for name, step in parts.items())  # fmt: skip
        console.print(f"{len(found)} numbers differ by up to {worst:.1e}, as on another machine: {moved}{until}",
                      soft_wrap=True)  # fmt: skip
        return 0
    console.print(f"{len(found)} numbers differ by up to {worst:.1e}. If that is meant: python -m bench.reference "
                  "--write, and say why in docs/log.md", soft_wrap=True)  # fmt: skip
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the numbers of now")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    now = measure()
    here = {key: value for key, value in machine().items() if key not in ("cores", "threads")}
    if arguments.write:
        KEPT.write_text(json.dumps({"curves": now, "machine": here}, indent=1) + "\n")
        return 0
    if not KEPT.exists():
        print(f"error: {KEPT} doesn't exist: keep numbers with --write first", file=sys.stderr)
        return 2
    return judge(json.loads(KEPT.read_text()), now, here, Console())


if __name__ == "__main__":
    sys.exit(main())
