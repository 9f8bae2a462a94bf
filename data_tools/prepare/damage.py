"""Why a row or a file is refused, and what is never blamed on one."""

from __future__ import annotations

from megatron_avatar.data.container import MediaError


class Refused(Exception):
    """A row or a file that cannot be used: `kind` is counted in the report, `detail` says what was found."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def refusal(error: Exception) -> Refused:
    """The refusal of a medium on which `error` was met, whatever a foreign decoder raises on damaged bytes.

    Raises OSError or MemoryError instead where this machine is to blame, a full disk say: the work stops, and goes on
    with the same command.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, MediaError):
        _, what, remedy, kind = error.parts
        return Refused(kind, f"{what}; {remedy}")
    if isinstance(error, MemoryError):
        raise MemoryError(str(error)) from error
    if isinstance(error, OSError) and error.errno:
        raise OSError(error.errno, error.strerror, error.filename) from error
    return Refused("damaged", f"{type(error).__name__}: {error}")
