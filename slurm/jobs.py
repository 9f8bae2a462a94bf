"""Tasks that run as Slurm jobs or local processes, through submitit: what sweep.py and reproduce.py are made of."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError

from megatron_avatar.config import save_config
from megatron_avatar.resilience import queue
from slurm import pool
from slurm.request import Request
from slurm.tasks import Task

MOST_WAITS = 40  # jobs named in one dependency
ASK_EVERY_S = 60.0  # squeue is asked no more often: a controller has other users too
PATIENCE_S = 300.0  # with a controller that is out of reach, while a person waits


class Board:
    """FOLDER/jobs.json: which job works on which task, so that the command can be repeated."""

    def __init__(self, folder: Path, tasks: list[Task], *, local: bool) -> None:
        self.folder, self.tasks, self.local = folder, {task.name: task for task in tasks}, local
        self._path = folder / "jobs.json"
        self.jobs: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._alive: dict[str, str] | None = None  # task -> state, as squeue last said
        self._asked = -math.inf
        self.silence = ""  # why there is no newer answer

    def states(self) -> dict[str, str]:
        """Task name -> done, a state of Slurm's (RUNNING, PENDING ...), failed, or empty: never submitted.

        Slurm's part is up to a minute old, older while Slurm gives no answer, which `silence` says; SlurmSilent where
        there has been none yet.
        """
        alive = pool.states(self.folder, self.jobs) if self.local else self._ask()
        found = {}
        for name, task in self.tasks.items():
            if task.done.exists():
                found[name] = "done"
            else:
                found[name] = alive.get(name) or ("failed" if name in self.jobs else "")
        return found

    def _ask(self) -> dict[str, str]:
        if time.monotonic() - self._asked >= ASK_EVERY_S:
            try:
                self._alive = _slurm_states(self.jobs, PATIENCE_S if self._alive is None else 0)
                self.silence = ""
            except queue.SlurmSilent as error:
                if self._alive is None:
                    raise
                self.silence = str(error)
            self._asked = time.monotonic()
        return self._alive

    def submit(self, code: Path, concurrency: int) -> list[str]:
        """Submit what is neither done nor queued, `concurrency` tasks at a time: on Slurm as job arrays that wait for
        each other, on this machine as one process that works them off."""
        states = self.states()
        missing = [task for name, task in self.tasks.items() if states[name] in ("", "failed")]
        for task in missing:
            task.code = str(code)
            if not task.module:
                (code / "configs").mkdir(exist_ok=True)
                save_config(task.config(), code / "configs" / f"{task.name}.yaml")
            (task.folder / f"failures-{task.name}.jsonl").unlink(missing_ok=True)  # the user's word gives new retries
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.local:
            self._submit_locally(missing, concurrency)
            return [task.name for task in missing]
        groups: dict[tuple, list[Task]] = {}  # in order: what a task needs comes before it
        for task in missing:
            task.asked = task.asked or task.requests()[0]
            groups.setdefault((task.asked, task.partial, *sorted(task.needs)), []).append(task)
        for group in groups.values():  # tasks that ask for the same and wait for the same are one array
            jobs = self._submit_to_slurm(group, code, concurrency, self._dependency(group[0]))
            self._note(dict(zip([t.name for t in group], jobs, strict=True)))
        return [task.name for task in missing]

    def _dependency(self, task: Task) -> dict[str, str]:
        waits = [self.jobs[name] for name in task.needs if not self.tasks[name].done.exists()]
        if len(waits) > MOST_WAITS:  # whole arrays
            waits = list(dict.fromkeys(job.split("_")[0] for job in waits))
        kind = "afterany" if task.partial else "afterok"
        return {"dependency": f"{kind}:{':'.join(waits)}"} if waits else {}

    def _note(self, jobs: dict[str, str]) -> None:
        self.jobs |= jobs
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.jobs, indent=1) + "\n")
        aside.replace(self._path)
        if self._alive is not None:
            self._alive |= dict.fromkeys(jobs, "PENDING")  # until squeue is asked again

    def _submit_to_slurm(self, group: list[Task], code: Path, concurrency: int, more: dict[str, str]) -> list[str]:
        config = group[0].config()
        setup = [f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1"]
        parameters = dict(
            **slurm_parameters(group[0].asked), job_name=f"{config.name}-{group[0].name}"[:60],
            array_parallelism=concurrency, setup=setup, use_srun=False, stderr_to_stdout=True,
            signal_delay_s=config.cluster.signal_s,
        )  # fmt: skip
        parameters["additional_parameters"] |= {**more, **({"kill-on-invalid-dep": "yes"} if more else {})}
        end, pause = time.monotonic() + PATIENCE_S, 5.0
        while True:
            executor, jobs = SlurmExecutor(self.folder / "submitit"), []
            executor.update_parameters(**parameters)
            try:
                with _environment(queue.outside()), executor.batch():  # one array, unless it is a single job
                    for task in group:
                        jobs.append(executor.submit(task))
                return [job.job_id for job in jobs]
            except FailedJobError as error:
                reason = (str(error).strip().splitlines() or ["sbatch failed without a reason"])[-1]
                if not queue.OUT_OF_REACH.search(str(error)) or time.monotonic() + pause > end:
                    names = f"{', '.join(task.name for task in group[:5])}{' ...' if len(group) > 5 else ''}"
                    raise ValueError(f"Slurm didn't queue {names}: {reason}. What it did is noted: the same command "
                                     "goes on with the rest") from None  # fmt: skip
                time.sleep(pause)
                pause = min(2 * pause, 60.0)

    def _submit_locally(self, missing: list[Task], concurrency: int) -> None:
        if not missing:
            return
        executor = LocalExecutor(self.folder / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, signal_delay_s=0, stderr_to_stdout=True)
        names, handler = [task.name for task in missing], signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:  # the pool outlives this command: a Ctrl-C of its terminal is not meant for it
            with _environment({**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": missing[0].code}):
                job = executor.submit(pool.Pool(list(self.tasks.values()), names, self.folder, concurrency))
        finally:
            signal.signal(signal.SIGINT, handler)
        self._note({task.name: job.job_id for task in missing})


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """What submitit's commands find in their environment; this process gets its own back."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def slurm_parameters(asked: Request) -> dict[str, object]:
    """submitit's parameters of a job."""
    further = dict(option.removeprefix("--").partition("=")[::2] for option in asked.sbatch)
    own = {name.replace("-", "_"): value for name, value in asked.options().items()}
    return own | {"additional_parameters": {"requeue": True, **{k: v or True for k, v in further.items()}}}


def _slurm_states(jobs: dict[str, str], patience_s: float) -> dict[str, str]:
    """Task -> state, of those whose jobs Slurm still has in its queue."""
    if not jobs:
        return {}
    ids = ",".join(sorted({job.split("_")[0] for job in jobs.values()}))
    try:
        found = queue.ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={ids}",
                          patience_s=patience_s)  # fmt: skip
    except queue.SlurmRefused as error:
        if "invalid job id" not in str(error).lower():
            raise
        found = ""
    states = dict(line.split("|") for line in found.splitlines() if "|" in line)
    return {name: states[job] for name, job in jobs.items() if states.get(job) in queue.ALIVE}
