"""RUN/attempts.jsonl: every start of a run, and the end of restarts that get nowhere."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the launcher reads this without torch
    from megatron_avatar.policy.backend import Backend

NEVER = 1e12


class NoProgress(RuntimeError):
    """A job was restarted again and again without reaching a later checkpoint."""


def begin(
    folder: Path, step: int, limit: int, changed: dict[str, Any] | None = None, until: float = 0.0
) -> None:
    """Note an attempt that starts at global step `step`, which settings `changed`, and the moment (Unix seconds)
    `until` which a stop isn't its time limit's; called by rank 0 alone.

    Raises NoProgress where `limit` attempts of the same chain of automatic restarts (AVATAR_CHAIN, else the Slurm job)
    in a row have started at this step already; those that are excused don't count. What a user starts again by hand is
    never refused.
    """
    records = read(folder)
    earlier, excused = [r for r in records if "step" in r], {r.get("excused") for r in records}
    chain = os.environ.get("AVATAR_CHAIN") or os.environ.get("SLURM_JOB_ID")
    stalled = 0
    for attempt in reversed(earlier):
        if chain is None or (attempt["chain"], attempt["step"]) != (chain, step):
            break
        stalled += attempt["attempt"] not in excused
    if stalled >= limit:
        raise NoProgress(
            f"job {chain} was started {stalled} times at step {step} of {folder} and never saved a later one. Its logs "
            "say how each attempt ended. Mend the cause (a time limit shorter than checkpoint.every steps, a sample, a "
            "node) and submit again: a new job starts counting anew"
        )
    record = {"attempt": len(earlier) + 1, "step": step, "chain": chain, "host": socket.gethostname(),
              "time": round(time.time(), 3), **({"until": round(min(until, NEVER))} if until else {}),
              **({"changed": changed} if changed else {})}  # fmt: skip
    _append(folder, record)


def begin_on_all(folder: Path, step: int, limit: int, changed: dict[str, Any], backend: Backend) -> None:
    """`begin` on rank 0, unless the job's launcher has noted this start; NoProgress on all ranks."""
    reason = None
    if backend.rank == 0 and "AVATAR_ATTEMPT" not in os.environ:
        try:
            begin(folder, step, limit, changed)
        except NoProgress as error:
            reason = str(error)
    if reason := backend.all_gather_object(reason)[0]:
        raise NoProgress(reason)


def excuse(folder: Path, when: float) -> None:
    """The latest attempt was told to stop at `when` (Unix seconds). Where that can't have been its time limit, but a
    preemption or a person, it is no sign of a run that gets nowhere, and noted so."""
    starts = [r for r in read(folder) if "step" in r]
    if starts and when < starts[-1].get("until", 0):
        _append(folder, {"excused": starts[-1]["attempt"], "why": "stopped from outside", "time": round(when, 3)})


def read(folder: Path) -> list[dict[str, Any]]:
    """The whole records; a line that a crash or a full disk cut off is passed over."""
    path, records = folder / "attempts.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and ({"attempt", "step", "chain"} <= record.keys() or "excused" in record):
            records.append(record)
    return records


def _append(folder: Path, record: dict[str, Any]) -> None:
    with open(folder / "attempts.jsonl", "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
