"""sweep.py and reproduce.py on a real Slurm: an array that is preempted, and left alone; a graph to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_avatar.resilience.attempts import read as read_attempts
from tests.slurm.conftest import PATIENCE, ROOT, Slurm, until
from tests.training import small

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
MEMBERS = 5  # more than run at once


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, f"slurm/{script}", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=Slurm.environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, timeout: float) -> str:
    text, _ = process.communicate(timeout=PATIENCE * timeout)
    assert process.returncode == 0, text
    return text


def test_an_array_survives_preemption_and_its_submitter(slurm, world, tmp_path):
    out = tmp_path / "sweep"
    settings = [s for s in small.arguments(world, out, recipe="tiny_sft", steps=12) if not s.startswith("recipe=")]
    sweep = ("sweep.py", "recipe=tiny_sft", f"seed=range(0,{MEMBERS})", "concurrency=3", "cluster=default",
             "cluster.cpus_per_task=1", "checkpoint.every=4", *settings)
    submitter = start(*sweep)
    runs = [out / f"seed_{k}" for k in range(MEMBERS)]

    def busy() -> list[Path]:
        return [run for run in runs if (run / "metrics.jsonl").exists() and not (run / "done.json").exists()]

    until(lambda: len(busy()) >= 2, 150, lambda: slurm.run("squeue", "--states=all"))
    submitter.kill()
    urgent = slurm.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(urgent, {"COMPLETED"}, 90)
    jobs = json.loads((out / "jobs.json").read_text())
    assert len({job.split("_")[0] for job in jobs.values()}) == 1 and len(jobs) == MEMBERS, "one array"

    assert "submitted" not in (text := finish(start(*sweep), 400)), text
    attempts = {run.name: [record for record in read_attempts(run) if "step" in record] for run in runs}
    again = {name for name, found in attempts.items() if len(found) > 1}
    assert len(again) >= 2, attempts
    assert all(len({a["chain"] for a in found}) == 1 for found in attempts.values()), "under their first job's id"
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13)), run
        assert not list(run.glob("failures-*"))
    assert json.loads((out / "jobs.json").read_text()) == jobs


def test_the_smoke_graph_runs_to_its_tables_and_is_done(slurm, tmp_path):
    out = tmp_path / "smoke"
    only = "eval.tiny.base.0.held_out|eval.tiny.grpo.0.held_out|eval.tiny.avatar.0.held_out*"
    graph = ("reproduce.py", "profile=smoke", f"output_dir={out}", f"only={only}", "cluster=default",
             "cluster.cpus_per_task=1")
    assert "submitted 10 of 10 tasks" in finish(start(*graph), 400)
    jobs = json.loads((out / "jobs.json").read_text())
    assert len({job.split("_")[0] for job in jobs.values()}) == 6, "tasks that wait for the same are one array"
    tables = {table["name"]: table for table in json.loads((out / "tables" / "tables.json").read_text())}
    rows = {row["system"]: row["cells"]["overall"] for row in tables["small_av"]["rows"]}
    assert rows["avatar"]["seeds"] == [0] and rows["avatar"]["n"] == rows["base"]["n"] > 20
    assert "AVATAR, reproduced" in (out / "report.html").read_text()
    predictions = out / "predictions" / "tiny" / "grpo" / "seed_0" / "held_out.ours.jsonl"
    predictions.unlink()
    (out / "tasks" / "eval.tiny.grpo.0.held_out.done").unlink()
    (out / "tasks" / "report.done").unlink()
    assert "submitted 2 of 10 tasks" in finish(start(*graph), 200)
    assert predictions.exists()


@pytest.mark.parametrize(("setting", "says"), [("cluster.partition=nowhere", "invalid partition"),
                                               ("cluster.cpus_per_task=999", "is not available")])
def test_what_slurm_would_refuse_is_refused_before_anything_is_written(slurm, world, tmp_path, setting, says):
    out = tmp_path / "sweep"
    settings = [s for s in small.arguments(world, out, recipe="tiny_sft") if not s.startswith("recipe=")]
    process = start("sweep.py", "recipe=tiny_sft", "seed=0,1", "cluster=default", setting, *settings)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "Slurm refuses such a job" in text and says in text.lower(), text
    assert not out.exists()
