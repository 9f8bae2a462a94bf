"""The judge as a job of its own, and a training job that finds it; another server than vLLM stands in its place."""

from __future__ import annotations

import json
import sys

import pytest

from tests.slurm.conftest import ROOT, until
from tests.training import small

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_training_finds_its_judge_also_after_it_moved(slurm, world, tmp_path, monkeypatch):
    server = tmp_path / "vllm"
    server.write_text(f'#!/bin/bash\ncd {ROOT}\nexec {sys.executable} -m tests.servers "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("VLLM", str(server))
    monkeypatch.setenv("AVATAR_ENDPOINT_KEY", "between-the-two")
    folder, log = tmp_path / "judges", tmp_path / "judge.log"
    options = ("--mem=100", "--cpus-per-task=1", f"--output={log}")
    judge = slurm.submit(*options, "slurm/judge.sh", folder, "judge", cwd=ROOT)
    until(lambda: list(folder.glob(judge)), 60, lambda: log.read_text() if log.exists() else slurm.state(judge))

    out = tmp_path / "run"
    arguments = small.arguments(
        world, out, "~stages.visual", "~stages.audio_visual", f"judge.endpoint={folder}", "judge.model=judge",
        "judge.wait_s=60", "judge.retries=20", steps=6,
    )  # fmt: skip
    arguments = [a for a in arguments if not a.startswith(("stages.visual.", "stages.audio_visual."))]
    training = slurm.submit("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path / 'run.log'}",
                            "slurm/tiny.sh", *arguments, cwd=ROOT)  # fmt: skip
    lines = lambda: (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []  # noqa: E731
    until(lambda: len(lines()) >= 2, 120, lambda: (tmp_path / "run.log").read_text())
    slurm.run("scancel", "--signal=USR1", "--batch", judge)  # its time is up: it goes back into the queue
    slurm.wait(training, {"COMPLETED", "FAILED"}, 150, tmp_path / "run.log")
    assert slurm.state(training) == "COMPLETED", (tmp_path / "run.log").read_text()
    records = [json.loads(line) for line in lines()]
    assert len(records) == 6 and all(r["reward/judge"] == 0.5 and r["judge/unscored"] == 0 for r in records)
    assert log.read_text().count("serving judge at") >= 2, log.read_text()
    slurm.run("scancel", judge)
    slurm.wait(judge, {"CANCELLED"}, 30, log)
    until(lambda: not list(folder.iterdir()), 20, lambda: f"{list(folder.iterdir())}\n{log.read_text()}")
    assert "between-the-two" not in log.read_text() + (tmp_path / "run.log").read_text()
