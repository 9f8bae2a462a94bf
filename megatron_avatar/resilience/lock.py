"""RUN/.lock: which job or process works on a run, so that no two write its checkpoints.

Every owner has a file of its own, numbered on, made by O_EXCL; the highest number counts. Nothing has to be cleaned up
after a crash: an owner that is gone, by squeue, or without Slurm by its host and process, is followed by the next.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megatron_avatar.resilience import queue

if TYPE_CHECKING:  # the launcher reads this without torch
    from megatron_avatar.policy.backend import Backend

FOLDER = ".lock"
LEAVING_S = 60.0  # for an owner that is on its way out
LOOK_S = 1.0
TORN_S = 5.0  # from a file's beginning to its contents


@dataclass(frozen=True)
class Owner:
    """A Slurm job (with `pid` 0: any of its processes), or a process."""

    job: str = ""
    restart: str = ""
    host: str = ""
    pid: int = 0
    started: float = 0.0  # of the process, in seconds: a number is given again


def job_owner() -> Owner:
    """The job of this process: a requeued one is the same."""
    return Owner(queue.own_job(), os.environ.get("SLURM_RESTART_COUNT", "0"), socket.gethostname())


def process_owner() -> Owner:
    """This process alone, in a job or not."""
    return Owner(queue.own_job(), os.environ.get("SLURM_RESTART_COUNT", "0") if queue.own_job() else "",
                 socket.gethostname(), os.getpid(), round(psutil.Process().create_time(), 2))  # fmt: skip


def take(run: Path, owner: Owner, predecessor: str = "") -> None:
    """Make `owner` the one who works on `run`; it may be already. The job `predecessor` is followed without a question.

    Raises ValueError where another works on it, or is in the queue to continue it, and SlurmSilent where nobody says.
    """
    folder = run / FOLDER
    end = time.monotonic() + LEAVING_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # one that was refused may have removed it
        number, other = _newest(folder)
        why = "" if other is None or _same(other, owner) or other.job == predecessor != "" else _alive(other)
        if not why:
            try:
                _write(folder / f"{number + 1:08d}", owner)
            except (FileExistsError, FileNotFoundError):
                time.sleep(LOOK_S / 10)  # somebody else was faster
                continue
            _forget(folder, number)
            return
        if "leaving" not in why or time.monotonic() > end:
            raise ValueError(f"{run}: {why}, or choose another output_dir")
        time.sleep(LOOK_S)


def worker(run: Path) -> str:
    """Who works on `run`, or is in the queue to continue it, and what to do; empty where nobody does."""
    folder = run / FOLDER
    other = _newest(folder)[1] if folder.is_dir() else None
    return "" if other is None else _alive(other)


def take_on_all(run: Path, backend: Backend) -> Owner | None:
    """Rank 0's process as the one that works on the run, unless the job's launcher holds it for all; ValueError on all
    ranks where another does."""
    owner = process_owner() if backend.rank == 0 and "AVATAR_ATTEMPT" not in os.environ else None
    reason = ""
    try:
        if owner is not None:
            take(run, owner)
    except (ValueError, OSError) as error:
        reason = str(error)
    if reason := backend.broadcast_object(reason):
        raise ValueError(reason)
    return owner


def release(run: Path, owner: Owner) -> None:
    """Say that `owner` no longer works on `run`; nothing happens where it didn't, or the disk refuses."""
    hand_over(run, owner, None)


@contextmanager
def withdrawn_if_refused(run: Path, owner: Owner | None) -> Iterator[None]:
    """Where what is done here raises, the run has never begun: `owner` gives it back, and folders that hold nothing
    else go."""
    try:
        yield
    except Exception:
        if owner is not None:
            _withdraw(run, owner)
        raise


def hand_over(run: Path, owner: Owner, to: Owner | None) -> None:
    """Make `to` the owner in `owner`'s place, unless that has another already."""
    folder = run / FOLDER
    try:
        number, other = _newest(folder)
        if other is not None and _same(other, owner):
            _write(folder / f"{number + 1:08d}", to)
            _forget(folder, number)
    except OSError:
        return  # it is judged by whether its job or process is alive


def _withdraw(run: Path, owner: Owner) -> None:
    folder = run / FOLDER
    try:
        number, other = _newest(folder)
        if other is not None and _same(other, owner):
            _forget(folder, number)
            folder.rmdir()
            run.rmdir()
    except OSError:
        return  # there is more, or the disk refuses


def _same(other: Owner, owner: Owner) -> bool:
    """Whether `other` is this owner, perhaps in an earlier attempt: a job is never in two places."""
    if other.pid or owner.pid:
        return other == owner or (other.job == owner.job != "" and other.restart != owner.restart)
    return other.job == owner.job


def _alive(other: Owner) -> str:
    """Who works on the run and what to do, empty where `other` is gone. `leaving` in it: soon."""
    if other.pid and other.host == socket.gethostname():
        try:
            running = abs(psutil.Process(other.pid).create_time() - other.started) < 1.0
        except psutil.Error:
            running = False
        return f"process {other.pid} works on this run: wait for its end" if running else ""
    if not other.job:
        return (f"process {other.pid} on {other.host} works on this run, or has ended without a word: once it has, "
                f"remove the folder {FOLDER} in it")  # fmt: skip
    try:
        state = queue.state(other.job)
    except queue.SlurmSilent as error:
        raise queue.SlurmSilent(
            f"{error}. Job {other.job} was the last to work on this run, and nobody says whether it still does: try "
            f"again once Slurm answers, or, where you know that it is over, remove the folder {FOLDER} in the run's"
        ) from None
    who = f"job {other.job}" + (f" (process {other.pid} on {other.host})" if other.pid else "")
    if state == "COMPLETING":
        return f"{who} works on this run and is leaving: wait for its end"
    if state in queue.WAITING:
        return f"{who} is in the queue to continue this run: wait for it, or scancel it"
    return f"{who} works on this run: wait for its end" if state in queue.ALIVE else ""


def _newest(folder: Path) -> tuple[int, Owner | None]:
    """The highest number, 0 where there is none, and its owner: None where it was given back, or never had one."""
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    if not numbers:
        return 0, None
    path, end = folder / f"{max(numbers):08d}", time.monotonic() + TORN_S
    while True:
        try:
            found = json.loads(path.read_text())
            return max(numbers), Owner(**found) if found else None
        except FileNotFoundError:
            return _newest(folder)
        except (ValueError, TypeError):  # it is being written, or its writer crashed
            if time.monotonic() > end:
                return max(numbers), None
            time.sleep(LOOK_S / 10)


def _write(path: Path, owner: Owner | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(owner) if owner else {}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _forget(folder: Path, number: int) -> None:
    """Remove the files up to `number`, whose owners count no longer."""
    for path in folder.iterdir():
        if path.name.isdecimal() and int(path.name) <= number:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # the highest counts
