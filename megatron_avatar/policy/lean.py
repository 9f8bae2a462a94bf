"""Megatron-Core's first import, without what no run of this package uses: about a second of processor time a process.

That is wandb, which its server of completions looks for, and on a machine without GPUs torch's compiler: its functions
are decorated with it, and fusions.py lets none of them run there. Nothing is left changed behind the import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _as_it_is(function: Callable | None = None, **_: Any) -> Callable:
    """torch.compile's place: the function itself."""
    return _as_it_is if function is None else function


@contextmanager
def _unread() -> Iterator[None]:
    compiler, hides = torch.compile, "wandb" not in sys.modules
    if hides:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an ImportError, as where it isn't installed
    if not torch.cuda.device_count():
        setattr(torch, "compile", _as_it_is)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch, "compile", compiler)  # noqa: B010
        if hides:
            del sys.modules["wandb"]


with _unread():
    from megatron.core import parallel_state as parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

__all__ = ["megatron_random", "parallel_state"]
