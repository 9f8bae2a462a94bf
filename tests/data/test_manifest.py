"""Manifest lines: round trip, and an error that names file, line, key and remedy for each mistake."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.data.manifest import load_manifest, sample_from_dict, sample_to_dict, write_manifest
from megatron_avatar.records import Media, Sample

LINE = {
    "id": "a",
    "stage": "2",
    "split": "train",
    "family": "beeps",
    "question": "How many?",
    "answer": "3",
    "problem_type": "numerical",
}
VIDEO = {"path": "v.webm", "kind": "video", "frame_count": 16, "fps": 8.0, "height": 84, "width": 84}
SOUND = {"audio_path": "v.flac", "audio_samples": 32000, "audio_in_video": True}

texts = st.text(min_size=1, max_size=8)
videos = st.builds(
    Media,
    path=st.sampled_from(["v.webm", "clips/ü.webm"]),
    kind=st.just("video"),
    frame_count=st.just(2),
    fps=st.floats(0.1, 240),
    pts=st.sampled_from([None, (0.0, 0.25)]),
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    audio_path=st.sampled_from([None, "v.flac"]),
    audio_samples=st.integers(321, 10**7),
    audio_in_video=st.booleans(),
)
samples = st.builds(
    Sample,
    id=texts, stage=texts, split=texts, family=texts, question=texts, answer=texts,
    problem_type=st.sampled_from(["multiple_choice", "free_form"]),
    choices=st.lists(texts, max_size=3).map(tuple),
    media=st.lists(videos, max_size=2).map(tuple),
    trace=st.none() | texts,
    hint=st.none() | texts,
    scene=st.none() | st.dictionaries(texts, st.integers()),
)  # fmt: skip


@given(samples)
def test_json_round_trip(sample):
    assert sample_from_dict(json.loads(json.dumps(sample_to_dict(sample)))) == sample


def test_write_load_and_choose(tmp_path):
    path = tmp_path / "m.jsonl"
    made = [sample_from_dict(LINE | {"id": str(i), "stage": str(i % 3), "split": "ab"[i % 2]}) for i in range(12)]
    write_manifest(path, made)
    assert load_manifest(path) == made
    assert [s.id for s in load_manifest(path, stages=["1", "2"], split="b")] == ["1", "5", "7", "11"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, r"`question` of type NoneType; write str"),
        ({"answer": 3}, r"`answer` of type int; write str"),
        ({"anser": "3"}, r"unknown key `anser`; use `answer`"),
        ({"problem_type": "riddle"}, r"`problem_type` is 'riddle'; write one of multiple_choice"),
        ({"id": ""}, r"`id` is empty"),
        ({"choices": ["x"] * 27}, r"`choices` must be at most 26 texts"),
        ({"media": ["v.webm"]}, r"media\[0\] must be a JSON object"),
        ({"media": [VIDEO | {"path": "/etc/passwd"}]}, r"media\[0\].path '/etc/passwd' lies outside the manifest"),
        ({"media": [VIDEO | {"path": "x/../../v.webm"}]}, r"media\[0\].path 'x/../../v.webm' lies outside"),
        ({"media": [VIDEO, VIDEO | SOUND | {"audio_path": "../a"}]}, r"media\[1\].audio_path '../a' lies outside"),
        ({"media": [VIDEO | {"kind": "movie"}]}, r"`media\[0\].kind` is 'movie'; write one of video, image, audio"),
        ({"media": [VIDEO | {"frame_count": 0}]}, r"media\[0\].frame_count must be above 0; measure v.webm again"),
        ({"media": [VIDEO | {"frame_count": True}]}, r"`frame_count` of type bool; write int"),
        ({"media": [VIDEO | {"fps": float("nan")}]}, r"media\[0\].fps must be above 0"),
        ({"media": [VIDEO | {"frame_count": 2, "pts": [1.0, 1.0]}]}, r"media\[0\].pts must be one rising time"),
        ({"media": [VIDEO | {"frame_count": 2, "pts": [0, float("nan")]}]}, r"media\[0\].pts must be one rising time"),
        ({"media": [VIDEO | {"frame_count": 2, "pts": [0.0, None]}]}, r"media\[0\].pts must be numbers"),
        ({"media": [VIDEO | SOUND | {"audio_samples": 0}]}, r"audio_samples is 0, .* leave audio_path out"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, change, message):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(LINE | {"id": "first"}) + "\n\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(ValueError, match=r"m\.jsonl, line 3: .*" + message):
        load_manifest(path, check_media=False)


@pytest.mark.parametrize("key", LINE)
def test_missing_key(tmp_path, key):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({k: v for k, v in LINE.items() if k != key}) + "\n")
    with pytest.raises(ValueError, match=rf"m\.jsonl, line 1: sample lacks the key `{key}`; add it"):
        load_manifest(path)


def test_broken_lines_duplicates_and_no_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE) + "\n")
    with pytest.raises(ValueError, match=r"line 2: `id` 'a' is also on line 1; rename one"):
        load_manifest(path)
    path.write_text(json.dumps(LINE)[:-5])
    with pytest.raises(ValueError, match=r"line 1: not JSON .*; write one JSON object a line"):
        load_manifest(path)
    path.write_bytes(json.dumps(LINE).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not JSON .*as UTF-8"):
        load_manifest(path)
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such manifest; set data\.manifest"):
        load_manifest(tmp_path / "nothing.jsonl")


def test_media_files_are_checked_before_training(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(LINE | {"media": [VIDEO | SOUND]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: media\[0\].path: the file .*v\.webm is missing; restore it"):
        load_manifest(path)
    (tmp_path / "v.webm").write_bytes(b"x")
    (tmp_path / "v.flac").touch()
    with pytest.raises(ValueError, match=r"line 1: media\[0\].audio_path: the file .*v\.flac is empty; make it again"):
        load_manifest(path)
    assert len(load_manifest(path, check_media=False)) == 1
    assert load_manifest(path, stages=["other"]) == []
