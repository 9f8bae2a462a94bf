"""A rank that gives no sign of life ends the job with its last words, so that it can go on from its checkpoint.

A thread of every rank looks when its trainer last began a phase or asked for stop signals. Once no rank has given a
sign for the whole deadline (one alone may well wait for the others), all write their Python stacks to RUN/stacks, and
end with status HUNG. The same threads spread a stop signal that reached one rank alone. They talk through torch's
rendezvous store, which needs no training collective to be alive.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_avatar.policy.backend import Backend
from megatron_avatar.resilience.ended import HUNG, be_heard, tell
from megatron_avatar.resilience.stopping import StopSignal

TICK_S = 2.0
DUMP_S = 10.0  # the others' time to write their stacks, before the first exit makes the launcher kill them
MARGIN_S = 60.0  # after the deadline, where no Python thread runs any more

_watchdogs = itertools.count()


class Watchdog:
    """Watches this rank from its own thread, from `start` to `close`.

    `alive` gives the moment (time.monotonic) of the latest sign of life, `doing` says in words what goes on: phase,
    step, samples. After `deadline_s` without a sign of life of any rank the process ends.
    """

    def __init__(
        self, run_dir: Path, backend: Backend, stop: StopSignal, deadline_s: float, *, alive: Callable[[], float],
        doing: Callable[[], str],
    ) -> None:
        self._folder, self._backend, self._stop, self._deadline = run_dir / "stacks", backend, stop, deadline_s
        self._alive, self._doing, self._closed = alive, doing, threading.Event()
        self._told_to_stop = False
        self._store = _own_client(backend)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._closed.wait(min(TICK_S, self._deadline / 4)):
            # Should C code keep Python's lock, this thread too stands still: then the C library's own thread speaks.
            faulthandler.dump_traceback_later(self._deadline + MARGIN_S, exit=True)
            self._spread_stop()
            silent = time.monotonic() - max(self._alive(), self._began)
            self._set(f"alive {self._backend.rank}", str(time.time() - silent))
            if (silent > self._deadline and self._all_silent()) or self._has("hung"):
                self._end(silent)

    def _all_silent(self) -> bool:
        """Whether no rank's latest sign of life, in seconds of the nodes' clocks, is younger than the deadline."""
        limit = time.time() - self._deadline
        return not any(self._has(key) and self._store is not None and float(self._store.get(key)) > limit
                       for key in (f"alive {rank}" for rank in range(self._backend.world)))

    def _spread_stop(self) -> None:
        if self._stop.requested and not self._told_to_stop:
            self._told_to_stop = True
            self._set("stop", "")
        elif not self._told_to_stop and self._has("stop"):
            self._told_to_stop = True
            self._stop.requested = True

    def _end(self, silent: float) -> None:
        """All ranks come here within a tick: stacks, last words, and out."""
        first = silent > self._deadline and not self._has("hung")
        self._set("hung", "")
        rank = self._backend.rank
        words = f"rank {rank} on {socket.gethostname()}: {self._doing()}; no sign of life for {silent:.0f} s"
        print(f"HUNG: {words}. Stacks are in {self._folder}", file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"{self._stamp()}-rank_{rank:05d}.txt", "w") as file:
                file.write(f"{words}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"the stacks can't be written ({error}):", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        self._set(f"words {rank}", words)
        end = time.monotonic() + DUMP_S
        while time.monotonic() < end and not all(self._has(f"words {r}") for r in range(self._backend.world)):
            time.sleep(0.1)
        if first:
            missing = [r for r in range(self._backend.world) if not self._has(f"words {r}")]
            print(f"the job ends with status {HUNG}, to be continued from its checkpoint"
                  f"{f'; ranks {missing} gave no answer at all' if missing else ''}", file=sys.stderr, flush=True)
        tell(HUNG)
        be_heard()
        os._exit(HUNG)

    def _stamp(self) -> str:
        return time.strftime("%Y%m%d-%H%M")

    # The store's server is rank 0's, or torchrun's: where it is gone, each rank is on its own.

    def _has(self, key: str) -> bool:
        try:
            return self._store is not None and self._store.check([key])
        except RuntimeError:
            self._store = None
            return False

    def _set(self, key: str, value: str) -> None:
        try:
            if self._store is not None:
                self._store.set(key, value)
        except RuntimeError:
            self._store = None


def _own_client(backend: Backend) -> dist.Store | None:
    """A connection of this thread's own to the store where the ranks met; None for a single process, which has a store
    of its own."""
    prefix = f"watchdog_{next(_watchdogs)}"
    if backend.world == 1:
        return dist.PrefixStore(prefix, dist.HashStore())
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          wait_for_workers=False, timeout=timedelta(seconds=30))  # fmt: skip
    return dist.PrefixStore(f"{prefix}_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
