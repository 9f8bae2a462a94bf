"""Commands of this machine side by side, as many as it has room for: what the demo runs its parts with."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval import forked

POLL_S = 0.2
LOOK_S = 1.0  # between two looks at how far a job is: files are counted for that


@dataclass
class Command:
    """What one job runs, known once what it needs is there: a module with its arguments, and how it is watched.

    done: how much is done by now; value: a few words on it, as its loss.
    """

    module: str
    arguments: list[str]
    log: Path
    total: int
    done: Callable[[], int]
    value: Callable[[], str] = lambda: ""


@dataclass
class Job:
    """One part: it begins when `needs` have ended and `processes` of the slots are free. `start_by`: "spawn" reads its
    own libraries, and waits for no others."""

    name: str
    prepare: Callable[[int], Command]  # of the number of processes that it gets
    needs: tuple[str, ...] = ()
    processes: int = 1
    grows: bool = False  # may take all slots where nothing else waits for one
    start_by: Literal["forkserver", "spawn"] = "forkserver"
    command: Command | None = None
    began: float = 0.0
    running: list[BaseProcess] = field(default_factory=list, repr=False)

    def start(self, processes: int) -> None:
        self.command = self.prepare(processes)
        self.began = time.monotonic()
        self.command.log.parent.mkdir(parents=True, exist_ok=True)
        self.command.log.touch()
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        for rank in range(processes):
            place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.running.append(forked.start(self.command.module, self.command.arguments, self.command.log,
                                             forked.ENVIRONMENT | place, self.start_by))  # fmt: skip

    def status(self) -> int | None:
        """None while it runs; the first status that isn't 0, whatever the other processes do; else 0."""
        codes = [process.exitcode for process in self.running]
        return next((code for code in codes if code), None if None in codes else 0)

    def end(self) -> None:
        for process in self.running:
            if process.exitcode is None:
                process.terminate()
        for process in self.running:
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class PeakMemory(threading.Thread):
    """Samples the memory of this process and its descendants every two seconds; what several share counts once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0

    def run(self) -> None:
        own = psutil.Process()
        while True:
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
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
                    if not console.is_terminal:  # where bars are drawn at the end alone
                        console.print(f"{job.name}: begins", highlight=False)
                    running.append(job)
                    job.start(processes)
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
                    if not console.is_terminal:
                        told = f"{job.name} {command.value()}".strip()
                        console.print(f"{told}: done, {time.monotonic() - job.began:.0f} s", highlight=False)
                tick()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print("\nstopping: saving state, up to a minute; Ctrl-C again stops at once, without saving ...")
        for job in running:  # the terminal has sent them the same signal
            for process in job.running:
                process.join()
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
