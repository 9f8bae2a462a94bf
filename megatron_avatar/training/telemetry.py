"""What a run says while it runs: metrics.jsonl, wandb, a progress bar.

`log` writes the record that the loop passes, with non-finite numbers as null, and adds to it `time` (Unix seconds),
`time/PHASE` (seconds spent in each phase since the last record), `peak_rss_mib` (this process and its children) and, on
GPUs whose peak is published, `mfu` and `hfu`: the record's `flops` and `flops/done` a second of updating, of that peak.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_avatar.config.schema import Config
from megatron_avatar.config.validate import WANDB_MODES
from megatron_avatar.planning.seconds import peaks_of
from megatron_avatar.policy.backend import Backend

PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal
UPLOAD_S = 60.0  # wandb's time for what is left to upload, while the job's GPUs wait


class Timer:
    """Seconds spent by phase: `with timer("generate"): …`. A phase inside another counts for both.

    `active` are the phases that go on, the innermost last; `changed` is when one last began or ended.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.active: list[str] = []
        self.changed = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self.active.append(phase)
        self.changed = time.monotonic()
        try:
            yield
            self.active.pop()  # after an exception it stays, for the last words
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # kernels of this phase must not be billed to the next
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            self.changed = time.monotonic()

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Telemetry:
    """Metrics and progress of one run, written by rank 0 alone; the other ranks may call everything.

    Raises ValueError where config.log.wandb is not a known mode.
    """

    def __init__(self, run_dir: Path, config: Config, backend: Backend) -> None:
        if config.log.wandb not in WANDB_MODES:
            raise ValueError(f"log.wandb={config.log.wandb!r}: choose one of {', '.join(WANDB_MODES)}")
        self.timer = Timer()
        self._folder, self._config = Path(run_dir), config
        self._writes, self._world = backend.rank == 0, backend.world
        self._peaks = peaks_of(torch.cuda.get_device_name()) if backend.device.type == "cuda" else None
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._peak_bytes = 0

    @property
    def path(self) -> Path:
        return self._folder / "metrics.jsonl"

    def rewind(self, step: int) -> None:
        """Drop every record after global step `step`, and a line that a crash cut off: resumed runs repeat no step."""
        if not self._writes:
            return
        self._close_file()
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept))
        aside.replace(self.path)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record, with `step` among its keys; it is on the disk before this returns."""
        seconds = self.timer.take()
        if not self._writes:
            return
        own: dict[str, Any] = {f"time/{phase}": round(value, 4) for phase, value in seconds.items()}
        own |= self._utilisation(record, seconds.get("update", 0.0))
        record = plain({**record, "time": round(time.time(), 3), **own, "peak_rss_mib": self._peak_rss_mib()})
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a")
            self._wandb = _unharmed(lambda: _start_wandb(self._folder, self._config))
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint must never be ahead of its metrics
        if self._wandb is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self._wandb = _unharmed(lambda: (self._wandb.log(numbers), self._wandb)[1])

    def _utilisation(self, record: dict[str, Any], seconds: float) -> dict[str, float]:
        if self._peaks is None or not seconds or "flops" not in record:
            return {}
        most = self._peaks.flops * self._world * seconds
        return {"mfu": round(record["flops"] / most, 4), "hfu": round(record["flops/done"] / most, 4)}

    @contextmanager
    def progress(self, stage: str, done: int, total: int) -> Iterator[Bar]:
        """A progress bar over a stage's steps on the terminal, lines now and then elsewhere."""
        console = Console(stderr=True, quiet=not self._writes)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[value]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, disable=not (self._writes and console.is_terminal)) as progress:
            yield Bar(progress, stage, done, total, lines=self._writes and not console.is_terminal)

    def close(self) -> None:
        self._close_file()
        if self._wandb is not None:
            _unharmed(self._wandb.finish)
            self._wandb = None

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _peak_rss_mib(self) -> float:
        """Most memory seen so far: this process's own peak and its children as they are now."""
        children = 0
        for child in psutil.Process().children(recursive=True):
            try:
                children += child.memory_info().rss
            except psutil.Error:
                continue
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._peak_bytes = max(self._peak_bytes, own + children)
        return round(self._peak_bytes / 2**20, 1)


class Bar:
    """Progress of one stage; `update` after every step."""

    def __init__(self, progress: Progress, stage: str, done: int, total: int, *, lines: bool) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = self._first = done
        self._task = progress.add_task(stage, completed=done, total=total, value="")
        self._lines = lines
        self._start = self._printed = time.monotonic()

    def update(self, record: dict[str, Any]) -> None:
        """Advance by one step and show its `reward`, or `loss` where there is none; in lines also its replay."""
        self._done += 1
        name = "reward" if "reward" in record else "loss"
        value = f"{name} {record[name]:.3f}" if record.get(name) is not None else ""
        self._progress.update(self._task, completed=self._done, value=value)
        now = time.monotonic()
        if self._lines and (now - self._printed > PLAIN_INTERVAL_S or self._done == self._total):
            pace = (now - self._start) / (self._done - self._first)
            left = timedelta(seconds=int(pace * (self._total - self._done)))
            line = f"{self._stage} {self._done}/{self._total} {value} {pace:.2f} s/step, {left} left"
            _say(line + replay_told(record))
            self._printed = now


def replay_told(record: dict[str, Any]) -> str:
    """What a step replayed, in words; empty where it replayed nothing."""
    if not record.get("replay/completions") or record.get("replay/dead") is None:
        return ""
    return (f"; replayed {record['replay/completions']}: {record['replay/dead']:.0%} without an advantage, up to "
            f"{record['replay/age_max']} steps old, ratio at most {record['replay/ratio_max']:.1f}")


def _start_wandb(folder: Path, config: Config) -> Any:
    """A wandb run that continues under the id kept in the run's folder, or None."""
    if config.log.wandb == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        _say("wandb is not installed: metrics go to metrics.jsonl alone (log.wandb=disabled silences this)")
        return None
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # else it advertises itself beside the judge
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    online = config.log.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY"))
    arguments: dict[str, Any] = {
        "project": config.log.wandb_project,
        "name": f"{config.name}-{folder.name}",
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "dir": str(folder),
        "config": dataclasses.asdict(config),
        "settings": wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True,
                                   finish_timeout=UPLOAD_S),
    }  # fmt: skip
    run = None
    if online:
        try:
            run = wandb.init(**arguments, mode="online")
        except Exception as error:
            _say(f"wandb is out of reach ({type(error).__name__}): its files stay in {folder / 'wandb'} for "
                 "`wandb sync`")  # fmt: skip
            _unharmed(wandb.teardown)  # else the id counts as in use
    run = run or wandb.init(**arguments, mode="offline")
    run.define_metric("*", step_metric="step")
    return run


def _unharmed(action: Callable[[], Any]) -> Any:
    """What `action` returns; None where it fails, which is said: nothing that wandb does ends a run."""
    try:
        return action()
    except (Exception, SystemExit) as error:  # its teardown calls sys.exit
        _say(f"wandb failed ({type(error).__name__}) and is left alone: metrics go to metrics.jsonl")
        return None


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where it is not a whole record."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def plain(value: Any) -> Any:
    """JSON's own types: tensors and arrays as lists, numbers that JSON lacks as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
