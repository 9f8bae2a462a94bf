"""RUN/attempts.jsonl: every start of a run, and the end of restarts that get nowhere."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any


class NoProgress(RuntimeError):
    """A job was restarted again and again without reaching a later checkpoint."""


def begin(folder: Path, step: int, limit: int, changed: dict[str, Any] | None = None) -> None:
    """Note an attempt that starts at global step `step`, and which settings `changed`; called by rank 0 alone.

    Raises NoProgress where `limit` attempts of the same chain of automatic restarts (AVATAR_CHAIN, else the Slurm job)
    in a row have started at this step already. What a user starts again by hand is never refused.
    """
    path = folder / "attempts.jsonl"
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    chain = os.environ.get("AVATAR_CHAIN") or os.environ.get("SLURM_JOB_ID")
    stalled = 0
    for attempt in reversed(earlier):
        if chain is None or (attempt["chain"], attempt["step"]) != (chain, step):
            break
        stalled += 1
    if stalled >= limit:
        raise NoProgress(
            f"job {chain} was started {stalled} times at step {step} of {folder} and never saved a later one. Its logs "
            "say how each attempt ended. Mend the cause (a time limit shorter than checkpoint.every steps, a sample, a "
            "node) and submit again: a new job starts counting anew"
        )
    record = {"attempt": len(earlier) + 1, "step": step, "chain": chain, "host": socket.gethostname(),
              "time": round(time.time(), 3), **({"changed": changed} if changed else {})}  # fmt: skip
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
