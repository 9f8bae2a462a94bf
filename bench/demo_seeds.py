"""The demo over several seeds, and AVATAR against GRPO at equal updates and at equal generated completions.

    python -m bench.demo_seeds --seeds 0 1 2 --json

GRPO generates twice as many completions a step, so it gets half the updates in every stage for the second
comparison. Held-out samples of all seeds are compared in pairs (same sample, two systems).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from bench.timing import JSON_HELP, RESULTS, is_default
from eval.demo import Job, evaluation, predictions_file, run_phase, training
from eval.score import read_predictions, system_scores
from eval.stats import paired_difference

PAIRS = (("sft", "base"), ("avatar", "grpo"), ("avatar", "grpo_half"), ("grpo", "sft"), ("avatar", "sft"))


def half_jobs(out: Path, seed: int) -> tuple[Job, Job]:
    """Training and evaluation of GRPO with half the updates of the demo in `out`."""
    full = training(out, "grpo", "tiny_grpo", seed)
    halves = [f"stages.{name}.steps={stage.steps // 2}" for name, stage in full.config.stages.items()]
    last = list(full.config.stages)[-1]
    return (
        training(out, "grpo_half", "tiny_grpo", seed, f"model.path={full.config.model.path}", *halves),
        evaluation(out, "grpo_half", out / "grpo_half" / "export" / last),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    folders = {seed: arguments.root / (f"demo-seed{seed}" if seed else "demo") for seed in arguments.seeds}
    for seed, out in folders.items():
        subprocess.run([sys.executable, "-m", "eval.demo", "--out", str(out), "--seed", str(seed)], check=True)
    jobs = [half_jobs(out, seed) for seed, out in folders.items()]
    for seed, (train, evaluate) in zip(folders, jobs, strict=True):
        train.name = evaluate.name = f"grpo_half, seed {seed}"
    run_phase([train for train, _ in jobs], "train")
    run_phase([evaluate for _, evaluate in jobs], "eval")

    systems = ("base", "sft", "grpo", "grpo_half", "avatar")
    predictions = {s: [read_predictions(predictions_file(out, s)) for out in folders.values()] for s in systems}
    pooled = {s: [{**p, "id": f"{seed}/{p['id']}"} for seed, part in zip(folders, parts, strict=True) for p in part]
              for s, parts in predictions.items()}
    result = {
        "date": date.today().isoformat(),
        "seeds": {str(seed): json.loads((out / "results.json").read_text()) for seed, out in folders.items()},
        "grpo_half": {
            str(seed): {**system_scores(part), "completions_generated": json.loads(
                (out / "grpo_half" / "done.json").read_text())["completions_generated"]}
            for (seed, out), part in zip(folders.items(), predictions["grpo_half"], strict=True)
        },
        "pooled": {s: system_scores(parts) for s, parts in pooled.items()},
        "differences": {f"{a} - {b}": asdict(paired_difference(pooled[a], pooled[b])) for a, b in PAIRS},
    }
    if arguments.json:
        if is_default(parser, arguments):
            (RESULTS / "demo_seeds.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))
    for name, difference in result["differences"].items():
        print(f"{name:<22} {100 * difference['value']:+.1f} points "
              f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}], p = {difference['p']:.3f}",
              file=sys.stderr)


if __name__ == "__main__":
    main()
