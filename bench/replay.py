"""The replay store at its full size: 10,000 trajectories of 2,048 tokens.

    python -m bench.replay [--json]

Opening is timed, and its memory read, in a process of its own. Appending and drawing are set against a step of the
demo (seconds a step of AVATAR in bench/results/demo_seeds.json, seed 0).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.timing import JSON_HELP, RESULTS, is_default, report
from megatron_avatar.config.schema import ReplayConfig
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.replay.store import read_shards, write_shards
from megatron_avatar.rl.tracker import RewardTracker

PROMPTS = 2500
STEP = 64  # trajectories that a step of the demo appends and draws, four a prompt
OPEN = """
import json, re, sys, time
from pathlib import Path
import psutil
from megatron_avatar.rl.replay.store import read_shards
index = json.loads(Path(sys.argv[2]).read_text())
before, start = psutil.Process().memory_info().rss, time.perf_counter()
rows, damaged = read_shards(Path(sys.argv[1]), index)
seconds, after = time.perf_counter() - start, psutil.Process().memory_info().rss
assert len(rows) == int(sys.argv[3]) and not damaged
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([seconds, (after - before) / 1e6, (max(peak, after) - before) / 1e6]))
"""


def trajectory(number: int, step: int, tokens: int, rng: np.random.Generator) -> Trajectory:
    completion = Completion(rng.integers(0, 151936, tokens), rng.normal(-1, 0.5, tokens).astype(np.float32), True)
    return Trajectory(f"sample-{number % PROMPTS:05d}", "plain", completion, float(rng.random()),
                      {"format": 1.0, "accuracy": 1.0}, 0.01, "visual", "visual", step, step)  # fmt: skip


def measure(count: int, tokens: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    buffer, tracker = ReplayBuffer(ReplayConfig(capacity=count)), RewardTracker()
    for prompt in range(PROMPTS):
        tracker.update(f"sample-{prompt:05d}", "plain", rng.random(4).tolist(), solved=True)
    buffer.restore({k: trajectory(k, k // STEP, tokens, rng) for k in range(count)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "replay"
        start = time.perf_counter()
        index = write_shards(folder, buffer.trajectories, known={})
        written = time.perf_counter() - start
        (Path(name) / "index.json").write_text(json.dumps(index))
        command = [sys.executable, "-c", OPEN, folder, Path(name) / "index.json", str(count)]
        opened = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                  for _ in range(rounds)]
        size = sum(path.stat().st_size for path in folder.iterdir())
        alive = {serial: t for serial, t in buffer.trajectories.items() if serial % 5 < 2}  # every shard is mostly dead
        start = time.perf_counter()
        compacted = write_shards(folder, alive, known=index)
        compaction = time.perf_counter() - start
        assert not compacted.keys() & index.keys()
        kept, damaged = read_shards(folder, compacted)
        assert list(kept) == list(alive) and not damaged
    append, draw, last = [], [], count // STEP
    for k in range(4 * rounds):
        fresh = [trajectory(STEP * k + n, last + k, 64, rng) for n in range(STEP)]
        tracker.update(fresh[0].sample_id, "plain", [0.5], solved=True)
        start = time.perf_counter()
        buffer.append(fresh, tracker.tiers())
        append.append(time.perf_counter() - start)
        start = time.perf_counter()
        groups = buffer.draw(STEP, 4, last + k + 1, tracker.tiers(), tracker.mean, tracker.running_std, f"step {k}")
        draw.append(time.perf_counter() - start)
        assert sum(map(len, groups)) == STEP
    step = demo_step()
    return {
        "trajectories": count, "tokens": tokens, "bytes_a_token": size / (count * tokens), "write_s": written,
        "open_s": statistics.median(o[0] for o in opened), "open_mb": statistics.median(o[1] for o in opened),
        "open_peak_mb": statistics.median(o[2] for o in opened), "compact_s": compaction,
        "append_ms": 1e3 * statistics.median(append), "draw_ms": 1e3 * statistics.median(draw), "demo_step_s": step,
        "append_share": statistics.median(append) / step, "draw_share": statistics.median(draw) / step,
    }


def demo_step() -> float:
    """Seconds a step of the demo's AVATAR run on two cores."""
    demo = json.loads((RESULTS / "demo_seeds.json").read_text())["seeds"]["0"]
    return demo["wall_s"]["avatar"] / demo["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    result = measure(arguments.trajectories, arguments.tokens, arguments.rounds)
    report("replay", {name: round(value, 4) for name, value in result.items()}, as_json=arguments.json,
           keep=is_default(parser, arguments))  # fmt: skip


if __name__ == "__main__":
    main()
