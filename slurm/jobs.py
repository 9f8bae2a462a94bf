"""Tasks that run as Slurm jobs or local processes, through submitit: what sweep.py and reproduce.py are made of.

A task is a training or another command. It is done when its `done` file is there; everything else (job ids, states,
attempts) only says who works on it. A job needs nobody to look after it: it resumes, and retries, by itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from submitit import LocalExecutor, SlurmExecutor

from megatron_avatar.config import Config, load_config, save_config
from slurm import launch

REFUSED, INTERRUPTED, HUNG = 2, 75, 76  # exit statuses of training
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STATES = "PENDING REQUEUED RUNNING COMPLETING CONFIGURING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING".split()


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
    retries: int = 3
    code: str = ""  # the snapshot, set at submission

    @property
    def log(self) -> Path:
        return self.folder / "logs" if not self.module else self.folder / f"{self.name}.log"

    def config(self) -> Config:
        return load_config(self.settings)

    def layout(self) -> tuple[int, int]:
        """(nodes, tasks a node)."""
        return launch.layout(self.config()) if self.parallel else (1, 1)

    # ---- inside of the job ---------------------------------------------------------------------

    def __call__(self) -> None:
        """Run to the end, on the job's first node; raises TaskFailed once all retries are used up."""
        stopped: list[int] = []
        for number in SIGNALS:  # in submitit's place: what runs below gets the signals itself, saves and ends
            signal.signal(number, lambda number, _: stopped.append(number))
        self._under_slurm() if os.environ["SUBMITIT_EXECUTOR"] == "slurm" else self._locally(stopped)

    def _under_slurm(self) -> None:
        status = self._run_on_slurm()
        if status == 0:
            return
        state = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
        running = subprocess.run(state, capture_output=True, text=True).stdout.strip() == "RUNNING"  # not cancelled
        if running and status != REFUSED and self._may_retry(status):
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            time.sleep(600)  # Slurm ends this process
        raise TaskFailed(f"{self.name} ended with status {status}: see {self.log}")

    def _run_on_slurm(self) -> int:
        if not self.module:
            script = 'source "$AVATAR_SNAPSHOT/slurm/common.sh"; train "$@"'
            environment = {**os.environ, "PYTHON": sys.executable, "AVATAR_SNAPSHOT": self.code}
            return subprocess.run(["bash", "-c", script, "train", *self.settings], env=environment).returncode
        srun = ["srun", "--kill-on-bad-exit=1", f"--ntasks-per-node={self.layout()[1]}"]
        return self._run_command([*srun, *launch.srun_options(self.config())])

    def _torchrun(self) -> list[str]:
        """Python's arguments that start several processes on this machine; none for a single one."""
        ranks = math.prod(self.layout())
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []

    def _run_command(self, prefix: list[str], launcher: Sequence[str] = ()) -> int:
        config = self.config()
        command = [*prefix, *launch.command(config), *launcher, "-m", self.module, *self.arguments]
        environment = {**os.environ, **launch.environment(config, Path(self.code))}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if status == 0:
            self.done.parent.mkdir(parents=True, exist_ok=True)
            self.done.touch()
        return status

    def _may_retry(self, status: int) -> bool:
        """Whether another attempt is left, which is noted in the folder: it outlives the job."""
        path = self.folder / f"failures-{self.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            record = {"status": status, "time": time.time(), "job": os.environ.get("SLURM_JOB_ID", os.getpid())}
            file.write(json.dumps(record) + "\n")
        return failures(self) <= self.retries

    def _locally(self, stopped: list[int]) -> None:
        """The same without Slurm: wait for what this needs and for a free place; run, again where it ended early."""
        places = Path(os.environ["AVATAR_PLACES"])
        with ExitStack() as stack:
            stack.enter_context(_place(places, stopped, self._ready))
            while not stopped:
                status = self._run_child(stopped) if not self.module else self._run_command([], self._torchrun())
                if status == 0:
                    return
                again = status in (INTERRUPTED, HUNG) or (status != REFUSED and self._may_retry(status))
                if not again:
                    raise TaskFailed(f"{self.name} ended with status {status}: see {self.log}")
        raise TaskFailed(f"{self.name} was stopped; run the same command again to continue")

    def _ready(self) -> bool:
        """Whether all that this needs is done; TaskFailed where one of them never will be."""
        needed = json.loads(os.environ["AVATAR_NEEDS"]).get(self.name, {})
        for name, (done, failed) in needed.items():
            if Path(failed).exists() and not Path(done).exists():
                raise TaskFailed(f"{self.name} needs {name}, which failed")
        return all(Path(done).exists() for done, _ in needed.values())

    def _run_child(self, stopped: list[int]) -> int:
        """Training in processes of their own; a stop signal is passed on to them."""
        config = self.config()
        command = [*launch.command(config), *self._torchrun(), "-m", "megatron_avatar.train", *self.settings]
        self.log.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        with (self.log / "local.log").open("a") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
                env={"AVATAR_CHAIN": f"local-{parent}", **os.environ, **launch.environment(config, Path(self.code))},
            )  # fmt: skip
            told = False
            while (status := child.poll()) is None:
                if stopped and not told:
                    child.send_signal(stopped[0])
                    told = True
                time.sleep(0.2)
        return status


@contextmanager
def _place(folder: Path, stopped: list[int], ready) -> Iterator[None]:
    """One of the places that `concurrency` allows, held by a lock that the system takes back from a dead process."""
    files = sorted(folder.glob("place-*"))
    while not stopped:
        for path in files if ready() else []:
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(0.5)
    yield


def failures(task: Task) -> int:
    """Failed attempts of a task so far."""
    path = task.folder / f"failures-{task.name}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


# ---- submission ------------------------------------------------------------------------------------------------


class Board:
    """FOLDER/jobs.json: which job works on which task, so that the command can be repeated."""

    def __init__(self, folder: Path, tasks: list[Task], *, local: bool) -> None:
        self.folder, self.tasks, self.local = folder, {task.name: task for task in tasks}, local
        self._path = folder / "jobs.json"
        self.jobs: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def states(self) -> dict[str, str]:
        """Task name -> done, a state of Slurm's (RUNNING, PENDING ...), failed, or empty: never submitted."""
        alive = _local_states(self.jobs) if self.local else _slurm_states(self.jobs)
        found = {}
        for name, task in self.tasks.items():
            if task.done.exists():
                found[name] = "done"
            else:
                found[name] = alive.get(name) or ("failed" if name in self.jobs else "")
        return found

    def submit(self, code: Path, concurrency: int, *, chained: bool) -> list[str]:
        """Submit what is neither done nor queued: `chained` as jobs that wait for each other, else as job arrays."""
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
        elif chained:
            for task in missing:  # in order: what a task needs comes before it
                waits = [self.jobs[name] for name in task.needs if not self.tasks[name].done.exists()]
                dependency = {"dependency": "afterok:" + ":".join(waits)} if waits else {}
                (job,) = self._submit_to_slurm([task], code, 1, dependency)
                self._note({task.name: job})
        else:
            shapes: dict[tuple, list[Task]] = {}
            for task in missing:
                shapes.setdefault(task.layout(), []).append(task)
            for group in shapes.values():
                self._note(dict(zip([t.name for t in group], self._submit_to_slurm(group, code, concurrency, {}),
                                    strict=True)))  # fmt: skip
        return [task.name for task in missing]

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
        places = self.folder / "places"
        places.mkdir(exist_ok=True)
        for path in places.iterdir():
            path.unlink()
        for k in range(concurrency):
            (places / f"place-{k}").touch()
        failed = {name: self.folder / "failed" / name for name in self.tasks}
        needs = {task.name: {n: (str(self.tasks[n].done.absolute()), str(failed[n].absolute())) for n in task.needs}
                 for task in self.tasks.values()}  # fmt: skip
        (self.folder / "failed").mkdir(exist_ok=True)
        own = {"AVATAR_PLACES": str(places.absolute()), "AVATAR_NEEDS": json.dumps(needs), "PYTHONSAFEPATH": "1"}
        if missing:
            own["PYTHONPATH"] = missing[0].code
        executor = LocalExecutor(self.folder / "submitit")
        before, handler = dict(os.environ), signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.update(own)  # the jobs outlive this command: a Ctrl-C of its terminal is not meant for them
        try:
            for task in missing:
                failed[task.name].unlink(missing_ok=True)
                executor.update_parameters(timeout_min=60 * 24 * 365, signal_delay_s=0, stderr_to_stdout=True)
                job = executor.submit(Marked(task, failed[task.name].absolute()))
                self._note({task.name: job.job_id})
        finally:
            os.environ.clear()
            os.environ.update(before)
            signal.signal(signal.SIGINT, handler)


@dataclass
class Marked:
    """A local task that leaves a mark when it fails, for those that wait for it."""

    task: Task
    mark: Path

    def __call__(self) -> None:
        try:
            self.task()
        except BaseException:
            self.mark.touch()
            raise


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


def _local_states(jobs: dict[str, str]) -> dict[str, str]:
    def alive(pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            return "submitit" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return {name: "RUNNING" for name, job in jobs.items() if alive(int(job))}
