"""Foreign code on foreign text: worker processes that are killed when they take too long."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from typing import Any

from pebble import ProcessPool

DEADLINE_S = 10.0  # of processor time: a busy machine, or a worker that has just begun, changes no reward
PATIENCE = 12  # deadlines on the clock, for what hangs without computing
WORKERS = 2  # processes of each rank
log = logging.getLogger(__name__)
_lock = threading.Lock()
_pool: ProcessPool | None = None


def bounded(function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> Any:
    """`function(*args)` in a worker process; None if it fails, crashes or computes longer than `deadline_s`.

    Blocks the calling thread and not the interpreter, so that threads that wait here leave the GPU's thread alone.
    """
    global _pool
    with _lock:
        if _pool is None or not _pool.active:
            context = multiprocessing.get_context("forkserver")
            _pool = ProcessPool(WORKERS, context=context, initializer=_ignore_signals)
            atexit.register(_pool.stop)
        future = _pool.schedule(_timed, args=(deadline_s, function, *args), timeout=PATIENCE * deadline_s)
    try:
        return future.result()
    except Exception as error:  # whatever a third party's parser raises
        log.warning("%s failed on %.80r: %s", function.__name__, args, type(error).__name__)
        return None


def _timed(deadline_s: float, function: Callable[..., Any], *args: Any) -> Any:
    """Ends this process, in the middle of foreign C code too, once it has used that much processor time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, deadline_s)
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # only the trainer answers
