"""A Slurm of four named nodes for these tests: the one that runs already, or one that ends with them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "slurm" / "local"))

import cluster  # noqa: E402


class Slurm:
    """Commands of the local cluster."""

    def run(self, *command: object, **kwargs) -> str:
        """Output of a command; its error fails the test."""
        done = subprocess.run(list(map(str, command)), env=cluster.shell(), capture_output=True, text=True, **kwargs)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: object, **kwargs) -> str:
        """Job id."""
        return self.run("sbatch", "--parsable", *arguments, **kwargs).strip()

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: str, states: set[str], timeout: float = 60) -> str:
        """Wait for one of the states."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state} after {timeout} s, not {states}"
            time.sleep(0.2)
        return state


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    running = cluster.running()
    cluster.up(nodes=4, gpus=2, cpus=8)
    yield Slurm()
    if not running:
        cluster.down()
