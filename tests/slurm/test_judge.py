"""The judge as a job of its own, and a training job that finds it; another server than vLLM stands in its place."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.slurm.conftest import ROOT, Slurm, until
from tests.training import small

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_one_command_submits_both_and_the_training_finds_its_judge_also_after_it_moved(
    slurm, world, tmp_path, monkeypatch
):
    server = tmp_path / "vllm"
    server.write_text(f'#!/bin/bash\ncd {ROOT}\nexec {sys.executable} -m tests.servers "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("VLLM", str(server))
    monkeypatch.setenv("AVATAR_ENDPOINT_KEY", "between-the-two")
    monkeypatch.setenv("FOLLOW_S", "1")  # once a minute is for a site's controller
    out = tmp_path / "run"
    folder, log = out / "judge_server", tmp_path / "judge.log"
    arguments = small.arguments(
        world, out, "~stages.visual", "~stages.audio_visual", "judge.model=judge", "judge.wait_s=60",
        "judge.retries=20", steps=6,
    )  # fmt: skip
    arguments = [a for a in arguments if not a.startswith(("stages.visual.", "stages.audio_visual."))]
    done = subprocess.run(
        ["bash", "slurm/tiny.sh", "--with-judge", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1",
         f"--output={tmp_path / 'run.log'}", *arguments],
        cwd=ROOT, env={**Slurm.environment(), "SBATCH_OUTPUT": str(log)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    judge, training = re.search(r"job (\d+): the judge; job (\d+): ", done.stdout).groups()
    assert slurm.run("squeue", "--noheader", f"--jobs={training}", "--format=%r").strip() in ("JobHeldUser", "None")
    until(lambda: list(folder.glob(judge)), 90, lambda: log.read_text() if log.exists() else slurm.state(judge))
    lines = lambda: (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []  # noqa: E731
    until(lambda: len(lines()) >= 2, 120, lambda: (tmp_path / "run.log").read_text())
    slurm.run("scancel", "--signal=USR1", "--batch", judge)  # its time is up: it goes back into the queue
    slurm.wait(training, {"COMPLETED", "FAILED"}, 150, tmp_path / "run.log")
    assert slurm.state(training) == "COMPLETED", (tmp_path / "run.log").read_text()
    records = [json.loads(line) for line in lines()]
    assert len(records) == 6 and all(r["reward/judge"] == 0.5 and r["judge/unscored"] == 0 for r in records)
    assert log.read_text().count("serving judge at") >= 2, log.read_text()
    slurm.wait(judge, {"COMPLETED"}, 60, log)
    assert f"job {training} has left the queue: the judge ends" in log.read_text()
    assert not list(folder.glob("[0-9]*")), "nobody is sent to a server that has ended"
    assert "between-the-two" not in log.read_text() + (tmp_path / "run.log").read_text()
