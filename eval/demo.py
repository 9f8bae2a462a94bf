"""The whole of AVATAR in small: data, SFT, GRPO and AVATAR side by side, evaluation, report.

    python -m eval.demo --out runs/demo --seed 0

Every phase is a command of its own that continues where it stopped; running this again reuses what is done.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_avatar.config import Config, load_config

console = Console()
SYSTEMS = ("base", "sft", "grpo", "avatar")
PACKAGES = ("torch", "megatron-core", "transformers", "nvidia-dali-cuda130", "h5py", "hydra-core", "numpy", "av")


@dataclass
class Job:
    """One command of a phase; `lines` names the file whose lines count its progress."""

    name: str
    command: list[str]
    lines: Path
    total: int
    log: Path
    config: Config | None = None
    process: subprocess.Popen | None = field(default=None, repr=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *self.command], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
                # Threads that wait asleep: spinning ones would take the other job's core.
                env={**os.environ, "COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def done_lines(self) -> int:
        return sum(1 for _ in self.lines.open("rb")) if self.lines.exists() else 0


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process and its descendants, summed, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0

    def run(self) -> None:
        own = psutil.Process()
        while True:
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
            time.sleep(0.5)


def run_phase(jobs: list[Job], title: str) -> dict[str, float]:
    """Run the jobs side by side, a progress bar each; the seconds each took. SystemExit names what failed."""
    began, seconds = time.monotonic(), {}
    columns = (TextColumn("[bold]{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    for job in jobs:
        job.start()
    try:
        with Progress(*columns, console=console) as progress:
            bars = {j.name: progress.add_task(f"{title} {j.name}", total=j.total) for j in jobs}
            while len(seconds) < len(jobs):
                for job in jobs:
                    assert job.process is not None
                    progress.update(bars[job.name], completed=min(job.done_lines(), job.total))
                    code = job.process.poll()
                    if code is None or job.name in seconds:
                        continue
                    if code:
                        tail = "\n".join(job.log.read_text(errors="replace").splitlines()[-15:])
                        raise SystemExit(f"\n{job.name} failed with status {code}; the end of {job.log}:\n{tail}")
                    progress.update(bars[job.name], completed=job.total)
                    seconds[job.name] = time.monotonic() - began
                time.sleep(0.2)
    except KeyboardInterrupt:
        console.print("\nstopping: saving state ...")
        for job in jobs:  # the terminal has sent them the same signal
            assert job.process is not None
            job.process.wait()
        raise
    finally:
        for job in jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
    return seconds


class Ledger:
    """Which phases are done and how long each took, over all attempts of one demo: `settings` tell it from another.

    Raises ValueError where the file belongs to a demo of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, int | bool]) -> None:
        self.path = path
        self.state = {"settings": settings, "done": [], "wall_s": {}, "peak_rss_mib": 0.0}
        if path.exists():
            self.state |= json.loads(path.read_text())
        if self.state["settings"] != settings:
            raise ValueError(
                f"{path.parent} holds a demo of {self.state['settings']}, not of {settings}: choose another --out, or "
                "remove that folder to start anew"
            )

    def add(self, seconds: dict[str, float], peak_mib: float, done: str | None = None) -> None:
        for name, value in seconds.items():
            self.state["wall_s"][name] = round(self.state["wall_s"].get(name, 0.0) + value, 1)
        self.state["peak_rss_mib"] = round(max(self.state["peak_rss_mib"], peak_mib), 1)
        if done:
            self.state["done"].append(done)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.state, indent=2) + "\n")
        aside.replace(self.path)


def training(out: Path, name: str, recipe: str, seed: int, *, smoke: bool = False) -> Job:
    """The job that trains OUT/NAME; GRPO and AVATAR start from OUT's cold start."""
    arguments = [f"recipe={recipe}", f"output_dir={out / name}", f"data.manifest={out / 'data' / 'manifest.jsonl'}",
                 f"seed={seed}", f"name=demo_{name}"]
    if recipe != "tiny_sft":
        arguments.append(f"model.path={out / 'sft' / 'export' / 'sft'}")
    config = load_config(arguments)
    if smoke:
        arguments += [f"stages.{stage}.steps=2" for stage in config.stages]
        config = load_config(arguments)
    steps = sum(stage.steps for stage in config.stages.values())
    command = ["-m", "megatron_avatar.train", *arguments]
    return Job(name, command, out / name / "metrics.jsonl", steps, out / name / "train.log", config)


def evaluation(out: Path, name: str, model: Path) -> Job:
    """The job that answers OUT's held-out samples with the Hugging Face folder `model`."""
    manifest, file = out / "data" / "manifest.jsonl", predictions_file(out, name)
    command = ["-m", "eval.run", f"model={model}", "benchmark=held_out", f"data={manifest}", "recipe=tiny_avatar",
               f"out={file.parent}", f"system={name}", "family=tiny"]
    return Job(name, command, file, count_samples(manifest, "eval"), out / "eval" / f"{name}.log")


def predictions_file(out: Path, name: str) -> Path:
    return out / "eval" / name / "held_out.ours.jsonl"


def phases(out: Path, seed: int, smoke: bool) -> list[tuple[str, Callable[[], list[Job]]]]:
    """The demo's phases in order; the jobs of one phase run side by side. `smoke`: a few steps on a few clips."""
    size = "tiny" if smoke else "demo"
    data = Job("data", ["-m", "data_tools.synthesize", "--out", str(out / "data"), "--seed", str(seed), "--size", size],
               out / "data" / "manifest.jsonl", 1, out / "data.log")

    def exported(name: str) -> Path:
        if name == "base":
            return Path(load_config(["recipe=tiny_sft", "data.manifest=-"]).model.path)
        return out / name / "export" / ("sft" if name == "sft" else "localisation")

    return [
        ("data", lambda: [data]),
        ("sft", lambda: [training(out, "sft", "tiny_sft", seed, smoke=smoke)]),
        ("train", lambda: [training(out, n, f"tiny_{n}", seed, smoke=smoke) for n in ("grpo", "avatar")]),
        ("eval", lambda: [evaluation(out, n, exported(n)) for n in ("base", "sft")]),
        ("eval", lambda: [evaluation(out, n, exported(n)) for n in ("grpo", "avatar")]),
    ]


def count_samples(manifest: Path, split: str) -> int:
    with manifest.open() as lines:
        return sum(json.loads(line)["split"] == split for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps a stage on a few clips: does everything run?")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        ledger = Ledger(out / "phases.json", {"seed": arguments.seed, "smoke": arguments.smoke})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    began = time.monotonic()
    memory = PeakMemory()
    memory.start()
    for index, (title, jobs) in enumerate(phases(out, arguments.seed, arguments.smoke)):
        mark = f"{index}-{title}"
        if mark in ledger.state["done"]:
            console.print(f"{title}: done before, reused")
            continue
        start = time.monotonic()
        try:
            seconds = run_phase(jobs(), title)
        except KeyboardInterrupt:
            ledger.add({title: time.monotonic() - start} if title != "train" else
                       {n: time.monotonic() - start for n in ("grpo", "avatar")}, memory.peak_mib)
            console.print("stopped; run the same command to continue.")
            raise SystemExit(130) from None
        if title == "eval":
            seconds = {"eval": max(seconds.values())}
        ledger.add(seconds, memory.peak_mib, done=mark)
    write_results(out, arguments.seed, ledger)
    console.print(f"\nreport: [bold]{out / 'report.html'}[/]   ({(time.monotonic() - began) / 60:.1f} minutes)")


def write_results(out: Path, seed: int, ledger: Ledger) -> None:
    """results.json and the report, from what the phases measured."""
    from eval.report import print_table, render
    from eval.score import system_scores
    from eval.scoring.predictions import read_predictions

    done = {name: json.loads((out / name / "done.json").read_text()) for name in ("grpo", "avatar")}
    assert done["grpo"]["steps"] == done["avatar"]["steps"], "the comparison is at equal updates"
    results = {
        "systems": {name: system_scores(read_predictions(predictions_file(out, name))) for name in SYSTEMS},
        "steps": done["avatar"]["steps"],
        "completions_generated": {name: d["completions_generated"] for name, d in done.items()},
        "wall_s": ledger.state["wall_s"],
        "peak_rss_mib": ledger.state["peak_rss_mib"],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    render(out)
    print_table(results, console)


if __name__ == "__main__":
    main()
