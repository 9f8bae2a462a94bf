"""slurm/eval.sh on a real Slurm: a task a benchmark, two processes each."""

from __future__ import annotations

import re
import subprocess

import pytest

from eval import fixture
from tests.slurm.conftest import ROOT, Slurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
BENCHMARKS = ("mmk12", "omnibench")


def submit(tmp_path, *benchmarks: str) -> str:
    """The array's number. Two processes a task."""
    for name in benchmarks:
        fixture.write_data(fixture.load_fixture(name), tmp_path / "data" / name)
    words = ("--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100", f"--output={tmp_path}/log-%a",
             "recipe=tiny_avatar", "model=assets/tiny_base", f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}",
             "rl.sampling.max_new_tokens=4", "data.workers=0")  # fmt: skip
    done = subprocess.run(["bash", "slurm/eval.sh", *words], cwd=ROOT, env=Slurm.environment(), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and f": {', '.join(benchmarks)}" in done.stdout, done.stdout + done.stderr
    return re.search(r"^job (\d+):", done.stdout, re.MULTILINE)[1]


def logs(tmp_path) -> str:
    return "\n".join(path.read_text() for path in tmp_path.glob("log-*"))


def test_an_array_answers_every_benchmark_also_where_a_task_is_stopped(slurm, tmp_path):
    job = submit(tmp_path, *BENCHMARKS)
    first = f"{job}_0"
    steps = ("squeue", "--steps", "--noheader", "--format=%i")
    until(lambda: f"{first}.0" in slurm.run(*steps), 60, lambda: logs(tmp_path))
    slurm.run("scancel", "--signal=USR1", first)
    slurm.wait(first, {"PENDING"}, 60)
    found = [tmp_path / "out" / f"{name}.ours.meta.json" for name in BENCHMARKS]
    until(lambda: all(path.exists() for path in found), 200, lambda: logs(tmp_path))
    until(lambda: slurm.state(first) == "COMPLETED", 60, lambda: f"{slurm.state(first)}\n{logs(tmp_path)}")
    assert not list((tmp_path / "out").glob(".ended-*"))
