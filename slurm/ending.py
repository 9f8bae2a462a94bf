"""Behind a job's last process: is the run done, is it to be continued, and how? Called by common.sh.

    python slurm/ending.py RUN STATUS LOG [key=value ...]

Exit status 0 means that RUN/done.json is there, and nothing else does. A run that was stopped with its state saved goes
back into the queue: under the same id where the cluster allows it, else as a new job of the same script, options and
snapshot, for which everything waits that waited for this one. Slurm may be out of reach for a while (queue.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from megatron_avatar.resilience import attempts, ended, lock, queue  # noqa: E402
from slurm import resubmit  # noqa: E402

LINKS = Path(".jobs")  # where a job was submitted: JOB -> its snapshot
KILLED_EARLY = "User defined signal"  # srun's word for a task that was signalled before Python could answer


def main(run: Path, status: int, log: Path, arguments: list[str]) -> int:
    """The job's exit status."""
    prefix = os.environ["AVATAR_ENDED"]
    if KILLED_EARLY in _srun_errors(log):
        ended.tell(ended.LEFT)
    means, when = ended.told(prefix, status), ended.noticed(prefix)
    ended.forget(prefix)
    if (run / "done.json").exists():
        if status:
            _say(f"warning: the run is complete; on its way out something ended with status {status}")
        return _over(run, 0)
    if means not in (ended.INTERRUPTED, ended.HUNG):
        if not means:
            _say(f"error: all processes ended without an error, but {run / 'done.json'} is not there")
        return _over(run, means or ended.FAILED)
    if means == ended.INTERRUPTED:
        attempts.excuse(run, when or time.time())
    return _continue(run, arguments)


def _continue(run: Path, arguments: list[str]) -> int:
    """Into the queue again, or another job in this one's place."""
    job = queue.own_job()
    try:
        queue.requeue(job)
        return ended.INTERRUPTED
    except queue.SlurmRefused as error:
        refusal = str(error)
    except queue.SlurmSilent as error:
        _say(f"error: {error}. The state of job {job} is saved: submit it again")
        return _over(run, ended.INTERRUPTED)
    if "SUBMITIT_EXECUTOR" in os.environ:  # its job is known by its id
        _say(f"error: job {job} may not be requeued ({refusal}); its state is saved: run sweep.py or reproduce.py "
             "again")  # fmt: skip
        return _over(run, ended.INTERRUPTED)
    try:
        new = resubmit.submit(job, run, arguments)
    except (queue.SlurmRefused, queue.SlurmSilent, OSError) as error:
        _say(f"error: job {job} can be neither requeued ({refusal}) nor resubmitted ({error}); its state is saved: "
             "submit it again")  # fmt: skip
        return _over(run, ended.INTERRUPTED)
    lock.hand_over(run, lock.job_owner(), lock.Owner(new))
    _say(f"job {job} may not be requeued: job {new} continues it")
    for line in resubmit.move_dependents(job, new):
        _say(line)
    return ended.INTERRUPTED


def _over(run: Path, status: int) -> int:
    """Nobody works on the run any more."""
    lock.release(run, lock.job_owner())
    with suppress(OSError):
        (LINKS / os.environ["SLURM_JOB_ID"]).unlink(missing_ok=True)
    return status


def _srun_errors(log: Path) -> str:
    try:
        with log.open(errors="replace") as lines:
            return "".join(line for line in lines if line.startswith("srun: error:"))
    except OSError:
        return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in ended.SIGNALS:  # Slurm's last word to all processes; the job has to be queued first
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
