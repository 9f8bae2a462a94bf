"""Files that are written whole or not at all, texts that they can hold, errors that are this machine's, and the folders
of a run's checkpoints."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

# Full disks and quotas, limits of file size and of open files, whichever library runs into them.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE})
# Disks and mounts that fail; decoders name errors of a file's content so as well.
FAILING = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT})


def is_machines(error: BaseException) -> bool:
    """Whether an error says something of this machine: no input is to blame then, and the work has to stop."""
    number, room = getattr(error, "errno", None), type(error).__module__
    if isinstance(error, ImportError) or number in FULL:
        return True
    if isinstance(error, MemoryError):
        return not room.startswith("av.")  # FFmpeg's own is one of a header that claims too much
    return room == "builtins" and number in FAILING


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes `path`'s place once all is written and on the disk; until then, and after an error, what
    was there stays. One writer at a time (locks.py). Raises OSError that names `path`."""
    aside = path.with_name(path.name + ".part")
    try:
        with writing(path), open(aside, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):  # room for others
            aside.unlink()
        raise


def append(file: FileIO, text: str) -> None:
    """Adds a text to a file opened with "ab" and no buffer: all of it or, where OSError is raised, nothing."""
    content = memoryview(text.encode())
    before = os.fstat(file.fileno()).st_size
    with writing(Path(file.name)):
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of writing `path`, which names no file of its own, with that name and a remedy."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        what = f"cannot be written ({error.strerror}): make room, or raise the limit, and run the same command again"
        raise OSError(error.errno, what, str(path)) from error


def unwritable(text: str) -> str:
    """Why UTF-8 can't hold a text: half of a surrogate pair, JSON's "\\ud83d" of a cut emoji. "": it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"its character {error.start} is {text[error.start]!a}, half of a character, which no file can hold"
    return ""


def repaired(text: str) -> str:
    """The text with U+FFFD for what UTF-8 can't hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> its folder, in order, of a run's `checkpoints` or `milestones`: step_00000010, and nothing else that lies
    there (a copy, step_00000010.bak). Empty where there is no such folder."""
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]{8}", path.name))
    return {int(path.name[-8:]): path for path in sorted(found)}
