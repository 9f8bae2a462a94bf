"""Foreign code on foreign text: worker processes that are killed when they take too long.

What a text does to such code costs that text its reward. What the machine lacks (a package, the power to start a
process) costs nobody's: it is raised.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import Finalize
from typing import Any

from pebble import ProcessExpired, ProcessPool

DEADLINE_S = 10.0  # of processor time: a busy machine, or a worker that has just begun, changes no reward
PATIENCE = 12  # deadlines on the clock, for what hangs without computing
WORKERS = 2  # processes of each rank
LOOK_S = 1.0  # between two looks at whether the pool is still there
ATTEMPTS = 2  # where the workers, not the text, are at fault
log = logging.getLogger(__name__)
_lock = threading.Lock()
_pool: ProcessPool | None = None


def bounded(function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> Any:
    """`function(*args)` in a worker process; None if it fails, crashes or computes longer than `deadline_s`.

    Blocks the calling thread and not the interpreter, so that threads that wait here leave the GPU's thread alone.
    Raises RuntimeError where a package can't be imported, or the workers can't start or are killed from outside.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _result(function, args, deadline_s)
        except ImportError as error:
            raise RuntimeError(
                f"{function.__name__} needs a package that can't be imported here ({error}): "
                "pip install -r requirements.txt"
            ) from error
        except _WorkersFailed as error:
            log.warning("%s: %s (attempt %d of %d)", function.__name__, error, attempt + 1, ATTEMPTS)
            failed = error
        except Exception as error:  # whatever a third party's parser raises, or does to its process
            log.warning("%s failed on %.80r: %s", function.__name__, args, type(error).__name__)
            return None
    raise RuntimeError(
        f"no worker process could run {function.__name__} ({failed}): look at this machine's limits of processes and "
        "memory (ulimit -u, the job's memory) and into its kernel log"
    ) from failed


class _WorkersFailed(Exception):
    """The machine's fault, not the text's."""


def _result(function: Callable[..., Any], args: tuple[Any, ...], deadline_s: float) -> Any:
    global _pool
    try:
        with _lock:
            if _pool is None or not _pool.active:
                context = multiprocessing.get_context("forkserver")
                _pool = ProcessPool(WORKERS, context=context, initializer=_begin)
                Finalize(None, _pool.stop, exitpriority=10)  # before this process waits for its children
            pool = _pool
            future = pool.schedule(_timed, args=(deadline_s, function, *args), timeout=PATIENCE * deadline_s)
    except (BrokenProcessPool, RuntimeError, OSError) as error:
        raise _WorkersFailed(f"{type(error).__name__}: {error or error.__cause__}") from error
    while not wait([future], LOOK_S).done:
        if not pool.active and not wait([future], LOOK_S).done:  # one that breaks before it takes a task forgets it
            raise _WorkersFailed("the workers' pool ended before it took the task")
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _WorkersFailed(f"the workers end before they begin: {error}") from error
    except ProcessExpired as error:
        if error.exitcode >= 0 or error.exitcode == -signal.SIGKILL:  # not by its own code, nor by _timed
            raise _WorkersFailed(f"a worker ended with code {error.exitcode}") from error
        raise


def _timed(deadline_s: float, function: Callable[..., Any], *args: Any) -> Any:
    """Ends this process, in the middle of foreign C code too, once it has used that much processor time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, deadline_s)
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _begin() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # only the trainer answers
