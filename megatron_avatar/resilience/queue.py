"""What Slurm says of jobs, asked with patience: a controller that is out of reach for minutes ends no run.

    python -m megatron_avatar.resilience.queue     put this job into the queue again, unless Slurm has decided already

Needs nothing but the standard library: a job's batch shell asks before anything else is imported.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

ANSWER_S = 60.0  # for one answer
PATIENCE_S = 1800.0  # with a controller that is out of reach
LONGEST_PAUSE_S = 30.0
UNEXPLAINED = 3  # tries of a command that fails without saying why
# A busy or restarting controller, a network or munge in trouble; any other words are Slurm's answer.
OUT_OF_REACH = re.compile(
    r"timed out|time-?out|unable to contact|connection|zero bytes|not responding|temporar|try again|munge|"
    r"unable to establish|communicat|unexpected message|no route to host|network is unreachable",
    re.IGNORECASE,
)
# States of a job that still has, or will have again, processes of its own.
ALIVE = (
    "PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RUNNING COMPLETING CONFIGURING SUSPENDED STOPPED SIGNALING "
    "STAGE_OUT RESIZING"
).split()
WAITING = ALIVE[:5]
# Of these a shell inside of a job says nothing about the job that it submits, or the process that it starts.
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")


class SlurmSilent(OSError):
    """Slurm gave no answer for as long as was waited."""


class SlurmRefused(ValueError):
    """Slurm answered no; the message is its own."""


def ask(
    *command: str, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S, stdin: str | None = None
) -> str:
    """Output of one of Slurm's commands.

    Raises SlurmRefused with Slurm's own reason, SlurmSilent where there is none after `patience_s` seconds.
    """
    end, pause, unexplained, told = time.monotonic() + patience_s, 1.0, 0, patience_s == 0
    while True:
        reason = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=answer_s, input=stdin, env=outside())
            if done.returncode == 0:
                return done.stdout
            reason = (done.stderr.strip().splitlines() or [""])[-1]
            if reason and not OUT_OF_REACH.search(done.stderr):
                raise SlurmRefused(reason)
        except subprocess.TimeoutExpired:
            reason = f"no answer within {answer_s:.0f} s"
        except FileNotFoundError:
            raise SlurmSilent(f"{command[0]} is not on this machine") from None
        unexplained += not reason
        if time.monotonic() + pause > end or unexplained >= UNEXPLAINED:
            raise SlurmSilent(f"{command[0]}: {reason or 'it fails without a reason'}")
        if not told:
            told = True
            print(f"{command[0]}: {reason or 'failed'}; asked again for up to {patience_s / 60:.0f} minutes",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def outside(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what belongs to the job that this process may be in.

    Sizes of an interactive job would be taken for the new job's.
    """
    found = os.environ if environment is None else environment
    return {k: v for k, v in found.items() if not k.startswith(("SLURM_", "SLURMD_", "PMI")) or k in KEPT}


def tasks_per_node() -> int:
    """Of this process's job, the same on all of its nodes. ValueError where it isn't."""
    told, counted = os.environ.get("SLURM_NTASKS_PER_NODE", ""), os.environ.get("SLURM_TASKS_PER_NODE", "")
    match = re.fullmatch(r"(\d+)(?:\(x\d+\))?", told) or re.fullmatch(r"(\d+)(?:\(x\d+\))?", counted)
    if match is None:
        what = f"its nodes have {counted} tasks" if counted else "it says nothing of tasks"
        raise ValueError(f"the job doesn't say how many processes a node gets ({what}): submit it with "
                         "--ntasks-per-node=N, one process a GPU")  # fmt: skip
    return int(match[1])


def own_job() -> str:
    """How Slurm calls this process's job, empty outside of one. A task of an array has a number of its own, and one of
    them has the array's: by that all of them would be meant."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def state(job: str, patience_s: float = PATIENCE_S) -> str:
    """State of a job that Slurm has in its queue (RUNNING, PENDING ...), empty for any other."""
    try:
        found = ask("squeue", "--noheader", f"--jobs={job}", "--format=%T", patience_s=patience_s)
    except SlurmRefused as error:
        if "invalid job id" in str(error).lower():
            return ""
        raise
    return (found.split() or [""])[0]


def requeue(job: str) -> bool:
    """Put a job into the queue again; False where Slurm has decided already: a cancelled one stays cancelled, one that
    lost a node or was preempted is queued again by Slurm itself. Raises SlurmRefused, SlurmSilent."""
    if state(job) != "RUNNING":
        return False
    ask("scontrol", "requeue", job)
    return True


def seconds_left(job: str, patience_s: float = PATIENCE_S) -> float | None:
    """Until the job's time limit, infinite where it has none; None where nobody says."""
    try:
        found = ask("squeue", "--noheader", f"--jobs={job}", "--format=%L", patience_s=patience_s).strip()
    except (SlurmRefused, SlurmSilent):
        return None
    return seconds(found)


def seconds(text: str) -> float | None:
    """Of a time as Slurm writes it (1-00:00:00, 30:00), infinite where it is none; None for other words."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # Slurm's last word to all processes
        signal.signal(number, signal.SIG_IGN)
    try:
        requeue(own_job())
    except (SlurmRefused, SlurmSilent) as problem:
        sys.exit(f"error: job {own_job()} can't be queued again ({problem}): submit it again")
