"""The whole of AVATAR in small: data, SFT, GRPO and AVATAR side by side, evaluation, report.

    python -m eval.demo --out runs/demo --seed 0

Every part is a command of its own that continues where it stopped; running this again reuses what is done. The report
is there from the first minute on, and grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from eval.forked import read_ahead
from eval.jobs import Command, Job, PeakMemory, last_value, lines_of, run_all

console = Console()
SYSTEMS = ("base", "sft", "grpo", "avatar")
PACKAGES = ("torch", "megatron-core", "transformers", "nvidia-dali-cuda130", "h5py", "hydra-core", "numpy", "av")
PROCESSES = 2  # side by side, one core each
RENDER_S = 60.0  # between two states of the growing report; at first less, and at most a thirtieth of a core
ROOT = Path(__file__).parents[1]
# Of each base its folder, made first where it isn't there, and the recipes' settings that are its family's.
BASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "omni": ("assets/tiny_base", ()),
    "omni3": ("assets/tiny_omni3", ("model.shape=tiny_omni3", "data.frame_max_pixels=9216",
                                    "data.frame_min_pixels=9216")),  # 96 x 96: nine visual tokens a frame pair
}  # fmt: skip
# Both cores are taken: decode workers would cost a start of Python each and gain nothing.
HERE_ALONE = ("data.workers=0",)
BATCH = 44  # of an evaluation's samples: a token of so many takes little longer than one of the usual sixteen


class Ledger:
    """Which parts are done and how long each took, over all attempts of one demo: `settings` tell it from another.

    Raises ValueError where the file belongs to a demo of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, int | bool | str]) -> None:
        self.path = path
        self.state = {"settings": settings, "done": [], "wall_s": {}, "processor_s": 0.0, "peak_rss_mib": 0.0}
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


def synthesis(out: Path, seed: int, smoke: bool) -> Command:
    """The job that makes OUT's clips; it counts them."""
    from data_tools.families import FAMILIES
    from data_tools.synthesize import SIZES

    size = "tiny" if smoke else "demo"
    arguments = ["--out", str(out / "data"), "--seed", str(seed), "--size", size, "--processes", str(PROCESSES)]
    clips = out / "data" / "clips"
    return Command("data_tools.synthesize", arguments, out / "data.log", len(FAMILIES) * sum(SIZES[size].values()),
                   lambda: sum(1 for _ in clips.glob("*.webm")))  # fmt: skip


def base_folder(out: Path, base: str) -> str:
    """Where a base of BASES is: in the checkout, or, where that has none, in OUT."""
    made, shipped = out / "base", BASES[base][0]
    return shipped if (ROOT / shipped).exists() and not made.exists() else str(made)


def pretraining(out: Path, base: str, smoke: bool) -> Command:
    """The job that makes a base that the checkout doesn't have."""
    folder = out / "base"
    arguments = ["--family", base, "--out", str(folder), "--threads", str(PROCESSES)]
    arguments += ["--steps", "2", "--clips", "32"] if smoke else []
    return Command("data_tools.pretrain", arguments, out / "base.log", 1, lambda: int(folder.exists()))


def training(
    out: Path, name: str, recipe: str, seed: int, *, base: str = "omni", smoke: bool = False, processes: int = 1
) -> Command:
    """The job that trains OUT/NAME; the cold start from a base of BASES, GRPO and AVATAR from OUT's cold start."""
    from megatron_avatar.config import load_config

    arguments = [f"recipe={recipe}", f"output_dir={out / name}", f"data.manifest={out / 'data' / 'manifest.jsonl'}",
                 f"seed={seed}", f"name=demo_{name}", *HERE_ALONE, *BASES[base][1]]  # fmt: skip
    start = base_folder(out, base) if recipe == "tiny_sft" else out / "sft" / "export" / "sft"
    arguments.append(f"model.path={start}")
    if processes > 1:
        arguments.append("parallel.threads=1")
    config = load_config(arguments)
    if smoke:
        arguments += [f"stages.{stage}.steps=2" for stage in config.stages]
        config = load_config(arguments)
    steps, metrics = sum(stage.steps for stage in config.stages.values()), out / name / "metrics.jsonl"
    return Command("megatron_avatar.train", arguments, out / name / "train.log", steps,
                   lambda: lines_of(metrics), lambda: last_value(metrics, "reward", "loss"))  # fmt: skip


def evaluation(out: Path, name: str, base: str) -> Command:
    """The job that answers OUT's held-out samples with the folder of a system that began with a base of BASES."""
    manifest, file = out / "data" / "manifest.jsonl", predictions_file(out, name)
    arguments = [f"model={exported(out, name, base)}", "benchmark=held_out", f"data={manifest}", "recipe=tiny_avatar",
                 f"out={file.parent}", f"system={name}", "family=tiny", f"batch={BATCH}", *HERE_ALONE,
                 *BASES[base][1]]  # fmt: skip
    return Command("eval.run", arguments, out / "eval" / f"{name}.log", count_samples(manifest, "eval"),
                   lambda: lines_of(file), lambda: right_so_far(file))  # fmt: skip


def right_so_far(file: Path) -> str:
    """The share of right answers among those that are there."""
    try:
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        scores = [next(iter(line["scores"].values())) or 0 for line in lines]
    except (OSError, ValueError, KeyError, StopIteration):
        return ""
    return f"right {100 * sum(scores) / len(scores):.0f} %" if scores else ""


def predictions_file(out: Path, name: str) -> Path:
    return out / "eval" / name / "held_out.ours.jsonl"


def exported(out: Path, name: str, base: str) -> str:
    """The folder of one of SYSTEMS."""
    if name == "base":
        return base_folder(out, base)
    return str(out / name / "export" / ("sft" if name == "sft" else "localisation"))


def parts(out: Path, seed: int, smoke: bool, base: str = "omni") -> list[Job]:
    """The demo's parts in their order of precedence. `smoke`: a few steps on a few clips.

    The two that train longest begin side by side; whoever ends first leaves its core to evaluations.
    """

    def trains(name: str, recipe: str) -> Any:
        return lambda n: training(out, name, recipe, seed, base=base, smoke=smoke, processes=n)

    def answers(name: str) -> Any:
        return lambda n: evaluation(out, name, base)

    first = [Job("data", lambda n: synthesis(out, seed, smoke), processes=1, start_by="spawn")]
    if base_folder(out, base) != BASES[base][0]:
        first.append(Job("base", lambda n: pretraining(out, base, smoke), needs=("data",)))
    return [
        *first,
        Job("sft", trains("sft", "tiny_sft"), needs=tuple(job.name for job in first), processes=PROCESSES),
        Job("avatar", trains("avatar", "tiny_avatar"), needs=("sft",)),
        Job("grpo", trains("grpo", "tiny_grpo"), needs=("sft",)),
        Job("eval base", answers("base"), needs=("sft",)),
        Job("eval sft", answers("sft"), needs=("sft",)),
        Job("eval grpo", answers("grpo"), needs=("grpo",), grows=True),
        Job("eval avatar", answers("avatar"), needs=("avatar",), grows=True),
    ]


def count_samples(manifest: Path, split: str) -> int:
    with manifest.open() as lines:
        return sum(json.loads(line)["split"] == split for line in lines)


class Growing:
    """The report while its run goes on: written anew now and then, so that it can be opened at any time."""

    def __init__(self, out: Path, seed: int) -> None:
        self._out, self._seed, self._next, self._written = out, seed, 0.0, 0

    def __call__(self) -> None:
        if time.monotonic() < self._next or not any((self._out / n / "metrics.jsonl").exists() for n in SYSTEMS):
            return
        from eval.report import render  # matplotlib, once there is something to draw

        began = time.process_time()
        try:
            render(self._out, growing=True, seed=self._seed)
            self._written += 1
        except (ValueError, OSError):  # a line that is being written
            return
        finally:
            now = time.monotonic()
            self._next = now + max(min(RENDER_S, 15.0 * self._written), 29 * (time.process_time() - began), 1.0)
        if self._written == 1:
            console.print(f"open [bold]{escape(str(self._out))}/report.html[/] in a browser: it grows until the end")

    def stop(self) -> None:
        """The page no longer says that the run goes on."""
        if self._written:
            from eval.report import render

            render(self._out, growing=True, stopped=True, seed=self._seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="by default runs/demo, of another model runs/demo_MODEL")
    parser.add_argument("--model", choices=BASES, default="omni", help="omni3: a tiny Qwen3-Omni")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps a stage on a few clips: does everything run?")
    arguments = parser.parse_args()
    base: str = arguments.model
    own = {"model": base} if base != "omni" else {}
    out: Path = arguments.out or Path("_".join(["runs/demo", *own.values()]))
    folder = escape(str(out))
    out.mkdir(parents=True, exist_ok=True)
    try:
        ledger = Ledger(out / "phases.json", {"seed": arguments.seed, "smoke": arguments.smoke, **own})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    began = time.monotonic()
    memory = PeakMemory()
    memory.start()
    jobs = parts(out, arguments.seed, arguments.smoke, base)
    known = {job.name for job in jobs}
    if reused := [name for name in ledger.state["done"] if name in known]:
        console.print(f"done before, reused: {', '.join(reused)}")
    else:
        console.print(f"everything goes to [bold]{folder}[/]; Ctrl-C saves and stops, the same command goes on")
    growing = Growing(out, arguments.seed)
    if known - set(reused):
        read_ahead()
    try:
        run_all(jobs, reused, PROCESSES, console, tick=growing, ended=lambda job, seconds, done: ledger.add(
            {job.name: seconds}, memory.peak_mib, done=job.name if done else None))  # fmt: skip
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError, OSError):
            growing.stop()
        console.print("stopped; run the same command to continue.")
        raise SystemExit(130) from None
    finally:
        if known - set(reused):  # else nothing ran
            ledger.state["processor_s"] = round(ledger.state["processor_s"] + processor_seconds(), 1)
            ledger.add({"in all": time.monotonic() - began}, memory.peak_mib)
    write_results(out, arguments.seed, ledger)
    console.print(f"\nreport: [bold]{folder}/report.html[/]   ({(time.monotonic() - began) / 60:.1f} minutes)")
    console.print(f"models: {escape(', '.join(exported(out, name, base) for name in SYSTEMS[1:]))}", soft_wrap=True)


def processor_seconds() -> float:
    """What this process and all that it started have computed, what they have waited for included."""
    used = 0.0
    for process in (own := psutil.Process(), *own.children()):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def write_results(out: Path, seed: int, ledger: Ledger) -> None:
    """results.json and the report, from what the phases measured."""
    from eval.report import print_table, render
    from eval.score import system_scores
    from eval.scoring.predictions import read_predictions
    from eval.scoring.stats import paired_difference

    done = {name: json.loads((out / name / "done.json").read_text()) for name in ("grpo", "avatar")}
    assert done["grpo"]["steps"] == done["avatar"]["steps"], "the comparison is at equal updates"
    predictions = {name: read_predictions(predictions_file(out, name)) for name in SYSTEMS}
    difference = paired_difference(predictions["avatar"], predictions["grpo"])
    results = {
        "systems": {name: system_scores(found) for name, found in predictions.items()},
        "steps": done["avatar"]["steps"],
        "completions_generated": {name: d["completions_generated"] for name, d in done.items()},
        "avatar_minus_grpo": {key: float(getattr(difference, key)) for key in ("value", "low", "high", "p", "n")},
        "wall_s": ledger.state["wall_s"],
        "processor_s": ledger.state["processor_s"],
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
