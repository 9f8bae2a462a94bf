"""Two jobs or processes, one folder: one of them works on it, whatever ended before."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_avatar.resilience import lock, queue
from megatron_avatar.resilience.lock import FOLDER, Owner, take


@pytest.fixture
def states(monkeypatch) -> dict[str, str]:
    """What squeue says: job -> state."""
    states: dict[str, str] = {}
    monkeypatch.setattr(queue, "state", lambda job: states.get(job, ""))
    monkeypatch.setattr(lock, "LEAVING_S", 0.0)
    return states


def owner_in(run) -> dict:
    (path,) = (run / FOLDER).iterdir()
    return json.loads(path.read_text())


def job(name: str, restart: int = 0) -> Owner:
    return Owner(name, str(restart), "gold")


def test_another_job_is_refused_while_the_first_is_alive(states, tmp_path):
    states["7"] = "RUNNING"
    take(tmp_path, job("7"))
    with pytest.raises(ValueError, match="job 7 works on this run: wait for its end, or choose another output_dir"):
        take(tmp_path, job("8"))
    states["7"] = "PENDING"  # requeued: the run is its
    with pytest.raises(ValueError, match="job 7 is in the queue to continue this run: wait for it, or scancel it"):
        take(tmp_path, job("8"))
    states["7"] = "COMPLETING"
    with pytest.raises(ValueError, match="is leaving"):
        take(tmp_path, job("8"))
    assert owner_in(tmp_path)["job"] == "7"
    del states["7"]  # it crashed and left its lock
    take(tmp_path, job("8"))
    assert owner_in(tmp_path)["job"] == "8"


def test_a_requeue_and_a_successor_are_never_refused(states, tmp_path):
    states |= {"7": "RUNNING", "9": "RUNNING"}
    take(tmp_path, job("7"))
    take(tmp_path, job("7", restart=1))
    take(tmp_path, replace(job("7", restart=2), host="silver"))
    take(tmp_path, job("9"), predecessor="7")
    with pytest.raises(ValueError, match="job 9 works"):
        take(tmp_path, job("10"), predecessor="7")  # the same job, submitted twice by accident
    with pytest.raises(ValueError, match="job 9 works"):
        take(tmp_path, job("8"), predecessor="")


def test_tasks_of_one_array_are_told_apart(states, tmp_path):
    states |= {"7_1": "RUNNING", "7_2": "RUNNING"}
    take(tmp_path, job("7_1"))
    take(tmp_path, job("7_1", restart=1))
    with pytest.raises(ValueError, match="job 7_1 works"):
        take(tmp_path, job("7_2"))


def test_handed_over_and_given_back(states, tmp_path):
    states |= {"7": "RUNNING", "9": "PENDING"}
    take(tmp_path, job("7"))
    lock.hand_over(tmp_path, job("7"), job("9"))
    with pytest.raises(ValueError, match="job 9 is in the queue"):
        take(tmp_path, job("8"))
    take(tmp_path, job("9"))
    lock.release(tmp_path, job("7"))  # no longer its own to give
    assert owner_in(tmp_path)["job"] == "9"
    lock.release(tmp_path, job("9"))
    take(tmp_path, job("8"))


def test_a_process_counts_as_long_as_it_lives(states, tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        own = lock.process_owner()
        other = replace(own, pid=sleeper.pid, started=lock.psutil.Process(sleeper.pid).create_time())
        take(tmp_path, other)
        with pytest.raises(ValueError, match=f"process {sleeper.pid} works on this run"):
            take(tmp_path, own)
    finally:
        sleeper.kill()
        sleeper.wait()
    take(tmp_path, own)
    lock.release(tmp_path, own)
    take(tmp_path, replace(own, started=own.started - 3600))  # its number was given again
    take(tmp_path, own)


def test_a_process_on_another_host_is_judged_by_its_job(states, tmp_path):
    states["7"] = "RUNNING"
    far = Owner("7", "0", "far-away", 1234, 1.0)
    take(tmp_path, far)
    with pytest.raises(ValueError, match=r"job 7 \(process 1234 on far-away\) works on this run"):
        take(tmp_path, lock.process_owner())
    take(tmp_path, replace(far, host="elsewhere", restart="1"))  # Slurm started the job again
    del states["7"]
    take(tmp_path, lock.process_owner())
    lock.release(tmp_path, lock.process_owner())
    take(tmp_path, replace(far, job=""))
    with pytest.raises(ValueError, match=f"on far-away works .* remove the folder {FOLDER} in it"):
        take(tmp_path, lock.process_owner())


def test_where_slurm_is_silent_the_user_is_told_what_to_do(states, tmp_path, monkeypatch):
    take(tmp_path, job("7"))

    def silent(name):
        raise queue.SlurmSilent("squeue: Socket timed out")

    monkeypatch.setattr(queue, "state", silent)
    with pytest.raises(queue.SlurmSilent, match="Socket timed out. Job 7 was the last .* remove the folder .lock"):
        take(tmp_path, job("8"))
    with pytest.raises(queue.SlurmSilent, match="try again once Slurm answers"):
        lock.worker(tmp_path)


def test_a_torn_lock_is_nobodys(states, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TORN_S", 0.0)
    take(tmp_path, job("7"))
    (path,) = (tmp_path / FOLDER).iterdir()
    (tmp_path / FOLDER / f"{int(path.name) + 1:08d}").write_text('{"job": "1')
    take(tmp_path, job("8"))
    assert owner_in(tmp_path)["job"] == "8"


def _race(run, start, results, me: int) -> None:
    own = lock.process_owner()
    start.wait()
    try:
        take(run, own)
        results.put(me)
        start.wait()  # alive until all have tried
    except ValueError:
        results.put(-1)
        start.wait()


def test_of_many_that_begin_together_one_gets_it(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    take(tmp_path, Owner("", "", os.uname().nodename, 2**22 + 1, 1.0))  # left by a crash
    start, results = context.Barrier(8), context.Queue()
    children = [context.Process(target=_race, args=(tmp_path, start, results, k)) for k in range(8)]
    for child in children:
        child.start()
    answers = [results.get(timeout=30) for _ in children]
    for child in children:
        child.join(30)
    assert sum(answer >= 0 for answer in answers) == 1, answers


def test_a_run_that_never_began_leaves_nothing_and_takes_nothing_of_anothers(states, tmp_path):
    run, owner = tmp_path / "run", job("7")
    states["7"] = "RUNNING"

    def refused(owner):
        with pytest.raises(ValueError, match="no such reward"), lock.withdrawn_if_refused(run, owner):
            raise ValueError("no such reward")

    take(run, owner)
    refused(job("8"))
    refused(None)
    assert owner_in(run)["job"] == "7"
    refused(owner)
    assert not run.exists()
    take(run, owner)
    (run / "config.yaml").touch()
    refused(owner)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    take(run, job("8"))
    with lock.withdrawn_if_refused(run, job("8")):
        pass
    assert owner_in(run)["job"] == "8"
