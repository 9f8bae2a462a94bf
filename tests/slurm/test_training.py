"""Real jobs on a real Slurm: what a cluster does to a run, and that the run comes to the same bits all the same."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.conftest import ROOT, until
from tests.training import small

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 9  # three stages of three
LAYOUTS = {"2x2": ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"),
           "2x1": ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")}


class Run:
    """One training as a job of tiny.sh."""

    def __init__(self, slurm, world: Path, out: Path, layout: str, steps: int = STEPS // 3) -> None:
        self.slurm, self.out, self.layout, self.log = slurm, out, layout, out.parent / f"{out.name}.log"
        tp = "parallel.tp=2" if layout == "2x2" else "parallel.tp=1"
        self.settings = small.arguments(world, out, tp, "checkpoint.every=2", "checkpoint.keep=9", steps=steps)

    def submit(self, *options: str) -> str:
        self.job = self.slurm.submit(*LAYOUTS[self.layout], f"--output={self.log}", *options, "slurm/tiny.sh",
                                     *self.settings, cwd=ROOT)
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
        return [json.loads(line) for line in (self.out / "attempts.jsonl").read_text().splitlines()]


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


def test_two_nodes_of_two_tasks_continue_bit_for_bit_after_usr1(slurm, world, tmp_path):
    whole, run = (Run(slurm, world, tmp_path / name, "2x2") for name in ("whole", "cut"))
    whole.submit()
    whole.completes()
    run.submit()
    run.wait_for_step(4)
    slurm.run("scancel", "--signal=USR1", run.job)
    run.wait("PENDING")
    assert 4 <= run.steps_done() < STEPS, "the signal came too late to prove anything"
    run.completes()
    assert_equal(run, whole)
    assert [a["chain"] for a in run.attempts()] == [run.job] * 2


def test_preempted_by_a_higher_partition(slurm, run, whole):
    run.submit()
    run.wait_for_step(4)
    urgent = slurm.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    run.wait("PENDING")
    assert slurm.wait(urgent, {"COMPLETED"}, 60)
    run.completes()
    assert_equal(run, whole)
    assert run.attempts()[1]["step"] >= 4, "what was done in the grace time was saved"


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
    """Slurm looks at limits twice a minute, and its signal may come a minute early: two minutes, cut in the second."""
    run = Run(slurm, world, tmp_path / "run", "2x1", steps=100)
    run.submit("--time=2", "--signal=USR1@20")
    run.wait_for_step(1)
    run.wait("PENDING", timeout=150)
    first = run.steps_done()
    assert 0 < first < 300
    until(lambda: run.steps_done() > first, 120, run.text)
    slurm.run("scancel", run.job)
    assert [r["step"] for r in run.records()] == list(range(1, len(run.records()) + 1))
    assert run.attempts()[1]["step"] == first, "nothing that was done is repeated"


def test_a_job_that_never_gets_to_a_step_gives_up(slurm, run):
    """Stopped again and again near its time limit, before its first step is done: requeued three times, then no
    more."""
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
    assert time.monotonic() - began < 15
    run.submit()
    run.completes()
    assert_equal(run, whole)


def test_where_requeueing_is_refused_another_job_continues(slurm, run, whole):
    run.submit("--no-requeue", "--job-name=norequeue")
    run.wait_for_step(4)
    slurm.run("scancel", "--signal=USR1", run.job)
    run.wait("COMPLETED", "FAILED")
    (after,) = {line.split()[-3] for line in run.text().splitlines() if "may not be requeued" in line}
    first, run.job = run.job, after
    run.completes()
    assert_equal(run, whole)
    assert [a["chain"] for a in run.attempts()] == [first] * 2
    assert len(list((run.out / "snapshots").iterdir())) == 1, "it runs what was submitted first"


def test_a_layout_that_needs_more_tasks_is_refused_within_a_minute(slurm, run):
    began = time.monotonic()
    run.settings.append("parallel.pp=4")
    run.submit()
    assert run.wait("FAILED", "COMPLETED", timeout=60) == "FAILED"
    assert "need a multiple of 4 processes, but 2 were started" in run.text() and not run.out.exists()
    assert time.monotonic() - began < 60


def test_the_pre_flight_names_a_node_that_does_not_see_the_run(slurm, run):
    """A folder that each node mounts for itself, as a forgotten mount would be: /dev/shm of a private namespace."""
    began, old = time.monotonic(), next(s for s in run.settings if s.startswith("output_dir="))
    private = Path("/run/avatar-preflight-test")
    private.mkdir(exist_ok=True)
    namespaces = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[:1] == ["slurmd"] and command[-1] in ("n1", "n2", "n3", "n4"):
            namespaces[command[-1]] = process.pid
    mounted = []
    try:
        for name in ("n2", "n3", "n4"):
            slurm.run("nsenter", f"--mount=/proc/{namespaces[name]}/ns/mnt", "mount", "-t", "tmpfs", "none", private)
            mounted.append(name)
        run.settings[run.settings.index(old)] = f"output_dir={private / 'run'}"
        run.submit("--nodelist=n1,n2")
        assert run.wait("FAILED", "COMPLETED", timeout=90) == "FAILED"
        assert "pre-flight on n2" in run.text() and "all nodes share" in run.text()
        assert time.monotonic() - began < 60
    finally:
        for name in mounted:
            slurm.run("nsenter", f"--mount=/proc/{namespaces[name]}/ns/mnt", "umount", private)
        slurm.run("rm", "-rf", private)
