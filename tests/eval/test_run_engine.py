"""The command on a real model and real clips: one process, two ranks, a damaged clip, the controls."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from eval.run import main
from eval.scoring.predictions import correct, lock_of, read_predictions
from megatron_avatar.config.asked import FILE
from megatron_avatar.locks import held
from tests.training.small import ROOT


def arguments(world, out, *more):
    manifest = world / "data" / "manifest.jsonl"
    return [
        f"model={world / 'base'}", "benchmark=held_out", f"data={manifest}", "recipe=tiny_avatar", f"out={out}",
        "batch=2", "rl.sampling.max_new_tokens=8", "data.workers=0", *more,
    ]  # fmt: skip


def test_a_manifest_s_training_prompts_can_be_asked(world, tmp_path):
    lines = (world / "data" / "manifest.jsonl").read_text().splitlines()
    trained = [sample["id"] for sample in map(json.loads, lines) if sample["split"] == "train"]
    assert main(arguments(world, tmp_path, "control=trained", "limit=3")) == 0
    found = read_predictions(tmp_path / "held_out.ours-trained.jsonl")
    assert [p["id"] for p in found] == trained[:3] and not any(p["error"] for p in found)


@pytest.mark.slow
def test_ranks_share_the_items_and_a_damaged_clip_counts_as_wrong(world, tmp_path, capsys, request):
    lines = (world / "data" / "manifest.jsonl").read_text().splitlines()
    held = [sample for sample in map(json.loads, lines) if sample["split"] == "eval"]
    damaged = next(s for s in held if s["media"])
    clip = world / "data" / damaged["media"][0]["path"]
    request.addfinalizer(partial(clip.write_bytes, clip.read_bytes()))  # the next test looks at it too
    clip.write_bytes(b"no video")

    assert main(arguments(world, tmp_path / "alone")) == 0
    assert f"failed: {damaged['id']}: " in capsys.readouterr().out
    predictions = read_predictions(tmp_path / "alone" / "held_out.ours.jsonl")
    assert [p["id"] for p in predictions] == [s["id"] for s in held]
    assert {p["id"] for p in predictions if p["error"]} == {
        s["id"] for s in held if s["media"][0]["path"] == damaged["media"][0]["path"]
    }
    assert all(correct(p) == 0.0 for p in predictions if p["error"])
    assert len({p["text"] for p in predictions}) > 1
    meta = json.loads((tmp_path / "alone" / "held_out.ours.meta.json").read_text())
    assert meta["dataset"]["items"] == len(held) and meta["settings"] == predictions[0]["settings"]

    texts = [p["text"] for p in predictions if not p["error"]]
    for control in ("mute", "blind"):  # the model is shown something else
        assert main(arguments(world, tmp_path, f"control={control}")) == 0
        found = read_predictions(tmp_path / f"held_out.ours-{control}.jsonl")
        assert [p["text"] for p in found if p["id"] in {q["id"] for q in predictions if not q["error"]}] != texts
    assert not any(p["error"] for p in found)  # nobody looks at the damaged pictures

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval.run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments(world, tmp_path / "shared")], cwd=ROOT, text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert read_predictions(tmp_path / "shared" / "held_out.ours.jsonl") == predictions
    assert done.stdout.count("headline") == 1  # one rank reports


def test_a_model_asked_in_other_words_than_in_its_training_is_said(world, tmp_path, capsys):
    model, trained = tmp_path / "model", {"instruction": "Answer between <answer> and </answer>.", "system": ""}
    shutil.copytree(world / "base", model)
    (model / FILE).write_text(json.dumps(trained))
    for name, own in (("other", []), ("same", [f"data.instruction='{trained['instruction']}'"])):
        assert main(arguments(world, tmp_path / name, f"model={model}", "limit=1", *own)) == 0
        assert ("asked in other words than in its training" in capsys.readouterr().err) == (name == "other")
        meta = json.loads((tmp_path / name / "held_out.ours.meta.json").read_text())
        assert meta["trained_with"] == trained
        assert meta["asked"] == {"instruction": own and trained["instruction"] or "", "system": ""}
    (model / FILE).write_text("{}")
    assert main(arguments(world, tmp_path / "third", f"model={model}", "limit=1")) == 2
    assert f"{FILE} can't be read" in capsys.readouterr().err


def test_a_second_evaluation_into_one_file_is_refused_by_the_name_of_the_first(world, tmp_path, capsys):
    with held(lock_of(tmp_path / "held_out.ours.jsonl"), "eval.run"):
        assert main(arguments(world, tmp_path, "limit=1")) == 2
    assert "held by eval.run (process" in capsys.readouterr().err and not list(tmp_path.glob("*.jsonl"))
    assert main(arguments(world, tmp_path, "limit=1")) == 0


@pytest.mark.slow
def test_drawn_completions_repeat_with_their_seed(world, tmp_path):
    drawn = arguments(world, tmp_path / "a", "n=4", "temperature=1", "seed=3", "limit=3")
    assert main(drawn) == 0
    found = read_predictions(tmp_path / "a" / "held_out.ours-g4.jsonl")
    assert len(found) == 12 and len({p["text"] for p in found}) > 3
    assert main([*drawn, f"out={tmp_path / 'b'}", "batch=1"]) == 0
    again = read_predictions(tmp_path / "b" / "held_out.ours-g4.jsonl")
    assert [p["text"] for p in again] == [p["text"] for p in found]
    assert main([*drawn, f"out={tmp_path / 'c'}", "seed=4"]) == 0
    other = read_predictions(tmp_path / "c" / "held_out.ours-g4.jsonl")
    assert [p["id"] for p in other] == [p["id"] for p in found]
    assert sum(p["text"] != q["text"] for p, q in zip(other, found, strict=True)) > 8
