"""A task of a sweep or a graph: what runs, where, when it is done, and whether it may be tried again.

A task is a training or another command. It is done when its `done` file is there; everything else (job ids, states,
attempts) only says who works on it. A job needs nobody to look after it: it resumes, and retries, by itself.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO

from megatron_avatar.config import Config, load_config
from megatron_avatar.resilience import ended, queue
from megatron_avatar.resilience.ended import INTERRUPTED, REFUSED, SIGNALS
from slurm import launch, request
from slurm.request import Request

STEPS = (60, 120, 240, 480, 720, 1440, 2880, 4320, 10080)  # minutes


@cache
def composed(*settings: str) -> Config:
    """A task's configuration, to be read only: a graph asks for the same hundreds of times."""
    return load_config(list(settings))


class TaskFailed(RuntimeError):
    """A task ended without its result; the message names its log."""


@dataclass
class Task:
    """One node of a graph. `settings` are key=value of the trainer; for a training they are all of its command, for
    another `module` they say where and how it runs."""

    name: str
    folder: Path  # of the training run, or of the command's log
    settings: list[str]
    done: Path
    module: str = ""  # empty: a training
    parallel: bool = True  # in the settings' layout; False: one process
    arguments: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    partial: bool = False  # runs also where some of what it needs has failed
    retries: int = 3
    code: str = ""  # the snapshot, set at submission
    hours: float = 0.0  # of a command, by the plan; a training has its own
    memory: float = 0.0  # bytes of a node, likewise
    asked: Request | None = None  # what Slurm was found to take

    @property
    def log(self) -> Path:
        return self.folder / "logs" if not self.module else self.folder / f"{self.name}.log"

    def config(self) -> Config:
        return composed(*self.settings)

    def layout(self) -> tuple[int, int]:
        """(nodes, tasks a node)."""
        return launch.layout(self.config()) if self.parallel else (1, 1)

    def requests(self) -> list[Request]:
        """What its job asks Slurm for, and behind it what would do as well; ValueError where no node would."""
        config, (nodes, tasks) = self.config(), self.layout()
        if self.module:
            found = [request.make(config, nodes, tasks, self.hours, self.memory, gpus=self.parallel,
                                  margin=request.COMMAND_MARGIN)]  # fmt: skip
        else:
            found = request.trainings(config, nodes, tasks)
        return [replace(one, minutes=_step(one.minutes, config.cluster.minutes)) for one in found]

    # ---- inside of the job ---------------------------------------------------------------------

    def __call__(self) -> None:
        """Run to the end, on a Slurm job's first node; raises TaskFailed once all retries are used up."""
        for number in SIGNALS:  # in submitit's place: what runs below gets the signals itself, saves and ends
            signal.signal(number, lambda *_: None)
        status = self._run_on_slurm()
        if status == 0:
            return
        try:
            if status == INTERRUPTED and not self.module:
                _await_the_end()  # common.sh has put the job into the queue again
            elif status != REFUSED and queue.state(queue.own_job()) == "RUNNING":  # else the failure isn't its own
                if (status == INTERRUPTED or self.may_retry(status)) and queue.requeue(queue.own_job()):
                    _await_the_end()
        except (queue.SlurmRefused, queue.SlurmSilent) as error:
            raise TaskFailed(f"{self.name} ended with status {status} and can't be queued again ({error}): see "
                             f"{self.log}, and run the same command again") from None  # fmt: skip
        raise TaskFailed(f"{self.name} ended with status {status}: see {self.log}")

    def _run_on_slurm(self) -> int:
        if not self.module:
            script = 'source "$AVATAR_SNAPSHOT/slurm/common.sh"; train "$@"'
            environment = {**os.environ, "PYTHON": sys.executable, "AVATAR_SNAPSHOT": self.code}
            return subprocess.run(["bash", "-c", script, "train", *self.settings], env=environment).returncode
        config = self.config()
        code, tasks = Path(self.code), self.layout()[1]
        srun = ["srun", "--kill-on-bad-exit=1", f"--ntasks-per-node={tasks}", *launch.srun_options(config, code)]
        command = [*srun, *launch.command(config, code), "-m", self.module, *self.arguments]
        if config.cluster.modules:
            command = ["bash", "-c", f'module load {shlex.join(config.cluster.modules)} && exec "$@"', "bash", *command]
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")  # srun no longer inherits them
        environment = {"SLURM_WAIT": "300", **os.environ, "SRUN_CPUS_PER_TASK": cores, "SLURM_EXPORT_ENV": "ALL",
                       **launch.environment(config, Path(self.code)), "AVATAR_ENDED": self.ended}  # fmt: skip
        ended.forget(self.ended)
        with self.opened_log() as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        status = self.told(status)
        if status == 0:
            self.mark_done()
        return status

    @property
    def ended(self) -> str:
        """Beginning of the names of files by which its processes tell how they ended."""
        return str(self.folder.absolute() / f".ended-{self.name}")

    def told(self, status: int) -> int:
        """What its launcher's status means; a command that doesn't tell was ended by Slurm's notice or by itself."""
        return ended.settled(self.ended, status)

    def opened_log(self) -> IO[str]:
        path = self.log if self.module else self.log / "local.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")

    def mark_done(self) -> None:
        """Of a command, which stands in the file; a training writes its own."""
        if self.module:
            self.done.parent.mkdir(parents=True, exist_ok=True)
            self.done.write_text(f"{self.command}\n")

    @property
    def command(self) -> str:
        return shlex.join([self.module, *self.arguments])

    def may_retry(self, status: int) -> bool:
        """Whether another attempt is left, which is noted in the folder: it outlives the job."""
        path = self.folder / f"failures-{self.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            record = {"status": status, "time": time.time(), "job": os.environ.get("SLURM_JOB_ID", os.getpid())}
            file.write(json.dumps(record) + "\n")
        return failures(self) <= self.retries


def _step(minutes: int, most: int) -> int:
    """A time limit of few values: tasks of one are one array."""
    return min(most, next((step for step in STEPS if step >= minutes), most))


def _await_the_end() -> None:
    """A requeued job's processes are ended by Slurm; where it isn't, this one goes on after two minutes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(120)


def failures(task: Task) -> int:
    """Failed attempts of a task so far."""
    path = task.folder / f"failures-{task.name}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
