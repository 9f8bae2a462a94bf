"""One checkpoint at a time is written by a thread, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Saver:
    """Runs `job`s one after the other in a thread; all ranks start and finish theirs together."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the latest job took

    @property
    def failed(self) -> bool:
        """Whether the job that was started has ended with an error, which `finish` will raise."""
        return self._error is not None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` in the background, once the one before it has finished (whose error is raised here)."""
        self.finish()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the job that was started, if there is one; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self, seconds: float) -> None:
        """Give the job that runs, if there is one, that long to end, whatever it comes to: before the process fails."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, job: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            job()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - began
