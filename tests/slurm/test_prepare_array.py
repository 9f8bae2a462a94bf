"""A dataset prepared by an array of real jobs."""

from __future__ import annotations

import json

import pytest

from megatron_avatar.data.manifest import load_manifest
from tests.data_tools.clips import make_clip, make_model, write_rows
from tests.slurm.conftest import ROOT, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_tasks_of_an_array_share_the_rows_and_the_last_merges(slurm, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    rows = []
    for k in range(6):
        make_clip(folder, f"v{k}", "vp9_opus", frames=8, seed=k)
        rows.append({"problem_id": k, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
                     "solution": f"{k}", "path": f"v{k}.webm"})  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    arguments = [f"input={folder}", f"out={out}", f"model={make_model(tmp_path / 'model')}", "processes=1"]
    job = slurm.submit("--array=0-2", "--mem=100", "--cpus-per-task=1", f"--output={tmp_path}/%a.log",
                       "slurm/prepare.sh", "source=video_r1", *arguments, "recipe=tiny_avatar", "eval_share=0",
                       cwd=ROOT)  # fmt: skip
    logs = lambda: "".join(path.read_text() for path in tmp_path.glob("*.log"))  # noqa: E731
    until(lambda: set(slurm.state(job).split()) <= {"COMPLETED", "FAILED"}, 150, logs)
    assert set(slurm.state(job).split()) == {"COMPLETED"}, logs()
    assert [s.answer for s in load_manifest(out / "manifest.jsonl")] == [str(k) for k in range(6)]
    shards = [[json.loads(line) for line in (out / f"shards/{k}-of-3.jsonl").open()] for k in range(3)]
    assert [[entry["row"] for entry in shard[:-1]] for shard in shards] == [[0, 3], [1, 4], [2, 5]]


def test_a_task_whose_time_is_up_goes_back_into_the_queue_and_continues(slurm, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    rows = []
    for k in range(6):
        make_clip(folder, f"v{k}", frames=160, fps=30, size=(480, 640), seed=k)
        rows.append({"problem_id": k, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
                     "solution": f"{k}", "path": f"v{k}.mp4"})  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    arguments = [f"input={folder}", f"out={out}", f"model={make_model(tmp_path / 'model')}", "processes=1"]
    log, journal = tmp_path / "0.log", out / "shards/0-of-1.jsonl"
    job = slurm.submit("--array=0-0", "--mem=100", "--cpus-per-task=1", f"--output={tmp_path}/%a.log",
                       "slurm/prepare.sh", "source=video_r1", *arguments, "recipe=tiny_avatar", "eval_share=0",
                       "transcode=vp9", cwd=ROOT)  # fmt: skip
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2, 90, lambda: log.read_text())
    slurm.run("scancel", "--signal=USR1", job)
    until(lambda: (out / "manifest.jsonl").exists(), 150, lambda: log.read_text())
    assert "stopped; what is done is kept" in log.read_text()
    assert [s.id for s in load_manifest(out / "manifest.jsonl")] == [f"video_r1-{k}" for k in range(6)]
