"""A rank of the fault suite: the trainer as it is, with a signal sent to it in a chosen phase.

Everything here wraps from outside; the product has no hook for it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

TIMED = {"decode": "decode", "generate": "generation", "reward": "reward", "update": "update"}  # Timer's name: ours
PHASES = (*TIMED.values(), "replay append", "checkpoint write", "rename")


@dataclass(frozen=True)
class Strike:
    """Send `signal` to rank `rank` at the `occurrence`-th time since its start that `phase` begins, `delay` seconds
    into it; a negative delay strikes when it ends."""

    phase: str
    signal: str
    rank: int
    occurrence: int
    delay: float


class Striker:
    """Counts phases, strikes once, and notes in which phase the process really was."""

    def __init__(self, strike: Strike | None, note: Path) -> None:
        self.strike, self.note = strike, note
        self.inside: list[str] = []
        self.seen = 0

    @contextmanager
    def phase(self, name: str):
        self.inside.append(name)
        planned = self.strike
        due = planned is not None and planned.phase == name
        self.seen += due
        hit = due and self.seen == planned.occurrence
        if hit and planned.delay >= 0:
            threading.Timer(planned.delay, self.fire).start() if planned.delay else self.fire()
        try:
            yield
            if hit and planned.delay < 0:
                self.fire()
        finally:
            self.inside.remove(name)

    def wrap(self, owner: object, name: str, phase: str) -> None:
        original: Callable = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            with self.phase(phase):
                return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def fire(self) -> None:
        if self.strike is None:
            return
        # The innermost phase of ours; a checkpoint may be written beside any other.
        real = self.strike.phase if self.strike.phase in self.inside else (self.inside or ["between"])[-1]
        record = {**asdict(self.strike), "real": real, "time": time.time()}
        self.strike = None
        with open(self.note, "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.Signals[record["signal"]])


def run(arguments: list[str], environment: dict[str, str], strike: Strike | None, note: str, log: str) -> None:
    """The rank's whole life; ends the process with the trainer's exit status."""
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from megatron_avatar import train
    from megatron_avatar.resilience import checkpoint
    from megatron_avatar.rl.replay.buffer import ReplayBuffer
    from megatron_avatar.training import telemetry

    mine = strike if strike is not None and strike.rank == int(environment.get("RANK", 0)) else None
    striker = Striker(mine, Path(note))
    timer = telemetry.Timer.__call__

    @contextmanager
    def timed(self, name: str):
        with timer(self, name):
            if name not in TIMED:
                yield
                return
            with striker.phase(TIMED[name]):
                yield

    telemetry.Timer.__call__ = timed
    striker.wrap(ReplayBuffer, "append", "replay append")
    striker.wrap(checkpoint, "_write_sharded", "checkpoint write")
    striker.wrap(checkpoint, "_publish", "rename")
    train.leave_on_signals()
    status = train.main(arguments)
    sys.stdout.flush()
    os._exit(status)
