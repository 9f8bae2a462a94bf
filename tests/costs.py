"""What a function costs in its text's length, told from a machine that is slow, busy or measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

LIMIT_S = 0.2  # of processor time for 20,000 characters


def costs_its_length(read: Callable[[str], object], text: str, limit_s: float = LIMIT_S) -> bool:
    """Whether `read` takes less than limit_s for the text, or no more than eight times what a quarter of it takes.

    What grows with the length takes four times as long, with its square sixteen: a slow machine fails nothing alone.
    """
    whole = _seconds(read, text)
    return whole < limit_s or whole < 8 * _seconds(read, text[: len(text) // 4]) or _seconds(read, text) < limit_s


def _seconds(read: Callable[[str], object], text: str) -> float:
    """Processor time without the tracer of a coverage run, which costs more than what it traces."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        began = time.process_time()
        read(text)
        return time.process_time() - began
    finally:
        sys.settrace(tracer)
