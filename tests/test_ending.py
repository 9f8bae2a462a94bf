"""How a job's last process decides: done, over or to be continued, with a Slurm that answers late or not at all."""

from __future__ import annotations

import pytest

from megatron_avatar.resilience import attempts, ended, lock, queue
from megatron_avatar.resilience.lock import job_owner, take
from slurm import ending


@pytest.fixture
def job(tmp_path, fake_slurm, monkeypatch):
    """Ends job 40 with srun's status and what its ranks told: (exit status, what scontrol was asked)."""
    run = tmp_path / "run"
    for name, value in {"SLURM_JOB_ID": "40", "AVATAR_ENDED": str(run / ".ended-40")}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SUBMITIT_EXECUTOR", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    fake_slurm.fake("squeue", says="RUNNING")
    fake_slurm.fake("scontrol")
    run.mkdir()
    take(run, job_owner())
    attempts.begin(run, 0, 3)

    def end(status: int, *tells: int, done: bool = False, log: str = "") -> tuple[int, list[str]]:
        for number in tells:
            ended.tell(number)
        if done:
            (run / "done.json").touch()
        (tmp_path / "log").write_text(log)
        return ending.main(run, status, tmp_path / "log", []), fake_slurm.calls("scontrol")

    end.run = run
    return end


REQUEUED = ["requeue 40"]


@pytest.mark.parametrize(("status", "tells", "exit_status", "calls"), [
    (0, (), 1, []),  # no rank failed, and nothing says that the run is done
    (1, (), 1, []),
    (2, (), 2, []),
    (137, (2, 74), 2, []),  # a rank refused its settings, and srun killed the others
    (137, (73, 75), 75, REQUEUED),
    (137, (73,), 137, []),  # told to stop, and killed before all was saved: the next start reads when
    (143, (74,), 75, REQUEUED),
    (1, (1, 74), 1, []),
    (75, (1, 74), 1, []),  # srun's is the highest: that of a rank that it stopped
    (0, (75,), 75, REQUEUED),
    (76, (76,), 75, REQUEUED),
])  # fmt: skip
def test_only_what_was_stopped_goes_on_by_itself(job, status, tells, exit_status, calls):
    assert job(status, *tells) == (exit_status, calls)
    assert not list(job.run.glob(".ended-*"))


@pytest.mark.parametrize("status", [0, 1, 75, 137])
@pytest.mark.parametrize("tells", [(), (75,), (2,), (1,)])
def test_status_0_is_the_runs_own_word(job, status, tells, capsys):
    assert job(status, *tells, done=True) == (0, [])
    assert ("on its way out something ended with status" in capsys.readouterr().err) == (status != 0)


def test_a_signal_before_python_could_answer_is_no_failure(job):
    assert job(138, log="0: x\nsrun: error: n1: task 0: User defined signal 1\n") == (75, REQUEUED)


@pytest.mark.parametrize(("told", "status", "means"), [
    ((), 138, 75), ((), 140, 75), ((1,), 138, 1), ((2,), 138, 2), ((74,), 138, 75), ((1,), 137, 137), ((), 137, 137),
    ((1, 74), 75, 1),
])  # fmt: skip
def test_a_command_that_was_noticed_while_it_failed_has_failed(tmp_path, monkeypatch, told, status, means):
    prefix = str(tmp_path / ".ended-x")
    monkeypatch.setenv("AVATAR_ENDED", prefix)
    for number in told:
        ended.tell(number)
    assert ended.settled(prefix, status) == means and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
@pytest.mark.parametrize("fails", [1, 2, 14])
def test_a_controller_out_of_reach_for_minutes_costs_nothing(job, fake_slurm, command, fails):
    """14 times: five minutes, by the pauses between."""
    fake_slurm.fake(command, says="RUNNING", fails=fails)
    assert job(75)[0] == 75 and fake_slurm.calls("scontrol")[-1:] == REQUEUED
    assert (fake_slurm.now >= 300) == (fails == 14)


def test_where_slurm_stays_silent_the_user_is_told_and_the_run_is_free(job, fake_slurm, capsys):
    fake_slurm.fake("scontrol", fails=10**6)
    assert job(75)[0] == 75 and fake_slurm.now >= queue.PATIENCE_S - queue.LONGEST_PAUSE_S
    assert "The state of job 40 is saved: submit it again" in capsys.readouterr().err
    assert lock.worker(job.run) == ""


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", ""])
def test_what_slurm_has_decided_stays(job, fake_slurm, state):
    """Cancelled, or requeued by Slurm itself: another requeue would be of somebody else's job."""
    fake_slurm.fake("squeue", says=state)
    assert job(75) == (75, [])


@pytest.mark.parametrize("fails", [0, 1, 14])
def test_a_job_that_may_not_be_requeued_is_submitted_once(job, fake_slurm, fails, capsys):
    fake_slurm.fake("scontrol", says="JobId=40 Requeue=0")
    program = fake_slurm.folder / "scontrol"
    program.write_text(program.read_text().replace("#!/bin/bash\n", """#!/bin/bash
[[ $1 != requeue ]] || { echo "Requested operation is presently disabled" >&2; exit 1; }
"""))
    fake_slurm.fake("sbatch", says="77", fails=fails)
    fake_slurm.fake("sacct")
    assert job(75)[0] == 75
    assert "job 40 may not be requeued: job 77 continues it" in capsys.readouterr().err
    assert len(fake_slurm.calls("sbatch")) == fails + 1 and "--no-requeue" in fake_slurm.calls("sbatch")[-1]
    fake_slurm.fake("squeue", says="PENDING")
    assert "job 77 is in the queue to continue this run" in lock.worker(job.run)
