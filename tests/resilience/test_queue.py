"""Slurm's commands, where the controller is out of reach for a while: fakes on PATH that count, and a clock of ours."""

from __future__ import annotations

import subprocess

import pytest

from megatron_avatar.resilience import queue
from megatron_avatar.resilience.queue import SlurmRefused, SlurmSilent, ask


@pytest.mark.parametrize("command", ["squeue", "scontrol", "sbatch"])
@pytest.mark.parametrize(("fails", "seconds"), [(0, 0), (1, 1), (2, 3), (14, 301)])
def test_a_controller_that_is_out_of_reach_is_asked_again(fake_slurm, command, fails, seconds):
    count = fake_slurm.fake(command, says="RUNNING", fails=fails)
    assert ask(command, "--noheader") == "RUNNING\n"
    assert int(count.read_text()) == fails + 1 and fake_slurm.now == seconds
    assert fake_slurm.now <= 5 * 60 + 1, "five minutes at most, of thirty"


def test_patience_ends_with_the_last_reason(fake_slurm):
    fake_slurm.fake("squeue", fails=10**6)
    with pytest.raises(SlurmSilent, match="squeue: .*Socket timed out"):
        ask("squeue")
    assert queue.PATIENCE_S - queue.LONGEST_PAUSE_S <= fake_slurm.now <= queue.PATIENCE_S
    assert queue.seconds_left("7", patience_s=0) is None


def test_slurms_own_no_is_taken_at_once(fake_slurm):
    fake_slurm.fake("scontrol", fails=10**6, reason="Requested operation is presently disabled for job 7")
    with pytest.raises(SlurmRefused, match="presently disabled"):
        ask("scontrol", "requeue", "7")
    fake_slurm.fake("squeue", fails=10**6, reason="slurm_load_jobs error: Invalid job id specified")
    assert queue.state("7") == "" and fake_slurm.now == 0


def test_what_fails_without_a_word_or_is_not_there(fake_slurm):
    count = fake_slurm.fake("squeue", fails=10**6, reason="")
    with pytest.raises(SlurmSilent, match="fails without a reason"):
        ask("squeue")
    assert int(count.read_text()) == 3 and fake_slurm.now < 5
    with pytest.raises(SlurmSilent, match="no-such-command is not on this machine"):
        ask("no-such-command")


def test_an_answer_that_never_comes_is_none(fake_slurm, monkeypatch):
    answers = iter([subprocess.TimeoutExpired("squeue", 60), subprocess.CompletedProcess([], 0, "PENDING\n", "")])

    def run(*_, **__):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(queue.subprocess, "run", run)
    assert queue.state("7") == "PENDING"


@pytest.mark.parametrize(("said", "seconds"), [("59:01", 3541), ("2:00:00", 7200), ("1-00:00:10", 86410), ("0:00", 0),
                                               ("UNLIMITED", float("inf")), ("INVALID", None), ("", None)])
def test_time_left(fake_slurm, said, seconds):
    fake_slurm.fake("squeue", says=said)
    assert queue.seconds_left("7") == seconds


def test_a_task_of_an_array_is_never_taken_for_the_array(monkeypatch, fake_slurm):
    """The array's last task has the array's own number: by it Slurm would requeue, and list, all of them."""
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    assert queue.own_job() == "40"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert queue.own_job() == "40_2"
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    environment = queue.outside()
    assert environment["SLURM_CONF"] == "/etc/slurm.conf"
    assert [name for name in environment if name.startswith("SLURM_")] == ["SLURM_CONF"]


@pytest.mark.parametrize(("told", "counted", "tasks"), [("4", "4(x2)", 4), ("", "8(x2)", 8), ("", "2", 2)])
def test_tasks_a_node(monkeypatch, told, counted, tasks):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", told)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", counted)
    assert queue.tasks_per_node() == tasks
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    for uneven in ("4,2", ""):
        monkeypatch.setenv("SLURM_TASKS_PER_NODE", uneven)
        with pytest.raises(ValueError, match="submit it with --ntasks-per-node=N"):
            queue.tasks_per_node()
