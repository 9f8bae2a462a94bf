"""A Slurm of four named nodes for these tests: the one that runs already, or one that ends with them. Each of several
workers has its own, as tests take nodes away and preempt what runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "slurm" / "local"))

import cluster  # noqa: E402

PATIENCE = 3


class Slurm:
    """Commands of the local cluster."""

    environment = staticmethod(cluster.shell)

    def run(self, *command: object, **kwargs) -> str:
        """Output of a command; its error fails the test. A squeue that a broken pipe has ended, as on a busy machine
        happens, is asked again; the product does so too (queue.ask)."""
        for _ in range(3):
            words = list(map(str, command))
            done = subprocess.run(words, env=cluster.shell(), capture_output=True, text=True, **kwargs)
            if command[0] != "squeue" or done.returncode != -signal.SIGPIPE:
                break
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: object, **kwargs) -> str:
        """Job id."""
        return self.run("sbatch", "--parsable", *arguments, **kwargs).strip()

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def nodes(self, job: str) -> list[str]:
        """Names of the nodes that a job has."""
        found = self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N").strip()
        return self.run("scontrol", "show", "hostnames", found).split() if found else []

    def wait(self, job: str, states: set[str], timeout: float = 60, log: Path | None = None) -> str:
        """Wait for one of the states."""
        last = [""]

        def there() -> bool:
            last[0] = self.state(job)
            return last[0] in states

        until(there, timeout, lambda: f"job {job} is {last[0]} after {timeout} s, not {states}\n"
              f"{log.read_text() if log is not None and log.exists() else ''}")
        return last[0]


def until(condition: Callable[[], bool], timeout: float, otherwise: Callable[[], str]) -> None:
    """Wait for `condition`; past the deadline the test fails with what `otherwise` says.

    `timeout` is generous on an idle machine; a busy one gets PATIENCE times as long, as no test is about seconds.
    """
    end = time.monotonic() + PATIENCE * timeout
    while not condition():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if missing := cluster.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        os.environ["AVATAR_SLURM"] = f"{cluster.folder()}-{worker}"
    running = cluster.running()
    cluster.up(nodes=4, gpus=2, cpus=8, first_job=1 + 1000 * int(worker.removeprefix("gw") or 0))
    yield Slurm()
    if not running:
        cluster.down()
