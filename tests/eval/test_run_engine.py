"""The command on a real model and real clips: one process, two ranks, a damaged clip, and the controls."""

import json
import os
import subprocess
import sys

import pytest

from eval.run import main
from eval.score import read_predictions
from eval.stats import estimates
from tests.training.small import ROOT, make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make(folder)
    return folder


def arguments(world, out, *more):
    manifest = world / "data" / "manifest.jsonl"
    return [
        "--model", str(world / "base"), "--manifest", str(manifest), "--recipe", "tiny_avatar", "--out", str(out),
        "--batch", "2", "rl.sampling.max_new_tokens=8", "data.workers=0", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_ranks_share_the_samples_and_a_damaged_clip_counts_as_wrong(world, tmp_path, capsys):
    lines = (world / "data" / "manifest.jsonl").read_text().splitlines()
    held = [sample for sample in map(json.loads, lines) if sample["split"] == "eval"]
    damaged = next(s for s in held if s["media"])
    (world / "data" / damaged["media"][0]["path"]).write_bytes(b"no video")

    alone, muted, blind, shared = (tmp_path / f"{name}.jsonl" for name in ("alone", "muted", "blind", "shared"))
    assert main(arguments(world, alone)) == 0
    assert f"failed, counted as wrong: {damaged['id']}: " in capsys.readouterr().out
    predictions = read_predictions(alone)
    assert [p["id"] for p in predictions] == [s["id"] for s in held]
    assert {p["id"] for p in predictions if p["error"]} == {
        s["id"] for s in held if s["media"][0]["path"] == damaged["media"][0]["path"]
    }
    assert all(p["correct"] == 0.0 for p in predictions if p["error"])
    assert estimates(predictions)["overall"].n == len(held)
    assert len({p["text"] for p in predictions}) > 1

    texts = [p["text"] for p in predictions if not p["error"]]
    for out, flag in ((muted, "--mute"), (blind, "--blind")):  # the model is shown something else
        assert main(arguments(world, out, flag)) == 0
        control = {p["id"]: p["text"] for p in read_predictions(out)}
        assert [control[p["id"]] for p in predictions if not p["error"]] != texts
    assert not any(p["error"] for p in read_predictions(blind))  # nobody looks at the damaged pictures

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval.run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments(world, shared)], cwd=ROOT, text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert [{**p, "settings": ""} for p in read_predictions(shared)] == [{**p, "settings": ""} for p in predictions]
    assert done.stdout.count("overall") == 1  # one rank reports
