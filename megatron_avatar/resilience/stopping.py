"""How a run is told to stop: signals become a flag, and all ranks act on it at the same place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.generate import GenerationStopped
from megatron_avatar.resilience import ended

T = TypeVar("T")


class StopSignal:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 into a flag; calling it tells whether the run should stop.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False  # read it, where asking should not count as a sign of life
        self.polled = time.monotonic()  # when a rank last asked: a sign of life
        self._owner = os.getpid()
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Whether this rank was told to stop."""
        self.polled = time.monotonic()
        return self.requested

    def agree(self, backend: Backend) -> bool:
        """Whether any rank was told to stop; the same answer on all of them."""
        told = any(backend.all_gather_object(self.requested))
        if told:  # never back to False: a signal may have come meanwhile
            self.requested = True
        self.polled = time.monotonic()
        return told

    def check(self, backend: Backend) -> None:
        """GenerationStopped on every rank if any was told to stop. For where the step is not applied yet."""
        if self.agree(backend):
            raise GenerationStopped

    def guard(self, work: Callable[[], T], backend: Backend) -> T:
        """What `work` returns; GenerationStopped on every rank if it was raised on any, or any was told to stop."""
        results = []
        try:
            results.append(work())
        except GenerationStopped:
            self.requested = True
        self.check(backend)
        return results[0]

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:  # a forked child inherited the handler: it dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        else:
            self.requested = True
            ended.tell(ended.NOTICED)
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving state and stopping; Ctrl-C again stops at once, without saving\n".encode())
