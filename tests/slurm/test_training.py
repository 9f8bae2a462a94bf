"""Real jobs on a real Slurm: what a cluster does to a run, and that the run comes to the same bits all the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_avatar.resilience import attempts
from tests.slurm.conftest import ROOT, until
from tests.training import small

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
STEPS = 9  # three stages of three
LAYOUTS = {"2x2": ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"),
           "2x1": ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"),
           "1x1": ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1")}


class Run:
    """One training as a job of tiny.sh."""

    def __init__(self, slurm, world: Path, out: Path, layout: str, steps: int = STEPS // 3) -> None:
        self.slurm, self.out, self.layout, self.log = slurm, out, layout, out.parent / f"{out.name}.log"
        tp = "parallel.tp=2" if layout == "2x2" else "parallel.tp=1"
        self.settings = small.arguments(world, out, tp, "checkpoint.every=2", "checkpoint.keep=9", steps=steps)

    def submit(self, *options: str, folder: Path = ROOT) -> str:
        self.job = self.slurm.submit(*LAYOUTS[self.layout], f"--output={self.log}", *options,
                                     ROOT / "slurm" / "tiny.sh", *self.settings, cwd=folder)  # fmt: skip
        return self.job

    def steps_done(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_step(self, step: int) -> None:
        until(lambda: self.steps_done() >= step, 150, lambda: f"{self.slurm.state(self.job)}\n{self.text()}")

    def wait(self, *states: str, timeout: float = 200) -> str:
        return self.slurm.wait(self.job, {*states}, timeout, self.log)

    def completes(self) -> None:
        assert self.wait("COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT", "CANCELLED") == "COMPLETED", self.text()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "no log"

    def weights(self) -> str:
        return hashlib.sha256((self.out / "export" / "localisation" / "model.safetensors").read_bytes()).hexdigest()

    def records(self) -> list[dict]:
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time") and k != "peak_rss_mib"}
                for line in lines]

    def attempts(self) -> list[dict]:
        return [record for record in attempts.read(self.out) if "step" in record]

    def excused(self) -> list[int]:
        """Attempts that were ended from outside, before their time limit."""
        return [record["excused"] for record in attempts.read(self.out) if "excused" in record]


def assert_equal(run: Run, whole: Run) -> None:
    assert run.weights() == whole.weights()
    assert [r["step"] for r in run.records()] == list(range(1, len(whole.records()) + 1)), "a gap or a repeat"
    assert run.records() == whole.records()


@pytest.fixture(scope="module")
def whole(slurm, world, tmp_path_factory) -> Run:
    """An uninterrupted run over two nodes."""
    run = Run(slurm, world, tmp_path_factory.mktemp("whole") / "run", "2x1")
    run.submit()
    run.completes()
    return run


@pytest.fixture
def run(slurm, world, tmp_path) -> Iterator[Run]:
    run = Run(slurm, world, tmp_path / "run", "2x1")
    yield run
    slurm.run("scancel", run.job)


def rank_process(job: str, rank: int) -> psutil.Process:
    """The trainer of a rank of a job, among all processes of this machine."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            environment = process.environ() if "megatron_avatar.train" in (process.info["cmdline"] or []) else {}
        except psutil.Error:
            continue
        if (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (job, str(rank)):
            return process
    raise AssertionError(f"job {job} has no rank {rank}")


SLOW_IMPORT = """
import os, runpy, sys, time
from slurm import meeting

class Slow:
    def find_spec(name, path=None, target=None):
        if name == "torch" and os.environ["SLURM_PROCID"] == "3":
            time.sleep(4)

meeting.SAY_S = 1.0
sys.meta_path.insert(0, Slow)
runpy.run_module("slurm.preflight", run_name="__main__", alter_sys=True)
"""
DISTURBING = """#!/bin/bash
# Rank 3 is long in importing torch before training, and never ends after it.
python={python}
[[ "$2" != slurm.preflight ]] || exec "$python" {slow} "${{@:3}}"
"$python" "$@" || exit
[[ "$SLURM_PROCID" != 3 ]] || exec sleep 600
"""


def test_a_first_hour_elsewhere(slurm, world, tmp_path):
    """A folder of the user's own, nothing of the environment exported, typed GPUs, one rank in four that imports slowly
    and never ends, another job on the same folder: and the same bits, also cut by USR1."""
    elsewhere, slow, python = tmp_path / "größe", tmp_path / "slow.py", tmp_path / "python"
    elsewhere.mkdir()
    slow.write_text(SLOW_IMPORT)
    python.write_text(DISTURBING.format(python=sys.executable, slow=slow))
    python.chmod(0o755)
    whole, run = (Run(slurm, world, elsewhere / name, "2x2") for name in ("whole", "cut"))
    for one in (whole, run):
        one.settings += [f"cluster.python={python}"]
    whole.submit("--export=NONE", "--gres=gpu:a100:2", folder=elsewhere)
    run.submit("--export=ALL,SLURM_WAIT=5", "--gres=gpu:2", "--gpus-per-task=1", folder=elsewhere)
    run.wait_for_step(4)
    second = slurm.submit("--ntasks-per-node=2", f"--output={tmp_path / 'second.log'}", ROOT / "slurm" / "tiny.sh",
                          *run.settings, cwd=ROOT)  # fmt: skip
    slurm.run("scancel", "--signal=USR1", run.job)
    run.wait("PENDING")
    assert 4 <= run.steps_done() < STEPS, "the signal came too late to prove anything"
    assert slurm.wait(second, {"FAILED", "COMPLETED"}, 60) == "FAILED"
    assert f"job {run.job} " in (said := (tmp_path / "second.log").read_text()) and "this run" in said
    run.completes()
    # On a busy machine others are as long, and stand before it.
    assert re.search(r"waiting for .*rank 3 on n\d, importing torch for", run.text())
    assert "on its way out something ended with status" in run.text(), "rank 3 was ended, and the run is done"
    assert [a["chain"] for a in run.attempts()] == [run.job] * 2 and run.excused() == [1]
    assert not (elsewhere / ".jobs" / run.job).is_symlink(), "it is over"
    until((whole.out / "done.json").exists, 60, whole.text)
    slurm.run("scancel", whole.job)  # its rank 3 may take five minutes
    assert_equal(run, whole)


LACKING = """#!/bin/bash
# Rank 1 can't import torch.
[[ "$SLURM_PROCID" != 1 ]] || export PYTHONPATH={broken}:$PYTHONPATH
exec {python} "$@"
"""


def test_a_rank_that_cannot_import_torch_ends_the_job_for_good_while_the_others_wait(slurm, run, tmp_path):
    """They are stopped by srun, whose status is then theirs: 75."""
    broken, python = tmp_path / "broken", tmp_path / "python"
    (broken / "torch").mkdir(parents=True)
    (broken / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    python.write_text(LACKING.format(python=sys.executable, broken=broken))
    python.chmod(0o755)
    run.settings.append(f"cluster.python={python}")
    run.submit()
    assert run.wait("FAILED", "COMPLETED", timeout=90) == "FAILED"
    assert "it can't begin (OSError: libcudart.so.12" in run.text() and "REQUEUE" not in run.text()
    assert len(run.attempts()) == 1


ASKED = [(), ("--gres=gpu:a100:2",), ("--gpus-per-task=1",), ("--gres=none",), ("--gpus-per-node=2",),
         ("--gres=none", "--gpus-per-node=a100:2"), ("--gres=none", "--gpus-per-task=a100:1")]  # fmt: skip


def test_scripts_take_every_way_to_ask_for_gpus(slurm, monkeypatch):
    size = ("--test-only", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100")
    for options in ASKED:
        default = () if any("gres" in option for option in options) else ("--gres=gpu:2",)  # of two GPUs a node
        slurm.run("sbatch", *size, *default, *options, "slurm/avatar_7b.sh", cwd=ROOT)
    monkeypatch.setenv("SBATCH_GRES", "gpu:a100:2")
    slurm.run("sbatch", *size, "slurm/avatar_7b.sh", cwd=ROOT)


def test_preempted_by_a_higher_partition(slurm, run, whole):
    run.submit()
    run.wait_for_step(4)
    urgent = slurm.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    run.wait("PENDING")
    assert slurm.wait(urgent, {"COMPLETED"}, 60)
    run.completes()
    assert_equal(run, whole)
    assert run.attempts()[1]["step"] >= 4, "what was done in the grace time was saved"
    assert run.excused() == [1], "no lack of progress"


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(slurm, run, whole):
    run.submit()
    run.wait_for_step(5)
    slurm.run("scontrol", "update", f"nodename={slurm.nodes(run.job)[1]}", "state=down", "reason=test")
    run.wait("PENDING")
    run.completes()
    assert_equal(run, whole)
    assert run.attempts()[1]["step"] >= 4 and len({a["chain"] for a in run.attempts()}) == 1
    assert "may not be requeued" not in run.text(), "Slurm has requeued it: a second job would work on the same run"


def test_time_limit(slurm, world, tmp_path):
    """Slurm looks at limits twice a minute: this one is shortened to the minute after next, with room to save."""
    run = Run(slurm, world, tmp_path / "run", "1x1", steps=100)
    began = time.monotonic()
    run.submit("--signal=USR1@90")
    run.wait_for_step(1)
    minutes = int(time.monotonic() - began) // 60 + 2
    slurm.run("scontrol", "update", f"jobid={run.job}", f"timelimit={minutes}")
    run.wait("PENDING", timeout=180)
    slurm.run("scontrol", "update", f"jobid={run.job}", "timelimit=30")
    first = run.steps_done()
    assert 0 < first < 300
    until(lambda: run.steps_done() > first, 120, run.text)
    slurm.run("scancel", run.job)
    assert [r["step"] for r in run.records()] == list(range(1, len(run.records()) + 1))
    assert run.attempts()[1]["step"] == first, "nothing that was done is repeated"


def test_a_job_that_never_gets_to_a_step_gives_up(slurm, run):
    """Stopped again and again near its time limit, before its first step is done: requeued three times, then no
    more."""
    run.layout = "1x1"
    run.submit("--time=5")
    for attempt in (1, 2, 3):
        until(lambda n=attempt: run.text().count("kernels:") == n, 90, run.text)
        slurm.run("scancel", "--signal=USR1", run.job)
        run.wait("PENDING", timeout=60)
    assert run.wait("FAILED", "COMPLETED", timeout=60) == "FAILED"
    assert f"job {run.job} was started 3 times at step 0" in run.text() and len(run.attempts()) == 3


def test_a_cancelled_job_stays_cancelled_with_its_state_saved(slurm, run, whole):
    run.submit()
    run.wait_for_step(4)
    slurm.run("scancel", run.job)
    until(lambda: run.text().count("state saved") == 1, 60, run.text)
    time.sleep(8)  # a requeue takes as long
    assert slurm.state(run.job) == "CANCELLED"
    run.submit()
    run.completes()
    assert_equal(run, whole)
    assert run.attempts()[1]["step"] >= 4


def test_a_failing_rank_ends_the_job_at_once_and_submitting_again_continues(slurm, run, whole):
    run.submit()
    run.wait_for_step(5)
    began = time.monotonic()
    os.kill(rank_process(run.job, 1).pid, signal.SIGKILL)
    assert run.wait("FAILED", "COMPLETED", "PENDING", timeout=60) == "FAILED"
    assert time.monotonic() - began < 200, "srun would have waited for five minutes"
    run.submit()
    run.completes()
    assert_equal(run, whole)


def test_where_requeueing_is_refused_another_job_continues(slurm, run, whole, tmp_path):
    run.submit("--no-requeue", "--job-name=norequeue", "--exclude=n4", "--mem=5000", "--comment=paid by=us", "--nice=7",
               f"--error={tmp_path}/%j.err")  # fmt: skip
    behind = slurm.submit(f"--dependency=afterok:{run.job}", "--output=/dev/null", "--mem=10", "--wrap=true")
    run.wait_for_step(4)
    slurm.run("scancel", "--signal=USR1", run.job)
    assert run.wait("COMPLETED", "FAILED") == "FAILED", "status 0 is for a run that is done"
    (after,) = {line.split()[-3] for line in (tmp_path / f"{run.job}.err").read_text().splitlines()
                if "may not be requeued" in line}  # fmt: skip
    shown = slurm.run("scontrol", "show", "job", after)
    for field in ("Requeue=0", "JobName=norequeue", "ExcNodeList=n4", "MinMemoryNode=5000M", "Comment=paid by=us",
                  "Nice=7", f"StdErr={tmp_path}/{after}.err", f"StdOut={run.log}", "NumNodes=2"):  # fmt: skip
        assert field in shown, shown
    assert slurm.state(behind) == "PENDING", "it waits for the run, not for the job"
    first, run.job = run.job, after
    run.completes()
    slurm.wait(behind, {"COMPLETED"}, 30)
    assert_equal(run, whole)
    assert [a["chain"] for a in run.attempts()] == [first] * 2
    assert len(list((run.out / "snapshots").iterdir())) == 1, "it runs what was submitted first"


def test_a_layout_that_needs_more_tasks_is_refused_at_once(slurm, run):
    began = time.monotonic()
    run.settings.append("parallel.pp=4")
    run.submit()
    assert run.wait("FAILED", "COMPLETED", timeout=60) == "FAILED"
    assert "need a multiple of 4 processes, but 2 were started" in run.text() and not run.out.exists()
    assert time.monotonic() - began < 180


@pytest.mark.parametrize("failing", ["in the shell", "in Python"])
def test_what_the_first_task_that_fails_has_said_is_not_lost(slurm, tmp_path, failing):
    """srun ends the others at once: without a moment's wait it was lost about 5 times in 100 on one machine."""
    python = ("import sys; from megatron_avatar.resilience import ended; ended.leave_on_signals(); "
              "print('error: pre-flight', file=sys.stderr, flush=True); sys.exit(2)")  # fmt: skip
    fails = 'bash -c "$SEES_THE_RUN" sees ""' if failing == "in the shell" else f'{sys.executable} -c "{python}"'
    (tmp_path / "task").write_text(f"[[ $SLURM_PROCID = 1 ]] || exec sleep 100\nexec {fails}\n")
    script = f"""source slurm/common.sh; export SEES_THE_RUN AVATAR_SNAPSHOT=/nowhere
    for some in {{1..6}}; do
      for step in {{1..10}}; do
        srun --overlap --kill-on-bad-exit=1 bash {tmp_path}/task 2>&1 | grep -c "error: pre-flight" &
      done
      wait
    done"""
    heard = slurm.run("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", script, cwd=ROOT).split()
    assert heard == ["1"] * 60


def test_the_pre_flight_names_a_node_that_does_not_see_the_run(slurm, run):
    """A folder that each node mounts for itself, as a forgotten mount would be: /dev/shm of a private namespace."""
    began, old = time.monotonic(), next(s for s in run.settings if s.startswith("output_dir="))
    private = Path("/run/avatar-preflight-test")
    private.mkdir(exist_ok=True)
    namespaces: dict[str, int] = {}

    def found() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command[:1] == ["slurmd"] and slurm.environment()["SLURM_CONF"] in command:
                namespaces[command[-1]] = process.pid
        return {"n2", "n3", "n4"} <= namespaces.keys()

    until(found, 20, lambda: f"a node's daemon isn't there: {namespaces}")
    mounted = []
    try:
        for name in ("n2", "n3", "n4"):
            slurm.run("nsenter", f"--mount=/proc/{namespaces[name]}/ns/mnt", "mount", "-t", "tmpfs", "none", private)
            mounted.append(name)
        run.settings[run.settings.index(old)] = f"output_dir={private / 'run'}"
        run.submit("--nodelist=n1,n2")
        assert run.wait("FAILED", "COMPLETED", timeout=90) == "FAILED"
        assert "pre-flight on n2" in run.text() and "all nodes share" in run.text()
        assert "REQUEUE" not in run.text(), "what a node lacks it lacks next time"
        assert time.monotonic() - began < 180
    finally:
        for name in mounted:
            slurm.run("nsenter", f"--mount=/proc/{namespaces[name]}/ns/mnt", "umount", private)
        slurm.run("rm", "-rf", private)
