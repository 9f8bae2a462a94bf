"""The trainer with something happening at a chosen moment: train("step_3", [key=value ...])"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

from megatron_avatar import train as entry
from megatron_avatar.resilience import checkpoint, room
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.training import loop
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import Optimization


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before(owner: object, name: str, action) -> None:
    """Call `action` before the function `name` of `owner` runs."""
    original = getattr(owner, name)

    def disturbed(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    setattr(owner, name, disturbed)


def hang() -> None:
    if os.environ.get("RANK", "0") == "0":
        time.sleep(600)


def terminate_before(step: int) -> None:
    """A stop signal once that step has begun, and is dropped."""
    original = loop.Run.take_step

    def take_step(self):
        if self.step == step - 1:
            terminate()
        return original(self)

    loop.Run.take_step = take_step


def kill_before(step: int) -> None:
    """SIGKILL at that step's beginning, with all checkpoints so far on the disk."""
    original = loop.Run.take_step

    def take_step(self):
        if self.step == step - 1:
            self.saver.finish()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    loop.Run.take_step = take_step


def overflow_once() -> None:
    """A gradient of the first update is beyond any number."""
    original = Optimization.step

    def step(self, **kwargs):
        if self._scheduler.num_steps == 1:
            next(p for p in self.model.parameters() if p.requires_grad).main_grad.view(-1)[0] = float("inf")
        return original(self, **kwargs)

    Optimization.step = step


PLACES = {"evaluation": (loop, "evaluate"), "reward": (loop, "make_groups"), "update": (Learner, "_attach")}


def slow_write(folder: Path) -> None:
    """Each checkpoint takes two seconds more to write; what was written when goes to FOLDER/writes.json."""
    original, writes = checkpoint._write_sharded, []

    def write(*args):
        began = time.time()
        time.sleep(2)
        original(*args)
        writes.append((began, time.time()))
        (folder / "writes.json").write_text(json.dumps(writes))

    checkpoint._write_sharded = write


def disturb(what: str, arguments: list[str]) -> None:
    if what == "slow_write":
        slow_write(Path(next(a for a in arguments if a.startswith("output_dir=")).partition("=")[2]))
    elif what.startswith("step_"):
        terminate_before(int(what.removeprefix("step_")))
    elif what.startswith("killed_at_"):
        kill_before(int(what.removeprefix("killed_at_")))
    elif what == "overflow":
        overflow_once()
    elif what == "short_memory":
        room.available = lambda: 0
    elif what == "hang":
        before(loop, "make_groups", hang)
    elif what == "terminate_rank_1":  # in generation, which rank 0 makes long
        if os.environ["RANK"] == "1":
            before(loop, "generate", lambda: threading.Timer(1, terminate).start())
        else:
            before(StopSignal, "__call__", lambda: time.sleep(0.5))
    else:
        before(*PLACES[what], terminate)


def train(what: str, arguments: list[str]) -> int:
    """The trainer's entry point; with nothing (`what` is empty) it is the product's own."""
    for one in what.split(",") if what else ():
        disturb(one, arguments)
    entry.leave_on_signals()
    return entry.main(arguments)
