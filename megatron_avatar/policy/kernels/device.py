"""Where Triton's kernels run: a GPU of compute capability 8.0 and above, with Triton installed."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

CAPABILITY = (8, 0)
log = logging.getLogger(__name__)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor's device; what speaks against a GPU is logged once. A tensor without numbers
    counts as a good GPU's."""
    return tensor.is_meta or tensor.is_cuda and not _obstacle(tensor.device.index or 0)


@functools.cache
def _obstacle(index: int) -> str:
    """What keeps the kernels off this GPU; empty: nothing."""
    reason = ""
    if torch.cuda.get_device_capability(index) < CAPABILITY:
        reason = f"{torch.cuda.get_device_name(index)} is below compute capability 8.0"
    else:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            reason = f"Triton is not to be had ({error})"
    if reason:
        log.warning("torch's operations in place of the package's kernels: %s", reason)
    return reason


def next_power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
