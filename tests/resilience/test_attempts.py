"""Restarts that get nowhere come to an end; a user's own never do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_avatar.resilience import ended
from megatron_avatar.resilience.attempts import NoProgress, begin, excuse, read


@pytest.fixture
def job(monkeypatch):
    monkeypatch.delenv("AVATAR_CHAIN", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    return monkeypatch


def test_a_job_that_gets_no_further_gives_up(job, tmp_path):
    for step in (0, 10, 10, 10):
        begin(tmp_path, step, limit=3)
    with pytest.raises(NoProgress, match="job 41 was started 3 times at step 10"):
        begin(tmp_path, 10, limit=3)
    begin(tmp_path, 20, limit=3)  # further than before
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 0), (2, 10), (3, 10), (4, 10), (5, 20)]


def test_a_new_job_starts_counting_anew_and_a_resubmitted_one_does_not(job, tmp_path):
    for _ in range(3):
        begin(tmp_path, 5, limit=3)
    job.setenv("SLURM_JOB_ID", "42")
    begin(tmp_path, 5, limit=3)
    job.setenv("AVATAR_CHAIN", "42")  # what takes a job's place where it may not be requeued
    for number in ("43", "44"):
        job.setenv("SLURM_JOB_ID", number)
        begin(tmp_path, 5, limit=3)
    with pytest.raises(NoProgress, match="job 42"):
        begin(tmp_path, 5, limit=3)


def test_starts_by_hand_are_never_refused(job, tmp_path):
    job.delenv("SLURM_JOB_ID")
    for _ in range(9):
        begin(tmp_path, 0, limit=1, changed={"seed": (0, 1)})
    assert json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])["changed"] == {"seed": [0, 1]}


def test_what_ended_a_run_from_outside_is_no_lack_of_progress(job, tmp_path):
    for _ in range(5):
        begin(tmp_path, 4, limit=3, until=1000.0)
        excuse(tmp_path, 999.0)
    for _ in range(3):
        begin(tmp_path, 4, limit=3, until=1000.0)
        excuse(tmp_path, 1001.0)  # it had its time
    with pytest.raises(NoProgress, match="was started 3 times at step 4"):
        begin(tmp_path, 4, limit=3)
    assert [r["attempt"] for r in read(tmp_path) if "step" in r] == list(range(1, 9))
    begin(tmp_path, 5, limit=3)
    excuse(tmp_path, 0.0)
    begin(tmp_path, 5, limit=3, until=float("inf"))
    excuse(tmp_path, 1e9)
    assert [r["excused"] for r in read(tmp_path) if "excused" in r] == [1, 2, 3, 4, 5, 10], "no limit, no excuse needed"


TORN = [b'{"attempt": 2, "st', b'{"attempt": 2, "step": 0, "chain": "41"}', b"\xff\x00", b"7\n"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_blocks_nothing(job, tmp_path, torn):
    begin(tmp_path, 0, limit=3)
    with open(tmp_path / "attempts.jsonl", "ab") as file:
        file.write(torn)
    begin(tmp_path, 5, limit=3)
    assert [r["step"] for r in read(tmp_path)][-1] == 5 and read(tmp_path)[0]["step"] == 0
    assert len(read(tmp_path)) == 2 + torn.endswith(b"}")


def test_a_sudden_end_leaves_the_moment_of_its_notice(tmp_path, monkeypatch):
    """As where Slurm kills all before the state is saved: the next start reads when the ranks were told."""
    prefix = str(tmp_path / ".ended-7")
    monkeypatch.setenv("AVATAR_ENDED", prefix)
    assert ended.noticed(prefix) is None and ended.tell(ended.NOTICED)
    ended.tell(ended.HUNG)
    os.utime(f"{prefix}-{ended.NOTICED}", (1000, 1000))
    assert ended.noticed(prefix) == 1000 and ended.told(prefix, 9) == ended.HUNG
    ended.forget(prefix)
    assert ended.noticed(prefix) is None and ended.told(prefix, 9) == 9 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["sys.exit(2)", "raise KeyError('gone')"])
def test_below_srun_the_last_words_come_before_the_end_which_stands(tmp_path, end):
    """srun ends a step at its first task that fails, with a signal to all, and drops what that task has just said."""
    code = ("import sys; from megatron_avatar.resilience import ended; ended.leave_on_signals(); "
            f"print('error: why', file=sys.stderr, flush=True); {end}")  # fmt: skip
    environment = {**os.environ, "SLURM_STEP_ID": "0", "AVATAR_ENDED": str(tmp_path / "ended")}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr.readline() == "error: why\n"
        if "raise" in end:
            assert any("KeyError" in line for line in iter(child.stderr.readline, "")), "its traceback, too"
        said = time.monotonic()
        time.sleep(0.2 * ended.HEARD_S)
        child.terminate()
        assert child.wait() == (1 if "raise" in end else 2) and not list(tmp_path.iterdir()), "nobody told it to leave"
        assert time.monotonic() - said > 0.5 * ended.HEARD_S


def test_elsewhere_nobody_waits(job):
    waits: list[float] = []
    job.setattr(ended.time, "sleep", waits.append)
    job.delenv("SLURM_STEP_ID", raising=False)
    ended.be_heard()
    assert not waits
    job.setenv("SLURM_STEP_ID", "0")
    ended.be_heard()
    assert waits == [ended.HEARD_S]
