"""Why a row or a file is refused, and what is never blamed on one."""

from __future__ import annotations

from megatron_avatar.config.urls import mask
from megatron_avatar.data.container import MediaError
from megatron_avatar.files import repaired

MOST = 300  # characters of a row that a reason quotes


class Refused(Exception):
    """A row or a file that cannot be used: `kind` is counted in the report, `detail` says what was found."""

    def __init__(self, kind: str, detail: str):
        self.kind, self.detail = kind, shown(detail)
        super().__init__(kind, self.detail)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def shown(text: str) -> str:
    """Foreign text for a journal or a message: secrets of addresses hidden, what UTF-8 can't hold replaced, a long one
    (a picture in place of a path) without its middle."""
    text = repaired(mask(text))
    return text if len(text) <= MOST else f"{text[: MOST // 2]}[...]{text[-MOST // 2 :]}"


def refusal(error: Exception) -> Refused:
    """The refusal of a medium on which `error` was met, whatever a foreign decoder raises on damaged bytes.

    Raises OSError, MemoryError or ImportError instead where this machine is to blame, a full disk say: the work stops,
    and goes on with the same command.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, MediaError):
        _, what, remedy, kind = error.parts
        return Refused(kind, f"{what}; {remedy}")
    if isinstance(error, MemoryError):
        raise MemoryError(str(error)) from error
    if isinstance(error, OSError) and error.errno:
        raise OSError(error.errno, error.strerror, error.filename) from error  # FFmpeg's own don't cross processes
    if isinstance(error, ImportError):
        raise error
    return Refused("damaged", f"{type(error).__name__}: {error}")
