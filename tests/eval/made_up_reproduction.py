"""A reproduction's folder with made-up trainings and predictions of known shape, and one real clip."""

import json
import re
from pathlib import Path

import numpy as np

from megatron_avatar.data.manifest import write_manifest
from megatron_avatar.records import Sample
from tests.eval.made_up import write_clip, write_lines

STAGES = ("visual", "audio_visual", "localisation")
SEEDS = (10, 11)
UPDATES = 60
ITEMS = 48
ON_OFF = {f"on_off_ratio_on{8 - off}_off{off}": 0.65 - 0.02 * abs(off - 4) for off in range(8) if off != 4}
LAMBDA = {f"tas_lambda_lam_{lam}": 0.5 + gain for lam, gain in
          {"0": 0.0, "0.05": 0.02, "0.1": 0.05, "0.5": 0.12, "1.0": 0.11, "2.0": 0.04}.items()}  # fmt: skip
PACE = {"grpo": 0.5, "components_wo_hints": 0.75, "avatar": 1.0, "components_wo_tas": 0.8}
SKILL = {"sft": 0.4, "grpo": 0.5, "avatar": 0.7, "components_wo_tas": 0.55, "components_wo_hints": 0.6}


def write_training(out: Path, system: str, seed: int, updates: int = UPDATES, pace: float = 0.8) -> None:
    folder = out / "runs" / "tiny" / system / f"seed_{seed}"
    write_lines(folder / "metrics.jsonl", [step(system, seed, s, updates, pace) for s in range(updates)])
    flat = system == "grpo" or system.endswith("wo_tas")
    shape = {"shape": "uniform" if flat else "parabolic", "lam": 0.3}
    grpo, off = system == "grpo", re.search(r"_off(\d)$", system)
    rl = {"shaping": shape, "n_off": int(off[1]) if off else 0 if grpo else 4, "revisit_share": 0.0 if grpo else 0.25,
          "hints": {"enabled": not (grpo or system.endswith("wo_hints"))}}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps({"rl": rl}))  # JSON is YAML
    (folder / "done.json").write_text(json.dumps({"steps": updates}))


def step(system: str, seed: int, number: int, updates: int, pace: float) -> dict:
    random = np.random.default_rng((number, seed, len(system)))
    length = updates // 3
    stage, within = STAGES[min(number // length, 2)], number % length
    place = (np.arange(20) + 0.5) / 20
    lam = 0.0 if system == "grpo" else 0.3
    on = random.multinomial(32, [0.05] * 4 + [0] * 12 + [0.05] * 4 + [0.2] + [0.05] * 8 + [0] * 11).tolist()
    per_step = 128 if system == "grpo" else 64
    solved = min(0.95, pace * (0.2 + 0.7 * within / length)) + 0.01 * (seed - 10)
    accuracy = min(1.0, 0.2 + 0.6 * pace * within / length) + 0.02 * random.normal()
    record = {
        "step": number + 1, "stage": stage, "solvability": solved, "solvability/plain": 0.9 * solved,
        "reward/accuracy": accuracy, "accuracy/turn": accuracy,
        "completions_generated": per_step * (number + 1), "vanished": 0.4 if system == "grpo" else 0.2,
        "advantages": {"edges": np.linspace(-5, 5, 41).tolist(), "on": on,
                       "off": [0] * 40 if system == "grpo" else on[::-1]},
        "surrogate_position": ((0.5 + 0.02 * (seed - 10)) * (1 + lam * (2 * place - 1) ** 2)).tolist(),
    }  # fmt: skip
    return record | ({"eval/overall": 0.3 + 0.3 * pace * number / updates} if number % 10 == 9 else {})


def write_predictions(
    out: Path, system: str, seed: int, skill: float, *, benchmark: str = "held_out", control: str = "",
    folder: str = "", n: int = 1, items: int = ITEMS,
) -> None:
    """Right with probability `skill`, by draws that are the same for all systems; item i has 10 + i tokens."""
    random = np.random.default_rng(seed)
    place = out / "predictions" / "tiny" / system / f"seed_{seed}" / folder
    lines = []
    for item in range(items):
        for k in range(n):
            right = float(random.random() < skill)
            lines.append({
                "id": f"s{item}", "k": k, "benchmark": benchmark, "protocol": "ours", "settings": "5e77",
                "kind": "choice", "gold": "A", "text": f"<think>{system} looks $at$ the <b>clip</b> and listens. "
                f"{'So it goes on. ' * 12}</think><answer>A</answer>", "answer": "A",
                "scores": {"accuracy": right}, "tokens": 10 + item,
                "groups": {"stage": [STAGES[item % 3]], "family": ["what"]}, "finished": True, "format": 1.0,
                "error": None,
            })  # fmt: skip
    stem = f"{benchmark}.ours{control}"
    write_lines(place / f"{stem}.jsonl", lines)
    meta = {
        "benchmark": benchmark, "protocol": "ours", "control": "" if n > 1 else control.lstrip("-"), "n": n,
        "temperature": float(n > 1), "system": system, "family": "tiny", "seed": seed, "model": "m",
        "settings": "5e77", "quirks": [],
        "dataset": {"name": benchmark, "revision": "", "fingerprint": "f", "items": ITEMS, "expected": ITEMS},
        "aggregate": {"metric": "accuracy", "over": None, "merge": {}},
    }  # fmt: skip
    (place / f"{stem}.meta.json").write_text(json.dumps(meta))


def write_reproduction(out: Path) -> Path:
    """Main systems and two ablations with two seeds, the sweeps with one: what the tiny profile leaves behind."""
    for seed in SEEDS:
        for system, pace in PACE.items():
            write_training(out, system, seed, pace=pace)
        for system, skill in SKILL.items():
            write_predictions(out, system, seed, skill)
        for system in ("grpo", "avatar"):
            write_predictions(out, system, seed, SKILL[system], control="-g8", n=8)
            for at in (20, 40):
                write_predictions(out, system, seed, SKILL[system] - 0.1 + at / 400, folder=f"step_{at}")
    for system, skill in {**ON_OFF, **LAMBDA}.items():
        write_training(out, system, SEEDS[0])
        write_predictions(out, system, SEEDS[0], skill)
    media = write_clip(out / "data")
    write_manifest(out / "data" / "manifest.jsonl", [
        Sample(f"s{i}", STAGES[i % 3], "eval", "what", "Which shape is <b>red</b>?", "A", "multiple_choice", ("x", "y"),
               (media,)) for i in range(ITEMS)
    ])  # fmt: skip
    return out
