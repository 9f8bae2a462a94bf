"""Processes for tests, forked from one that has imported everything: a rank costs a fork, not ten seconds of imports.

They are what the product's entry points are, up to the interpreter's start, which a few tests of real commands try.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

# The product asks for the modules of one kind of worker; what is asked for once the process runs comes too late.
PRELOADED = ["megatron_avatar.train", "megatron_avatar.training.loop", "megatron_avatar.rl.rewards.symbolic",
             "eval.prepare", "eval.run", "tests.policy.tiny"]  # fmt: skip
OF_THEIR_OWN = (0, 75, 76)  # done, stopped, hung: a rank that ends so ends by itself, and the others do too


def start_server() -> None:
    """Let the process of which all are forked begin to import."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def free_port() -> int:
    """A port that nobody has, below those that the system gives out by itself."""
    for number in range(100):
        port = 20_000 + (os.getpid() * 37 + time.monotonic_ns() // 1000 + number) % 12_000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@dataclass
class Done:
    """How processes ended; `stderr` is all that they said."""

    codes: list[int]
    said: list[str]

    @property
    def returncode(self) -> int:
        """As a launcher's: the first status that isn't 0."""
        return next((code for code in self.codes if code), 0)

    @property
    def stderr(self) -> str:
        return "".join(self.said)


class Ranks:
    """`ranks` processes that run function(*args), with the variables of torchrun where there are several."""

    def __init__(self, function: Callable[..., Any], *args: Any, ranks: int = 1, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        multiprocessing.set_forkserver_preload(PRELOADED)
        environment = {"OMP_NUM_THREADS": "1", **environment}
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = context.Process(target=_live, args=(function, args, environment | place, str(self._log(rank))))
            process.start()
            self.processes.append(process)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    @property
    def alive(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def wait(self, timeout: float) -> Done:
        """Wait for all of them; one that crashes ends the others, as with a launcher. AssertionError if too late."""
        end = time.monotonic() + timeout
        try:
            while alive := [p for p in self.processes if p.exitcode is None]:
                left = end - time.monotonic()
                assert left > 0, f"still running after {timeout} s:\n{self._said()[-8000:]}"
                connection.wait([p.sentinel for p in alive], left)
                if any(p.exitcode not in (None, *OF_THEIR_OWN) for p in self.processes):
                    break
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        logs = [self._log(rank).read_text() for rank in range(len(self.processes))]
        done = Done([p.exitcode for p in self.processes], logs)
        self._folder.cleanup()
        return done

    def _said(self) -> str:
        return "".join(self._log(rank).read_text() for rank in range(len(self.processes)) if self._log(rank).exists())


def launch(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 600) -> None:
    """Run function(*args) on several ranks with one thread each; what they said is the error's message."""
    done = Ranks(function, *args, ranks=ranks).wait(timeout)
    assert done.returncode == 0, done.stderr[-8000:]


def _live(function: Callable[..., Any], args: tuple, environment: dict[str, str], log: str) -> None:
    """The life of one process; its exit status is what the function returns, as an entry point's."""
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = function(*args)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    raise SystemExit(status or 0)
