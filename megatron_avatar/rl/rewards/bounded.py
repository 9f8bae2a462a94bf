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

DEADLINE_S = 10.0  # a thousand times what an ordinary answer takes, so that a busy machine changes no reward
WORKERS = 2  # processes of each rank
log = logging.getLogger(__name__)
_lock = threading.Lock()
_pool: ProcessPool | None = None


def bounded(function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> Any:
    """`function(*args)` in a worker process; None if it fails, crashes or takes longer than `deadline_s`.

    Blocks the calling thread and not the interpreter, so that threads that wait here leave the GPU's thread alone.
    """
    global _pool
    with _lock:
        if _pool is None or not _pool.active:
            context = multiprocessing.get_context("forkserver")
            _pool = ProcessPool(WORKERS, context=context, initializer=_ignore_signals)
            atexit.register(_pool.stop)
        future = _pool.schedule(function, args=args, timeout=deadline_s)
    try:
        return future.result()
    except Exception as error:  # whatever a third party's parser raises
        log.warning("%s failed on %.80r: %s", function.__name__, args, type(error).__name__)
        return None


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # only the trainer answers
