"""data_tools.prepare from end to end: owners' rows and media of many codecs become a manifest that trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from data_tools.prepare.settings import parse
from data_tools.prepare.work import prepare
from megatron_avatar.config import load_config
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.policy.architecture import read_config
from tests.data_tools.clips import make_clip, make_model, misbehave, write_rows

ROOT = Path(__file__).parents[2]
RECIPE = ["recipe=tiny_avatar", "model.context=2048"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def avatar(tmp_path_factory):
    """An AVATAR-RL folder: stages 0 to 3 as the released trainer reads them, a clip that two rows share, a bad row."""
    folder = tmp_path_factory.mktemp("avatar")
    for name, form in (("a", "vp9_opus"), ("b", "h264_aac"), ("c", "mjpeg_mp3"), ("d", "h264_mp3")):
        make_clip(folder / "videos", name, form, sound=0 if name == "d" else None, seed=len(name) * ord(name) % 50)
    base = {"problem_type": "multiple_choice", "audio_cues": "a beep", "prompt_id": "p0"}
    question = "what moves ?\nA. red\nB. blue\n"
    chat = [{"role": "user", "content": f"<video><audio>{question}"}]
    reply = {"role": "assistant", "content": "<think>look twice</think><answer>B</answer>"}
    write_rows(folder / "stage0.jsonl", [
        base | {"messages": [*chat, reply], "videos": ["videos/a.webm"], "solution": "<answer>B</answer>"},
    ])  # fmt: skip
    write_rows(folder / "stage1.jsonl", [
        base | {"messages": chat, "videos": ["videos/b.mp4"], "solution": "<answer>B</answer>",
                "hint": ["look", "twice"]},
        base | {"prompt_id": "p1", "question": "what moves ?", "videos": ["videos/a.webm"], "solution": "blue",
                "problem_type": "free_form"},
        base | {"prompt_id": "p2", "messages": chat, "videos": ["videos/b.mp4"], "solution": "D"},
    ])  # fmt: skip
    write_rows(folder / "stage2.jsonl", [
        base | {"prompt_id": "p3", "question": "A ?", "videos": ["videos/c.avi"], "solution": "12 B",
                "problem_type": "numerical", "hint": "look twice"},
        base | {"prompt_id": "p3b", "question": " a  ?", "videos": ["videos/c.avi"], "solution": "12 b",
                "problem_type": "numerical"},
    ])  # fmt: skip
    write_rows(folder / "stage3.jsonl", [
        base | {"prompt_id": "p4", "question": "A ?", "videos": ["videos/d.mkv"], "solution": "x",
                "problem_type": "odd"},
        base | {"prompt_id": "p5", "question": "A ?", "videos": ["videos/none.mp4"], "solution": "x",
                "problem_type": "ocr"},
    ])  # fmt: skip
    return folder


def run(source: str, rows: Path | str, out: Path, model: Path, *more: str) -> Path:
    arguments = [f"source={source}", f"input={rows}", f"out={out}", f"model={model}", "processes=2", "eval_share=0"]
    prepare(*parse([*arguments, *RECIPE, *more]), Console(quiet=True))
    return out


def check_trains(out: Path, model: Path, *overrides: str) -> dict:
    """Loads the manifest and builds every prompt, whose length must be the measured one."""
    config = load_config([*RECIPE, "dry_run=true", *overrides])
    builder = PromptBuilder(load_tokenizer(model), read_config(model), config.data, config.model.context)
    samples = load_manifest(out / "manifest.jsonl")
    for sample in samples:
        assert len(builder.build(sample, out)) == builder.length(sample)
    return {sample.id: sample for sample in samples}


def rejected(out: Path) -> dict[int, str]:
    return {entry["row"]: entry["refused"] for entry in map(json.loads, (out / "rejected.jsonl").open())}


def test_avatar_rows(avatar, model, tmp_path):
    out = run("avatar_rl", avatar, tmp_path / "out", model)
    samples = check_trains(out, model)
    assert rejected(out) == {3: "unscorable", 5: "duplicate", 7: "missing"}
    assert [(s.stage, s.split) for s in samples.values()] == [
        ("sft", "sft"), ("visual", "train"), ("visual", "train"), ("audio_visual", "train"), ("localisation", "train"),
    ]  # fmt: skip
    first, second, third, fourth, last = samples.values()
    assert first.id == "p0" and second.id.startswith("p0-")  # the dataset's name twice
    assert first.trace == "<think>look twice</think><answer>B</answer>" and first.answer == "B"
    assert first.question == "what moves ?\nA. red\nB. blue"
    assert second.hint == "look\ntwice" and second.trace is None and second.audio_caption == "a beep"
    assert third.problem_type == "free_form" and fourth.problem_type == "numerical" and last.problem_type == "other"
    assert first.media == third.media and first.media[0].audio_in_video and not last.media[0].audio_in_video
    assert all(abs(s.media[0].audio_samples - 48_000) < 1_000 for s in (first, second, fourth))
    assert len([p for p in (out / "media").rglob("*") if p.suffix in (".mkv", ".mp4", ".avi")]) == 4
    assert all(word in (out / "report.md").read_text() for word in ("5 samples kept", "unscorable", "3 of 4 clips"))
    assert (out / "tokens.png").stat().st_size and (out / "seconds.png").stat().st_size


def test_vision_r1_parquet_with_bytes(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a", (120, 90)), ("b", (60, 64))):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "a" else 1
        Image.new("RGB", size, "red").save(folder / f"{name}.jpg", exif=exif)
    pictures = [{"bytes": (folder / f"{name}.jpg").read_bytes(), "path": f"{name}.jpg"} for name in "ab"]
    rows = [
        {"images": [pictures[0]], "problem": "<image>what moves ?", "answer": "<answer>$\\frac{1}{2}$</answer>"},
        {"images": [pictures[1]], "problem": "<image>A ?\nA. red B. blue", "answer": "B"},
        {"images": [{"bytes": b"nothing", "path": "c.jpg"}], "problem": "A ?", "answer": "4"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    out = run("vision_r1_rl", folder, tmp_path / "out", model, "data.mute=true")
    one, two = check_trains(out, model).values()
    assert (one.media[0].height, one.media[0].width) == (120, 90)  # upright
    assert (one.stage, one.problem_type, two.problem_type, two.answer) == ("math", "math", "multiple_choice", "B")
    assert rejected(out) == {2: "not_media"}


def test_video_r1_list_with_and_without_traces(model, tmp_path):
    make_clip(tmp_path / "in" / "NeXT", "v")
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "i.png")
    base = {"problem_id": 1, "problem": "what moves ?", "data_type": "video", "path": "./NeXT/v.mp4", "options": [],
            "data_source": "NeXT"}  # fmt: skip
    kinds = [
        ("multiple choice", "B", ["A. red", "B. blue"]), ("numerical", "3", []), ("OCR", "red blue", []),
        ("free-form", "red A", []), ("regression", "2.5", []), ("multiple choice", "C", ["A. red", "B. blue"]),
    ]  # fmt: skip
    rows = [base | {"problem_id": k, "problem_type": kind, "solution": f"<answer>{answer}</answer>", "options": options}
            for k, (kind, answer, options) in enumerate(kinds)]  # fmt: skip
    rows += [rows[1] | {"problem_id": 9, "data_type": "image", "path": "i.png", "process": "<think>look</think>"}]
    file = tmp_path / "in" / "rl.json"
    file.write_text(json.dumps(rows))
    out = run("video_r1", file, tmp_path / "out", model)
    samples = check_trains(out, model)
    assert [s.problem_type for s in samples.values()] == [
        "multiple_choice", "numerical", "ocr", "free_form", "numerical", "numerical"]  # fmt: skip
    assert samples["video_r1-0"].choices == ("red", "blue") and samples["video_r1-0"].family == "NeXT"
    assert samples["video_r1-9"].trace == "<think>look</think><answer>3</answer>"
    assert samples["video_r1-9"].split == "sft" and rejected(out) == {5: "unscorable"}


def test_mapping_as_its_example_says(model, tmp_path):
    make_clip(tmp_path / "in" / "clips", "k", "h264_aac")
    row = {"prompt": "<video>what moves ?", "target": "(B)", "uid": 7, "task": "pick", "options": ["red", "blue"],
           "clip": "k"}  # fmt: skip
    write_rows(tmp_path / "in" / "rows.jsonl", [row, row | {"uid": 8, "task": "count", "target": "none"}])
    example = ROOT / "data_tools/prepare/mapping_example.yaml"
    out = run("mapping", tmp_path / "in", tmp_path / "out", model, f"mapping={example}")
    (sample,) = check_trains(out, model).values()
    assert (sample.id, sample.answer, sample.stage, sample.family) == ("clips-7", "B", "visual", "my_clips")
    assert rejected(out) == {1: "unscorable"}
    bad = tmp_path / "bad.yaml"
    bad.write_text("columns: {question: prompt, answr: target}")
    with pytest.raises(ValueError, match="unknown key `answr`; use `answer`"):
        run("mapping", tmp_path / "in", tmp_path / "other", model, f"mapping={bad}")


def test_columns_of_another_dataset_are_listed(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "?", "videos": [], "problem_type": "ocr"}])
    with pytest.raises(ValueError, match="columns problem_type, prompt, videos, and lacks solution or messages"):
        run("avatar_rl", rows, tmp_path / "out", model)


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


def test_no_clip_on_both_sides(model, tmp_path):
    rows = []
    for k in range(12):
        Image.new("RGB", (56, 56), (k, 0, 0)).save(tmp_path / f"{k}.png")
        rows += [{"images": [f"{k}.png"], "problem": q, "answer": "B"} for q in ("A ?", "what ?", "B ?")]
    rows += [{"images": [f"{k}.png", f"{k + 1}.png"], "problem": "A", "answer": "B"} for k in range(11)]
    write_rows(tmp_path / "rows.jsonl", rows)
    out = run("vision_r1_rl", tmp_path / "rows.jsonl", tmp_path / "out", model, "eval_share=0.4", "data.mute=true")
    sides = {}
    for sample in load_manifest(out / "manifest.jsonl"):
        for media in sample.media:
            sides.setdefault(media.path, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert {"eval", "train"} == set.union(*sides.values())
    assert set(rejected(out).values()) == {"both_splits"} and min(rejected(out)) >= 36


def test_prompts_beyond_the_context_are_refused(avatar, model, tmp_path):
    with pytest.raises(ValueError, match="too_long"):
        run("avatar_rl", avatar / "stage3.jsonl", tmp_path / "a", model, "model.context=64")
    rows = [{"images": [], "problem": "what moves ? " * k, "answer": "3"} for k in (1, 40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    out = run("vision_r1_rl", tmp_path / "rows.jsonl", tmp_path / "b", model, "model.context=150",
              "rl.sampling.max_new_tokens=40", "data.mute=true")  # fmt: skip
    assert rejected(out) == {1: "too_long"}  # 120 words fit, with a completion they don't
    assert "for the completion exceed the context 150" in (out / "rejected.jsonl").read_text()


def test_a_medium_that_hangs_or_crashes_costs_its_own_rows_only(model, tmp_path, monkeypatch):
    for name in ("a", "hang", "b", "crash", "c"):
        make_clip(tmp_path / "in", name, frames=8, seed=ord(name[0]) % 40)
    rows = [{"problem_id": name, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
             "solution": "3", "path": f"{name}.mp4"} for name in ("a", "hang", "b", "crash", "c", "hang")]  # fmt: skip
    write_rows(tmp_path / "in" / "rows.jsonl", rows)
    monkeypatch.setattr("data_tools.prepare.shard.store", misbehave)
    began = time.monotonic()
    out = run("video_r1", tmp_path / "in", tmp_path / "out", model, "deadline_s=1")
    assert rejected(out) == {1: "deadline", 3: "crash", 5: "deadline"} and time.monotonic() - began < 30
    assert [s.id for s in load_manifest(out / "manifest.jsonl")] == ["video_r1-a", "video_r1-b", "video_r1-c"]


def test_hub_rows_stream_with_a_pinned_revision(model, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "i.png")
    picture = {"bytes": (tmp_path / "i.png").read_bytes(), "path": None}
    rows = [{"image": picture, "problem": "A ?", "answer": "<answer>3</answer>"}]
    features = datasets.Features({"image": datasets.Image(), "problem": datasets.Value("string"),
                                  "answer": datasets.Value("string")})  # fmt: skip
    asked = {}

    def load(name, configuration, **options):
        asked.update(options, name=name, configuration=configuration)
        return datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    out = run("vision_r1_rl", "owner/name", tmp_path / "out", model, "revision=12ab", "data.mute=true")
    assert asked == {"name": "owner/name", "configuration": None, "split": "train", "revision": "12ab",
                     "streaming": True}  # fmt: skip
    (sample,) = check_trains(out, model).values()
    assert (sample.media[0].height, sample.answer) == (64, "3")


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
    for k in range(30):
        make_clip(folder, f"v{k}", "h264_aac", frames=8, seed=k)
        rows.append({"problem_id": k, "problem": "what ?", "data_type": "video", "problem_type": "numerical",
                     "solution": f"{k}", "path": f"v{k}.mp4"})  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    whole = run("video_r1", folder, tmp_path / "whole", model)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools.prepare", "source=video_r1", f"input={folder}", f"out={out}",
               f"model={model}", "processes=1", "eval_share=0", *RECIPE]  # fmt: skip
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
