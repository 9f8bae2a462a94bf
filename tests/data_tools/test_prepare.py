"""data_tools.prepare from end to end: owners' rows and media of many codecs become a manifest that trains."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_avatar.data.manifest import load_manifest
from tests.data_tools.clips import make_clip, write_rows
from tests.data_tools.prepared import check_trains, rejected, run

ROOT = Path(__file__).parents[2]

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
