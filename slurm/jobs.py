"""Tasks that run as Slurm jobs or local processes, through submitit: what sweep.py and reproduce.py are made of."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

from submitit import LocalExecutor, SlurmExecutor

from megatron_avatar.config import Config, save_config
from slurm import pool
from slurm.tasks import Task

MOST_WAITS = 40  # jobs named in one dependency
STATES = "PENDING REQUEUED RUNNING COMPLETING CONFIGURING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING".split()


class Board:
    """FOLDER/jobs.json: which job works on which task, so that the command can be repeated."""

    def __init__(self, folder: Path, tasks: list[Task], *, local: bool) -> None:
        self.folder, self.tasks, self.local = folder, {task.name: task for task in tasks}, local
        self._path = folder / "jobs.json"
        self.jobs: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def states(self) -> dict[str, str]:
        """Task name -> done, a state of Slurm's (RUNNING, PENDING ...), failed, or empty: never submitted."""
        if self.local:
            alive = pool.states(self.folder, self.jobs)
        else:
            alive = _slurm_states(self.jobs)
        found = {}
        for name, task in self.tasks.items():
            if task.done.exists():
                found[name] = "done"
            else:
                found[name] = alive.get(name) or ("failed" if name in self.jobs else "")
        return found

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
            groups.setdefault((task.layout(), task.partial, *sorted(task.needs)), []).append(task)
        for group in groups.values():  # tasks of one size that wait for the same are one array
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

    def _submit_to_slurm(self, group: list[Task], code: Path, concurrency: int, more: dict[str, str]) -> list[str]:
        config = group[0].config()
        executor = SlurmExecutor(self.folder / "submitit")
        setup = [f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1"]
        executor.update_parameters(
            **slurm_parameters(config, group[0].layout()), job_name=f"{config.name}-{group[0].name}"[:60],
            array_parallelism=concurrency, setup=setup, use_srun=False, stderr_to_stdout=True,
            signal_delay_s=config.cluster.signal_s,
            additional_parameters={"requeue": True, **more, **({"kill-on-invalid-dep": "yes"} if more else {})},
        )  # fmt: skip
        jobs = []
        with executor.batch():  # one array, unless it is a single job
            for task in group:
                jobs.append(executor.submit(task))
        return [job.job_id for job in jobs]

    def _submit_locally(self, missing: list[Task], concurrency: int) -> None:
        if not missing:
            return
        executor = LocalExecutor(self.folder / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, signal_delay_s=0, stderr_to_stdout=True)
        before, handler = dict(os.environ), signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.update(PYTHONSAFEPATH="1", PYTHONPATH=missing[0].code)
        try:  # the pool outlives this command: a Ctrl-C of its terminal is not meant for it
            names = [task.name for task in missing]
            job = executor.submit(pool.Pool(list(self.tasks.values()), names, self.folder, concurrency))
        finally:
            os.environ.clear()
            os.environ.update(before)
            signal.signal(signal.SIGINT, handler)
        self._note({task.name: job.job_id for task in missing})


def slurm_parameters(config: Config, layout: tuple[int, int]) -> dict[str, object]:
    """submitit's parameters of a job of `layout` nodes and tasks a node."""
    cluster, (nodes, tasks) = config.cluster, layout
    named = {name: getattr(cluster, name) for name in ("partition", "account", "qos") if getattr(cluster, name)}
    gpus = {} if cluster.gpu == "cpu" else {"gpus_per_node": tasks}
    return {"nodes": nodes, "ntasks_per_node": tasks, "cpus_per_task": cluster.cpus_per_task, "time": cluster.minutes,
            **named, **gpus}  # fmt: skip


def sbatch_options(config: Config, layout: tuple[int, int]) -> list[str]:
    """The same as sbatch's options, to ask whether Slurm would take such a job."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in slurm_parameters(config, layout).items()]


def _slurm_states(jobs: dict[str, str]) -> dict[str, str]:
    """States of the jobs that Slurm still has in its queue."""
    if not jobs:
        return {}
    ids = ",".join(sorted({job.split("_")[0] for job in jobs.values()}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={ids}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(f"squeue: {done.stderr.strip()}")
    states = dict(line.split("|") for line in done.stdout.splitlines() if "|" in line)
    return {name: states[job] for name, job in jobs.items() if states.get(job) in STATES}
