"""A run's folder with made-up numbers and a real clip, for the figures and the report."""

import json
from pathlib import Path

import av
import numpy as np
import soundfile

from eval.demo import predictions_file
from megatron_avatar.data.manifest import write_manifest
from megatron_avatar.records import Media, Sample

STAGES = {"visual": ("what", "count"), "audio_visual": ("sync",), "localisation": ("where",)}
ATTACK = "<script>alert('x')</script> | `code` & more"
SKILL = {"base": 0.25, "sft": 0.45, "grpo": 0.55, "avatar": 0.8}


def write_clip(folder: Path) -> Media:
    """Two seconds of a square that moves over a blue ground, with a tone."""
    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(folder / "clip.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, options={"lag-in-frames": "0", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 84, 84, "yuv420p"
        for index in range(16):
            picture = np.full((84, 84, 3), (30, 60, 160), np.uint8)
            picture[30:54, 4 * index : 4 * index + 20] = (230, 60, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000) * (np.arange(32000) > 12000)
    soundfile.write(folder / "clip.flac", tone, 16000)
    return Media("clip.webm", "video", 16, 8.0, None, 84, 84, "clip.flac", 32000, True)


def write_run(root: Path, items: int = 160, steps: int = 30) -> Path:
    """All that a finished demo leaves behind, except its weights."""
    media = write_clip(root / "data")
    names = [(stage, family) for stage, families in STAGES.items() for family in families]
    samples = []
    for index in range(items):
        stage, family = names[index % len(names)]
        question = f"Which shape is <b>red</b>? ({index})"
        answer = "AB"[index // 4 % 2]
        samples.append(
            Sample(f"s{index}", stage, "eval", family, question, answer, "multiple_choice", ("x", "y"), (media,))
        )
    write_manifest(root / "data" / "manifest.jsonl", samples)

    for name, skill in SKILL.items():
        draws = np.random.default_rng(7).random(items)  # the same for all: a better system is right wherever a worse is
        lines = []
        for sample, draw in zip(samples, draws, strict=True):
            right = bool(draw < skill)
            lines.append({
                "id": sample.id, "k": 0, "benchmark": "held_out", "protocol": "ours", "settings": "made up",
                "kind": "choice", "gold": sample.answer, "choices": ["x", "y"], "letters": "AB", "keep": {},
                "groups": {"stage": [sample.stage], "family": [sample.family]}, "text": f"{name} says {ATTACK}",
                "answer": sample.answer if right else None, "scores": {"accuracy": float(right)}, "counted": True,
                "format": float(name != "base"), "error": None,
            })  # fmt: skip
        if name == "sft":
            lines[5] |= {"error": "clip.webm: damaged <file>", "scores": {"accuracy": 0.0}, "text": ""}
        write_lines(predictions_file(root, name), lines)

    write_lines(root / "sft" / "metrics.jsonl", [
        {"step": s + 1, "stage": "sft", "stage_step": s + 1, "loss": 3 * 0.9**s, "tokens_per_s": 900.0}
        for s in range(steps)
    ])  # fmt: skip
    for name in ("grpo", "avatar"):
        write_lines(root / name / "metrics.jsonl", [rl_step(name, s, steps) for s in range(steps)])
    damaged = {"quarantined": {"s<9>": "clip.webm: ends before frame 12"}}
    (root / "avatar" / "done.json").write_text(json.dumps(damaged))
    (root / "results.json").write_text(json.dumps({
        "systems": {}, "steps": steps, "completions_generated": {"grpo": 64 * steps, "avatar": 32 * steps},
        "wall_s": {"data": 20.5, "sft": 61.0, "grpo": 200.2, "avatar": 181.9}, "peak_rss_mib": 3456.7, "seed": 11,
        "versions": {"torch": "2.13.0"},
    }))  # fmt: skip
    return root


def rl_step(name: str, step: int, steps: int) -> dict:
    random = np.random.default_rng((step, len(name)))
    stage = list(STAGES)[3 * step // steps]
    place = (np.arange(20) + 0.5) / 20
    shape = 1 + 0.3 * (2 * place - 1) ** 2 if name == "avatar" else np.ones(20)
    on = random.multinomial(64, [1 / 40] * 40).tolist()
    record = {
        "step": step + 1, "stage": stage, "stage_step": step % 10 + 1,
        "reward": 0.4 + step / 100 + 0.05 * random.normal(),
        "reward/format": 0.9, "reward/accuracy": 0.3 + step / 80, "accuracy/turn": 0.3 + step / 80,
        "reward/self": None, "reward/judge": None,
        "vanished": 0.3, "tier/easy": step, "tier/medium": 2 * step, "tier/hard": 3 * step, "rbar_hist": [1] * 10,
        "replay/age": 2.0 if step else None, "replay/age_max": step if step else None,
        "replay/dead": 0.25 if step % 10 else None, "replay/correct": 0.5 if step % 10 else None,
        "replay/ratio_max": 1.0 + step / 10, "replay/bounded_tokens": 0.0, "hints/share": 0.125 * (step % 3),
        "kl": 0.01 * step, "entropy": 1.0, "length": 20.0,
        "solvability": step / steps, "loss": 0.1, "completions_generated": 32 * (step + 1),
        "advantages": {"edges": np.linspace(-5, 5, 41).tolist(), "on": on, "off": on if name == "avatar" else [0] * 40},
        "surrogate_position": [None, *(0.5 * shape[1:]).tolist()],
        **{f"time/{part}": 0.1 + 0.05 * i for i, part in enumerate(
            ("decode", "towers", "generate", "reward", "logprobs", "update", "checkpoint"))},
        "time/step": 2.0,
    }  # fmt: skip
    return record | ({"eval/overall": 0.3 + step / 90} if step % 10 == 9 else {})


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
