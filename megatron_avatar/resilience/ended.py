"""How a run's processes ended, told to what started them by files: launchers lose exit statuses.

srun returns the status of the rank that it killed, torchrun always 1. AVATAR_ENDED names the beginning of the files'
names; the number behind it is a status.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

FAILED = 1
REFUSED = 2  # a user's mistake: trying again changes nothing
NOTICED = 73  # told to stop: what is saved after that, and whether in time, the others say
LEFT = 74  # told to stop before there was anything to save
INTERRUPTED = 75  # EX_TEMPFAIL: state is saved, the same command continues
HUNG = 76  # no sign of life: the same command continues
HEARD_S = 1.0  # for words on their way, as long as common.sh waits: of 0.5 one in 60 came late on a busy machine
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTICES = (128 + signal.SIGUSR1, 128 + signal.SIGUSR2)  # nobody but Slurm sends these


def tell(status: int) -> bool:
    """Note `status` for the launcher; whether there is one that looks."""
    if not (prefix := os.environ.get("AVATAR_ENDED")):
        return False
    try:
        Path(f"{prefix}-{status}").touch()
    except OSError:
        return False
    return True


def told(prefix: str, status: int) -> int:
    """What a run's end means whose launcher returned `status`.

    A mistake counts before what came of it; a rank may still fail on its way out with the state saved; and where one
    failed early, the others left because the launcher told them to.
    """
    failed = FAILED if status in (0, INTERRUPTED) else status  # 75 is then that of a rank that srun has stopped
    meanings = {REFUSED: REFUSED, INTERRUPTED: INTERRUPTED, HUNG: HUNG, FAILED: failed, LEFT: INTERRUPTED}
    return next((means for number, means in meanings.items() if Path(f"{prefix}-{number}").exists()), status)


def settled(prefix: str, status: int) -> int:
    """`told`, of a command that may not tell: it was ended by Slurm's notice or by itself. The files are removed."""
    means = told(prefix, status)
    if means in NOTICES:  # a failure that was told counts before the notice that ended its launcher
        means = FAILED if Path(f"{prefix}-{FAILED}").exists() else INTERRUPTED
    forget(prefix)
    return means


def forget(prefix: str) -> None:
    """Remove the files, before another start and behind it."""
    for number in (FAILED, REFUSED, NOTICED, LEFT, INTERRUPTED, HUNG):
        Path(f"{prefix}-{number}").unlink(missing_ok=True)


def noticed(prefix: str) -> float | None:
    """When a run that nobody could say the end of was told to stop, in Unix seconds; None where it wasn't."""
    there = (Path(f"{prefix}-{number}") for number in (NOTICED, LEFT, INTERRUPTED))
    return min((path.stat().st_mtime for path in there if path.exists()), default=None)


def be_heard() -> None:
    """Below srun, a process that ends stays for a moment: at the first task that fails srun ends the step, and drops
    what that task has just said (about 5 times in 100 on one machine)."""
    if "SLURM_STEP_ID" in os.environ:
        with suppress(OSError, ValueError):  # nobody listens any more
            sys.stdout.flush()
        time.sleep(HEARD_S)


def tell_failure() -> None:
    """Tell FAILED, unless a stop signal comes in the next moment: it may have ended another rank already, whose silence
    is then this one's fault."""
    be_heard()
    tell(FAILED)


def _end_heard() -> None:
    for number in SIGNALS:  # how it ended stands from here on
        signal.signal(number, signal.SIG_IGN)
    be_heard()


def leave_on_signals() -> None:
    """For a process that srun starts: until the training loop takes them over, stop signals end it at once, as there is
    nothing to save yet. Any other end, that by an exception too, waits to be heard."""
    atexit.unregister(_end_heard)  # once
    atexit.register(_end_heard)

    def leave(*_: object) -> None:
        tell(LEFT)
        os._exit(INTERRUPTED)

    for number in SIGNALS:
        signal.signal(number, leave)
