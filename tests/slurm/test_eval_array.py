"""slurm/eval.sh on a real Slurm: a task a benchmark, two processes each."""

from __future__ import annotations

import subprocess

import pytest

from eval import fixture
from tests.slurm.conftest import ROOT, Slurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
BENCHMARKS = ("mmk12", "omnibench")


def test_an_array_answers_every_benchmark(slurm, tmp_path):
    for name in BENCHMARKS:
        fixture.write_data(fixture.load_fixture(name), tmp_path / "data" / name)
    words = ("--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100", f"--output={tmp_path}/log-%a",
             "recipe=tiny_avatar", "model=assets/tiny_base", f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}",
             "rl.sampling.max_new_tokens=4", "data.workers=0")  # fmt: skip
    done = subprocess.run(["bash", "slurm/eval.sh", *words], cwd=ROOT, env=Slurm.environment(), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and "2 benchmarks: mmk12, omnibench" in done.stdout, done.stdout + done.stderr
    found = [tmp_path / "out" / f"{name}.ours.meta.json" for name in BENCHMARKS]
    until(lambda: all(path.exists() for path in found), 200,
          lambda: "\n".join(path.read_text() for path in tmp_path.glob("log-*")))
