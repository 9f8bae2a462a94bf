"""Tasks on this machine: one process works them off, what is ready first, `concurrency` at a time.

It outlives the command that started it. On a CPU, trainings and evaluations of one process are forked from one that has
read the libraries: a study in small is hundreds of them, of a minute or two each. FOLDER/running/NAME and
FOLDER/failed/NAME say how tasks stand; what is done has its own file.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from eval import forked
from megatron_avatar.resilience import ended, queue
from megatron_avatar.resilience.ended import FAILED, HUNG, INTERRUPTED, REFUSED, SIGNALS
from slurm import launch
from slurm.tasks import Task, TaskFailed

POLL_S = 0.2
ROOT = Path(__file__).resolve().parents[1]  # of the code that this process runs, which is what it can fork
FORKED = ("megatron_avatar.train", "eval.run")  # what needs the libraries that AHEAD reads
AHEAD = ("slurm.ahead",)


@dataclass
class Pool:
    """`tasks` are all of the graph, `chosen` the names of those that this process runs."""

    tasks: list[Task]
    chosen: list[str]
    folder: Path
    concurrency: int
    children: dict[str, subprocess.Popen | BaseProcess] = field(default_factory=dict)
    forks_in: dict[str, str] | None = None  # the environment of the process that tasks are forked from
    forks: bool = True  # until that has failed
    lost: set[str] = field(default_factory=set)  # tasks that outlive the process that they were forked from

    def __call__(self) -> None:
        """Run until all are done, failed, or a stop signal came; raises TaskFailed where one of them isn't done."""
        stopped: list[int] = []
        for number in SIGNALS:
            signal.signal(number, lambda number, _: stopped.append(number))
        by_name = {task.name: task for task in self.tasks}
        waiting = [by_name[name] for name in self.chosen]
        for name in self.chosen:
            self._mark("failed", name, False)
            self._mark("running", name, False)
        try:
            self._work_off(by_name, waiting, stopped)
        except BaseException:
            for child in self.children.values():  # they save their state
                _signal(child, signal.SIGTERM)
            raise
        left = [name for name in self.chosen if not by_name[name].done.exists()]
        if left:
            how = "was stopped; run the same command again to continue" if stopped else "ended"
            raise TaskFailed(f"{how} without {', '.join(left[:10])}{' ...' if len(left) > 10 else ''}: see their logs")

    def _work_off(self, by_name: dict[str, Task], waiting: list[Task], stopped: list[int]) -> None:
        told = False
        while self.children or (waiting and not stopped):
            if stopped and not told:  # trainings save their state; they end with status 75
                told = True
                for child in self.children.values():
                    _signal(child, stopped[0])
            self._collect(by_name, waiting, stopped)
            for task in list(waiting):
                if stopped or len(self.children) >= self.concurrency:  # a look is at hundreds of files
                    break
                state = self._state(task, by_name)
                if state == "failed":
                    waiting.remove(task)
                    self._mark("failed", task.name, True)
                elif state == "ready":
                    waiting.remove(task)
                    self.children[task.name] = self._start(task)
                    self._mark("running", task.name, True)
            time.sleep(POLL_S)

    def _state(self, task: Task, by_name: dict[str, Task]) -> str:
        """ready, waiting, or failed: something that the task needs will never be there."""
        needed = [by_name[name] for name in task.needs]
        gone = [n for n in needed if not n.done.exists() and (self.folder / "failed" / n.name).exists()]
        if gone and not task.partial:
            return "failed"
        return "ready" if all(n.done.exists() or n in gone for n in needed) else "waiting"

    def _start(self, task: Task) -> subprocess.Popen | BaseProcess:
        config, parent, code = task.config(), os.getpid(), Path(task.code).resolve()
        ranks = math.prod(task.layout())
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        module, arguments = (task.module, task.arguments) if task.module else ("megatron_avatar.train", task.settings)
        python = launch.command(config, code)
        command = [*python, *several, "-m", module, *arguments]
        own = {"AVATAR_ENDED": task.ended}
        environment = {**forked.ENVIRONMENT, "AVATAR_CHAIN": f"local-{parent}", **queue.outside(),
                       **launch.environment(config, code)}  # fmt: skip
        ended.forget(task.ended)
        with task.opened_log() as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
        alike = module in FORKED and ranks == 1 and code == ROOT and python == [sys.executable]
        try:
            if alike and config.cluster.gpu == "cpu" and self._can_fork(environment):
                return forked.start(module, arguments, Path(log.name), own, session=True)
        except (EOFError, OSError):  # it can't begin, or has ended
            self.forks = False

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        with task.opened_log() as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment | own,
                                    start_new_session=True, preexec_fn=die_with_parent)  # fmt: skip

    def _can_fork(self, environment: dict[str, str]) -> bool:
        """Whether a process with this environment is there to fork from; where there is none, one begins to read."""
        self.forks_in = self.forks_in or environment
        if not self.forks or self.forks_in != environment:
            return False
        forked.read_ahead(environment, AHEAD)  # nothing happens where it is
        return forked.answers()

    def _collect(self, by_name: dict[str, Task], waiting: list[Task], stopped: list[int]) -> None:
        """Take note of children that have ended; one that may be tried again waits again."""
        for name, child in list(self.children.items()):
            status = _status(child)
            if status is None:
                if isinstance(child, BaseProcess) and child.exitcode is not None:
                    self.lost.add(name)
                continue
            del self.children[name]
            self._mark("running", name, False)
            task = by_name[name]
            status = task.told(status)
            if status and name in self.lost:  # how it ended nobody knows; where it was done, the next start sees that
                status = INTERRUPTED
                self.lost.discard(name)
            if not (status or task.module or task.done.exists()):
                status = FAILED
            if status == 0:
                task.mark_done()
            elif status in (INTERRUPTED, HUNG) or stopped or (status != REFUSED and task.may_retry(status)):
                waiting.insert(0, task)
            else:
                self._mark("failed", name, True)

    def _mark(self, kind: str, name: str, there: bool) -> None:
        path = self.folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if there else path.unlink(missing_ok=True)


def _status(child: subprocess.Popen | BaseProcess) -> int | None:
    """None while it runs, even where what it was forked from has ended, and nobody is told its status any more."""
    if isinstance(child, subprocess.Popen):
        return child.poll()
    return None if child.exitcode == 255 and _runs(child.pid) else child.exitcode


def _signal(child: subprocess.Popen | BaseProcess, number: int) -> None:
    if _status(child) is None and child.pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)


def _runs(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def states(folder: Path, jobs: dict[str, str]) -> dict[str, str]:
    """Task -> RUNNING or PENDING, of tasks whose pool is alive and that haven't failed."""
    alive = {job: _alive(int(job)) for job in set(jobs.values())}
    return {
        name: "RUNNING" if (folder / "running" / name).exists() else "PENDING"
        for name, job in jobs.items()
        if alive[job] and not (folder / "failed" / name).exists()
    }


def _alive(pid: int) -> bool:
    try:
        return "submitit" in " ".join(psutil.Process(pid).cmdline()) and _runs(pid)
    except psutil.Error:
        return False
