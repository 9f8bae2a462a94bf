"""Commands of this machine side by side, as many as it has room for: what the demo runs its parts with."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

POLL_S = 0.2
LOOK_S = 1.0  # between two looks at how far a job is: files are counted for that


@dataclass
class Command:
    """What one job runs, known once what it needs is there: arguments behind the interpreter, and how it is watched.

    done: how much is done by now; value: a few words on it, as its loss.
    """

    arguments: list[str]
    log: Path
    total: int
    done: Callable[[], int]
    value: Callable[[], str] = lambda: ""


@dataclass
class Job:
    """One part: it begins when `needs` have ended and `processes` of the slots are free."""

    name: str
    prepare: Callable[[int], Command]  # of the number of processes that it gets
    needs: tuple[str, ...] = ()
    processes: int = 1
    grows: bool = False  # may take all slots where nothing else waits for one
    command: Command | None = None
    began: float = 0.0
    running: list[subprocess.Popen] = field(default_factory=list, repr=False)

    def start(self, processes: int) -> None:
        self.command = self.prepare(processes)
        self.began = time.monotonic()
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        for rank in range(processes):
            place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            with self.command.log.open("a") as out:
                self.running.append(_start(self.command.arguments, place, out))

    def status(self) -> int | None:
        """None while it runs; the first status that isn't 0, whatever the other processes do; else 0."""
        codes = [process.poll() for process in self.running]
        return next((code for code in codes if code), None if None in codes else 0)

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            process.wait()


def _start(arguments: Sequence[str], place: dict[str, str], out: Any) -> subprocess.Popen:
    parent = os.getpid()

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        [sys.executable, "-u", *arguments], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
        # Threads that wait asleep: spinning ones would take the other job's core.
        env={**os.environ, "COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE", **place},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process and its descendants, summed, every two seconds."""

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
            time.sleep(2)


def lines_of(path: Path) -> int:
    return sum(1 for _ in path.open("rb")) if path.exists() else 0


def last_value(path: Path, *names: str) -> str:
    """`name 0.123` of the first of `names` that the last line of a metrics file has."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            record = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return ""
    return next((f"{name} {record[name]:.3f}" for name in names if isinstance(record.get(name), int | float)), "")


def run_all(
    jobs: Sequence[Job], done: Collection[str], slots: int, console: Console, *,
    ended: Callable[[Job, float, bool], None], tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the jobs that aren't `done`, in their order as far as needs and slots allow, with a bar each.

    `ended` is told of each (job, its seconds, whether it is done); `tick` is called all the while. SystemExit names
    what failed; after Ctrl-C the jobs have saved their state before KeyboardInterrupt goes on.
    """
    have, running = set(done), []
    waiting = [job for job in jobs if job.name not in have]
    columns = (TextColumn("[bold]{task.description:<14}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[value]:<14}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    bars: dict[str, Any] = {}
    looked = 0.0
    try:
        with Progress(*columns, console=console) as progress:
            while waiting or running:
                for job, processes in startable(waiting, have, slots - sum(len(j.running) for j in running)):
                    waiting.remove(job)
                    job.start(processes)
                    running.append(job)
                    assert job.command is not None
                    bars[job.name] = progress.add_task(job.name, total=job.command.total, value="")
                look = time.monotonic() > looked + LOOK_S
                looked = time.monotonic() if look else looked
                for job in list(running):
                    assert job.command is not None
                    code, command = job.status(), job.command
                    if look or code is not None:
                        count = command.total if code == 0 else min(command.done(), command.total)
                        progress.update(bars[job.name], completed=count, value=command.value())
                    if code is None:
                        continue
                    if code:
                        tail = "\n".join(command.log.read_text(errors="replace").splitlines()[-15:])
                        raise SystemExit(f"\n{job.name} failed with status {code}; the end of {command.log}:\n{tail}")
                    running.remove(job)
                    have.add(job.name)
                    ended(job, time.monotonic() - job.began, True)
                    if not console.is_terminal:  # where bars are drawn at the end alone
                        told = f"{job.name} {command.value()}".strip()
                        console.print(f"{told}: done, {time.monotonic() - job.began:.0f} s", highlight=False)
                tick()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print("\nstopping: saving state, up to a minute; Ctrl-C again stops at once, without saving ...")
        for job in running:  # the terminal has sent them the same signal
            for process in job.running:
                process.wait()
            ended(job, time.monotonic() - job.began, False)
        raise
    finally:
        for job in running:
            job.end()


def startable(waiting: Sequence[Job], have: Collection[str], free: int) -> list[tuple[Job, int]]:
    """Which of the waiting jobs begin now, and with how many processes: one that grows takes what nobody else wants."""
    ready = [job for job in waiting if set(job.needs) <= set(have)]
    chosen: list[tuple[Job, int]] = []
    for job in ready:
        if job.processes <= free:
            chosen.append((job, job.processes))
            free -= job.processes
    if free and len(chosen) == len(ready):
        for k, (job, processes) in enumerate(chosen):
            if job.grows:
                chosen[k], free = (job, processes + free), 0
    return chosen
