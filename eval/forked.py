"""`python -m MODULE` in a process that is forked from one which has read the large libraries already.

Reading them takes longer than many a part of the demo, and a tenth of a run of the study in small.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

# Logs are of one width. Threads that wait asleep: spinning ones would take the other job's core. Whether there is a GPU
# is asked without waking it: a process that has, can't be forked.
ENVIRONMENT = {"COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# What takes longest to read of what trainings and evaluations use: read once, by eval/ahead.py.
LIBRARIES = ("eval.engine", "megatron_avatar.training.loop", "megatron_avatar.training.replay_step",
             "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")  # fmt: skip


def read_ahead(environment: Mapping[str, str] | None = None, modules: Sequence[str] = ("eval.ahead",)) -> None:
    """Let the process that others are forked from begin to read `modules`, by default the libraries, beside whatever
    goes on. `environment` is all that it has; by default this process's, with ENVIRONMENT."""
    multiprocessing.set_forkserver_preload(list(modules))
    before = dict(os.environ)
    wanted = {**before, **ENVIRONMENT} if environment is None else {**environment}
    os.environ.clear()
    os.environ |= wanted
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before


_probe: threading.Thread | None = None


def answers() -> bool:
    """Whether what read_ahead began has read all; until then `start` waits for it."""
    global _probe
    if _probe is None:
        _probe = threading.Thread(target=_ask, daemon=True)
        _probe.start()
    return not _probe.is_alive()


def _ask() -> None:
    with contextlib.suppress(EOFError, OSError):  # it has ended: whoever starts something hears of it
        multiprocessing.get_context("forkserver").Process(target=_nothing).start()


def _nothing() -> None:
    pass


def start(
    module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str],
    by: Literal["forkserver", "spawn"] = "forkserver", session: bool = False,
) -> BaseProcess:
    """`python -m module arguments`, with `environment` beside what read_ahead was given; its words are added to `log`.

    It ends, its state saved, with the process that called this. By "spawn" it reads its own libraries, and waits for no
    others. In a `session` of its own it is out of reach of the terminal's Ctrl-C. EOFError or OSError where what it is
    to be forked from has ended.
    """
    what = (module, [*arguments], log, {**environment}, session)
    process = multiprocessing.get_context(by).Process(target=_run, args=what)
    process.start()
    return process


def _run(module: str, arguments: list[str], log: Path, environment: dict[str, str], session: bool) -> None:
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that this one is forked from ignores it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]  # a TextIOWrapper
    os.environ |= environment
    if "numpy" in sys.modules:  # else all that are forked draw the same from its global generator
        sys.modules["numpy"].random.seed()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """However the parent ends: state is saved, and nothing computes on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
