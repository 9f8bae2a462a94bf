"""Kill a training again and again, and see whether it comes to the same bits.

    python -m bench.faults [--kills 60] [--json]

SIGKILL, SIGTERM and SIGUSR1 of a random rank, in every phase of a step; the same command continues until the run is
done, which is then compared with an uninterrupted one by a reader that shares no code with the writer. Half of the runs
have one rank, half two data-parallel ranks, whose launcher kills the others when one dies, as srun does. Exit status 1
unless all runs are equal and nothing is lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.faults_child import PHASES, Strike, run
from bench.timing import JSON_HELP, is_default, report

SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1")
KILLS_A_RUN = 6
STEPS = 3  # of each of the three stages
LONGEST_S = {"generation": 0.06, "update": 0.06, "checkpoint write": 0.01}  # into it; the short ones: begin or end
INTERRUPTED = 75
DEADLINE_S = 180.0  # of one attempt
PRELOAD = ["megatron_avatar.train", "megatron_avatar.training.loop", "bench.faults_child"]


def make_world(folder: Path) -> None:
    """22 synthetic clips, and a random model of the demo's classes with logits wide enough for varied samples."""
    import subprocess

    import torch
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    from data_tools.pretrain import save, tiny_config
    from data_tools.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    save(Qwen2_5OmniThinkerForConditionalGeneration(tiny_config(tokenizer)), tokenizer, folder / "base")
    subprocess.run([sys.executable, "-m", "data_tools.synthesize", "--out", str(folder / "data"), "--size", "tiny"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def settings(world: Path, out: Path) -> list[str]:
    stages = ("visual", "audio_visual", "localisation")
    return [
        "recipe=tiny_avatar", f"model.path={world / 'base'}", f"data.manifest={world / 'data' / 'manifest.jsonl'}",
        f"output_dir={out}", "data.workers=0", "log.wandb=disabled", "rl.replay.min_fill=4", "rl.replay.live=false",
        "rl.hints.patience=1",
        "rl.sampling.max_new_tokens=12", "optim.eps=1e-5", "checkpoint.every=1", "checkpoint.keep=3",
        *(f"stages.{stage}.steps={STEPS}" for stage in stages),
        *(f"stages.{stage}.prompts_per_step=4" for stage in stages),
    ]  # fmt: skip


def plan(kills: int, seed: int) -> list[tuple[str, str]]:
    """Phase and signal of each kill: every combination equally often, in random order."""
    pairs = list(itertools.islice(itertools.cycle(itertools.product(PHASES, SIGNALS)), kills))
    if kills < len(PHASES) * len(SIGNALS):  # too few for all combinations: all phases, signals in turn
        pairs = [(PHASES[k % len(PHASES)], SIGNALS[k % len(SIGNALS)]) for k in range(kills)]
    random.Random(seed).shuffle(pairs)
    return pairs


class Suite:
    def __init__(self, world: Path, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")  # imports once; every rank is a process of its own
        self.context.set_forkserver_preload(PRELOAD)
        self.kills: list[dict[str, Any]] = []
        self.committed = self.lost = 0
        self.damaged: list[str] = []

    def attempt(self, out: Path, ranks: int, strike: Strike | None) -> list[int]:
        """Start the run's command, to its end, its stop or its death; exit codes of the ranks."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} if ranks > 1 else {}
        note, log = out.with_suffix(".note"), out.with_suffix(".log")
        note.unlink(missing_ok=True)
        processes = []
        for rank in range(ranks):
            environment = {"OMP_NUM_THREADS": "1", **place}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(self.context.Process(
                target=run, args=(settings(self.world, out), environment, strike, str(note), str(log))))  # fmt: skip
            processes[-1].start()
        end = time.monotonic() + DEADLINE_S
        while any(p.exitcode is None for p in processes):
            if time.monotonic() > end or any(p.exitcode not in (None, 0, INTERRUPTED) for p in processes):
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        assert time.monotonic() < end, f"an attempt took longer than {DEADLINE_S} s: see {log}"
        return [process.exitcode for process in processes]

    def uninterrupted(self, out: Path, ranks: int) -> None:
        codes = self.attempt(out, ranks, None)
        assert codes == [0] * ranks, f"the uninterrupted run failed: see {out.with_suffix('.log')}"

    def tormented(self, out: Path, ranks: int, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """A run that is killed as planned and continued until done; the kills for which it was over too soon."""
        from bench.faults_reader import damage, trajectories

        pending = list(pairs)
        while not (out / "done.json").exists():
            strike = None
            if pending:
                phase, name = pending[0]
                begin_or_end = self.rng.choice((0.0, -1.0))
                delay = self.rng.random() * LONGEST_S[phase] if phase in LONGEST_S else begin_or_end
                rank = 0 if phase == "rename" else self.rng.randrange(ranks)  # which rank 0 does for all
                strike = Strike(phase, name, rank, self.rng.choice((1, 1, 2)), delay)
            codes = self.attempt(out, ranks, strike)
            note = out.with_suffix(".note")
            if not note.exists():
                if (bad := {*codes} - {0}) and not (bad == {INTERRUPTED}):
                    raise RuntimeError(f"an attempt ended by itself with {codes}: see {out.with_suffix('.log')}")
                pending = pending[1:] + pending[:1]
                if (out / "done.json").exists():
                    break
                continue
            pending.pop(0)
            record = json.loads(note.read_text())
            metrics = out / "metrics.jsonl"
            record["run"], record["logged"] = out.name, len(metrics.read_text().splitlines()) if metrics.exists() else 0
            named, lost, _ = trajectories(out)
            self.committed, self.lost = self.committed + named, self.lost + lost
            self.damaged += damage(out)
            self.kills.append(record)
        return pending

    def seconds_lost(self, folder: Path) -> list[float]:
        """From each signal until the run had logged one step more than it had then."""
        lost = []
        for kill in self.kills:
            out = folder / kill["run"]
            times = [json.loads(line)["time"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            later = times[kill["logged"]] if kill["logged"] < len(times) else (out / "done.json").stat().st_mtime
            lost.append(max(later - kill["time"], 0.0))
        return lost


def measure(kills: int, seed: int, console: Console) -> tuple[dict[str, Any], bool]:
    from bench.faults_reader import differences

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        make_world(folder)
        suite = Suite(folder, seed)
        for ranks in (1, 2):
            suite.uninterrupted(folder / f"whole_{ranks}", ranks)
        pending, unequal, number = plan(kills, seed), {}, 0
        with Progress(console=console) as progress:
            bar = progress.add_task("kills", total=kills)
            while pending:
                ranks, out = 1 + number % 2, folder / f"run_{number}"
                number += 1
                assert number < 4 * kills, "runs end before they can be killed"
                left = suite.tormented(out, ranks, pending[:KILLS_A_RUN])
                pending = left + pending[KILLS_A_RUN:]
                if found := differences(folder / f"whole_{ranks}", out):
                    unequal[out.name] = found
                    console.print(f"[red]{out.name} ({ranks} ranks) differs[/]: {', '.join(found[:6])}; its kills: "
                                  f"{[(k['real'], k['signal']) for k in suite.kills if k['run'] == out.name]}")
                progress.update(bar, completed=len(suite.kills))
        phases = Counter(kill["real"] for kill in suite.kills)
        result = {
            "kills": len(suite.kills), "kills_by_phase": {phase: phases[phase] for phase in (*PHASES, "between")},
            "kills_by_signal": dict(Counter(kill["signal"] for kill in suite.kills)), "runs": number,
            "runs_equal": number - len(unequal), "committed": suite.committed, "lost": suite.lost,
            "damaged_files": len(suite.damaged),
            "seconds_lost_per_kill": round(statistics.median(suite.seconds_lost(folder)), 2), "unequal": unequal,
        }  # fmt: skip
    return result, not unequal and not suite.lost and not suite.damaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result, good = measure(arguments.kills, arguments.seed, Console(stderr=True))
    report("faults", result, as_json=arguments.json, keep=is_default(parser, arguments))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
