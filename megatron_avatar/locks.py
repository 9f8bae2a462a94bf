"""One command at a time on one output: a lock file beside it, which is free again as soon as its holder has died."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without flock


class Busy(ValueError):
    """Another command works on the output."""


@contextmanager
def held(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, for `what` in few words. Raises Busy with the words of who holds it already, or with
    `wait` waits for its end.

    The kernel frees the lock when its holder ends, however that ends. On a file system without locks a second file says
    who holds it: what a dead process of this machine left is taken over, what one of another left has to be deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f"{socket.gethostname()}\n{what} ({_who()})"
    descriptors, claim = _take(path, note, wait)
    try:
        with suppress(OSError):  # on a full disk nobody learns who it is
            os.ftruncate(descriptors[0], 0)
            os.pwrite(descriptors[0], note.encode(), 0)
        yield
    finally:
        for file in (*claim, path):
            with suppress(OSError):
                file.unlink()  # while it is held: who has opened it sees that it is another file now
        for descriptor in descriptors:
            os.close(descriptor)


def _take(path: Path, note: str, wait: bool) -> tuple[list[int], list[Path]]:
    """Open descriptors, that of `path` first, and further files, which together are the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, path, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return [descriptor], []
            os.close(descriptor)  # its holder deleted it while we waited
        except BaseException as error:
            if getattr(error, "errno", None) in NO_LOCKS:
                return _claim(path, descriptor, note, wait)
            os.close(descriptor)
            raise


def _claim(path: Path, descriptor: int, note: str, wait: bool) -> tuple[list[int], list[Path]]:
    """The same without locks where `path` is: a lock on this machine's own disk, and a file that other machines see."""
    claim, draft = path.with_name(path.name + ".claim"), path.with_name(f"{path.name}.{os.getpid()}")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    own = os.open(Path(tempfile.gettempdir()) / f"avatar-{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(own, path, wait)
        draft.write_text(note)
        while True:
            try:
                os.link(draft, claim)  # there with its whole content, or not at all
                return [descriptor, own], [claim]
            except FileExistsError:
                if _owner(claim)[0] == socket.gethostname():  # dead: it would hold the lock above
                    claim.unlink(missing_ok=True)
                elif wait:
                    time.sleep(1.0)
                else:
                    raise _busy(claim, f", or delete {claim} if that no longer runs") from None
    except BaseException:
        os.close(own)
        os.close(descriptor)
        raise
    finally:
        draft.unlink(missing_ok=True)


def _flock(descriptor: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise _busy(path) from None


def _owner(path: Path) -> tuple[str, str]:
    """(machine, in words), as the holder wrote it; empty where it couldn't."""
    with suppress(OSError):
        machine, _, words = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        return machine, words
    return "", ""


def _busy(path: Path, remedy: str = "") -> Busy:
    words = _owner(path)[1] or "another command"
    return Busy(f"{path} is held by {words}: wait for its end, then run the same command again{remedy}")


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}, since {since}"
