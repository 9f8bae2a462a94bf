"""data_tools.prepare as a command: settings, shards, interruption, workers that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.prepare.__main__ import main
from data_tools.prepare.settings import parse
from data_tools.prepare.work import prepare
from megatron_avatar.data.manifest import load_manifest
from tests.data_tools.clips import make_clip, misbehave, write_rows
from tests.data_tools.prepared import RECIPE, rejected, run

ROOT = Path(__file__).parents[2]


def test_settings_are_checked(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [])
    good = ["source=video_r1", f"input={rows}", f"out={tmp_path / 'o'}", f"model={model}"]
    for more, message in [
        ("proceses=2", "nearest is 'processes'"), ("processes=two", "processes"), ("check=all", "packets, decode"),
        ("shards=2", ""), ("shard=2", "count from 0"), ("input=owner/name", "revision=COMMIT"),
        ("input=nowhere", "no such file"), ("data.max_frame=3", "max_frames"), ("recipe=none", "recipe"),
    ]:  # fmt: skip
        if message:
            with pytest.raises(ValueError, match=message):
                prepare(*parse([*good, *RECIPE, more]), Console(quiet=True))
    with pytest.raises(ValueError, match="no row is left"):
        prepare(*parse([*good, *RECIPE]), Console(quiet=True))


def test_sharded_is_unsharded_and_another_input_is_refused(avatar, model, tmp_path):
    whole = run("avatar_rl", avatar, tmp_path / "whole", model)
    parts = tmp_path / "parts"
    for shard in (2, 0):
        run("avatar_rl", avatar, parts, model, "shards=3", f"shard={shard}")
        assert not (parts / "manifest.jsonl").exists()
    with pytest.raises(ValueError, match="shards 1 are not done"):
        run("avatar_rl", avatar, parts, model, "shards=3", "merge=true")
    run("avatar_rl", avatar, parts, model, "shards=3", "shard=1")
    for name in ("manifest.jsonl", "rejected.jsonl", "report.md"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    run("avatar_rl", avatar, whole, model)  # nothing to do
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(ValueError, match="begun with another check"):
        run("avatar_rl", avatar, whole, model, "check=decode")
    with pytest.raises(ValueError, match="begun with another input"):
        run("avatar_rl", avatar / "stage0.jsonl", whole, model)


@pytest.mark.slow
def test_a_medium_that_hangs_or_crashes_costs_its_own_rows_only(model, tmp_path, monkeypatch):
    for name in ("a", "hang", "b", "crash", "c"):
        make_clip(tmp_path / "in", name, frames=8, seed=ord(name[0]) % 40)
    rows = [{"problem_id": name, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
             "solution": "3", "path": f"{name}.mp4"} for name in ("a", "hang", "b", "crash", "c", "hang")]  # fmt: skip
    write_rows(tmp_path / "in" / "rows.jsonl", rows)
    monkeypatch.setattr("data_tools.prepare.shard.store", misbehave)
    out = run("video_r1", tmp_path / "in", tmp_path / "out", model, "deadline_s=1")
    assert rejected(out) == {1: "deadline", 3: "crash", 5: "deadline"}
    assert [s.id for s in load_manifest(out / "manifest.jsonl")] == ["video_r1-a", "video_r1-b", "video_r1-c"]


def test_signed_addresses_are_not_shown(model, tmp_path, capsys):
    row = {"problem": "A ?", "answer": "3"}
    rows = [row | {"images": ["https://me:word@host/a.png?sig=word"]}, row | {"images": []}]
    out = run("vision_r1_rl", write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", model, "data.mute=true")
    assert rejected(out) == {0: "missing"}
    assert not [p for p in out.rglob("*") if p.suffix in (".json", ".jsonl", ".md") and b"word" in p.read_bytes()]
    assert main(["source=vision_r1_rl", "input=https://me:word@host/rows.jsonl?sig=word", f"out={out}",
                 f"model={model}"]) == 2  # fmt: skip
    assert "https://***@host" in (shown := capsys.readouterr().err) and "word" not in shown


def test_lines_that_are_no_rows_are_refused(model, tmp_path):
    good = json.dumps({"images": [], "problem": "A ?", "answer": "3"})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n[1]\n{good[:20]}\n")
    out = run("vision_r1_rl", tmp_path / "rows.jsonl", tmp_path / "a", model, "data.mute=true")
    assert rejected(out) == {1: "not_json", 2: "not_json"}
    assert json.loads((out / "rejected.jsonl").read_text().splitlines()[1])["origin"] == "rows.jsonl line 4"
    for name, text, message in (("a.json", good, "no list of rows"), ("b.json", f"[{good}, {{", "breaks off"),
                                ("c.parquet", good, "no parquet file")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            run("vision_r1_rl", tmp_path / name, tmp_path / f"out_{name}", model, "data.mute=true")


@pytest.mark.slow
def test_killed_in_the_middle_continues_to_the_same_bytes(model, tmp_path):
    folder = tmp_path / "in"
    rows = []
    for k in range(60):
        make_clip(folder, f"v{k}", "h264_aac", frames=8, seed=k)
        rows.append({"problem_id": k, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
                     "solution": f"{k}", "path": f"v{k}.mp4"})  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    whole = run("video_r1", folder, tmp_path / "whole", model)
    out = tmp_path / "out"
    alone = ["env", "--default-signal=INT", "nice", "-n", "19"]  # tests in the background are deaf to SIGINT
    command = [*alone, sys.executable, "-m", "data_tools.prepare", "source=video_r1", f"input={folder}",
               f"out={out}", f"model={model}", "processes=1", "eval_share=0", *RECIPE]  # fmt: skip
    for kill in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        journal, before = out / "shards/0-of-1.jsonl", _lines(out / "shards/0-of-1.jsonl")
        while _lines(journal) < before + 4 and process.poll() is None:
            time.sleep(0.02)
        (os.killpg if kill == signal.SIGKILL else os.kill)(process.pid, kill)
        status = process.wait(timeout=30)
        assert status == (75 if kill == signal.SIGINT else -9), status
        assert not (out / "manifest.jsonl").exists()
        with open(journal, "ab") as file:
            file.write(b'{"row": 77, "torn')
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    for name in ("manifest.jsonl", "rejected.jsonl", "report.md", "shards/0-of-1.jsonl"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert not list((out / "shards").glob("*.tmp"))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
