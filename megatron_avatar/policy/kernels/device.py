"""Where Triton's kernels run: a GPU of compute capability 8.0 and above, with a Triton that works there (probe.py)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
    MISSING = ""
except (ImportError, OSError, RuntimeError) as error:  # then nothing calls the kernels, there as plain functions
    triton, tl, MISSING = SimpleNamespace(jit=lambda function: function), None, str(error) or type(error).__name__

CAPABILITY = (8, 0)
MOST_HEAD = 128  # beyond, attention's kernel has neither been compiled nor tested
log = logging.getLogger(__name__)
_state = {"on": True}


def switch(on: bool) -> None:
    """Let every GPU of this process take the kernels, or torch's operations (fusions.pin)."""
    _state["on"] = on


class Operation:
    """A function as an operation of torch's, which plans on shapes and graphs know by name. On a CPU it is called as it
    is: torch's way to an operation takes longer there than most of them compute."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        self._function = function
        self._operation = torch.library.custom_op(f"avatar::{name}", function, mutates_args=mutates)
        self.register_fake = self._operation.register_fake

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments) if arguments[0].is_cpu else self._operation(*arguments)


def operation(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Operation]:
    """Make the function that follows an Operation; the first argument is a tensor, and `mutates` names those that it
    writes to."""
    return lambda function: Operation(name, function, mutates)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor's device; what speaks against a GPU is logged once. A tensor without numbers
    counts as a good GPU's."""
    return tensor.is_meta or tensor.is_cuda and _state["on"] and not obstacle(tensor.device.index or 0)


@functools.cache
def obstacle(index: int) -> str:
    """What keeps the kernels off this GPU; empty: nothing."""
    reason = ""
    if torch.cuda.get_device_capability(index) < CAPABILITY:
        reason = f"{torch.cuda.get_device_name(index)} is below compute capability 8.0"
    elif MISSING:
        reason = f"Triton is not to be had ({MISSING})"
    if reason:
        log.warning("torch's operations in place of the package's kernels: %s", reason)
    return reason


@functools.cache
def fits_head(size: int) -> bool:
    """Whether attention's kernel was tested with heads of this size; said once where it wasn't."""
    if size > MOST_HEAD:
        log.warning("torch's attention in decoding: the kernel is tested for heads of at most %d, not %d", MOST_HEAD,
                    size)  # fmt: skip
    return size <= MOST_HEAD


def next_power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
