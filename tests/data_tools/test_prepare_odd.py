"""Rows that are odd, two preparations at once, and a disk without room: no row ends the work, and nothing is lost."""

from __future__ import annotations

import base64
import json
import multiprocessing.forkserver
import os
import resource
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.prepare.cells import as_text, bare_choices
from data_tools.prepare.damage import MOST, Refused
from data_tools.prepare.mapping import load_mapping
from data_tools.prepare.rows import Input, read_rows
from data_tools.prepare.sources import DATASETS, Draft
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.locks import Busy, held
from tests.data_tools.clips import make_clip
from tests.data_tools.prepared import rejected, run

MAPPING = """
columns: {question: q, answer: a, id: "r-{id}", problem_type: t, choices: o, videos: v, hint: h}
constants: {stage: visual, family: odd}
"""
GOOD = {"id": 0, "q": "how many ?", "a": "3", "t": "numerical", "o": None, "v": None, "h": None}
DEEP = '{"id": 9, "q": ' + "[" * 5000 + "]" * 5000 + "}"


@pytest.fixture
def mapping(tmp_path):
    (tmp_path / "map.yaml").write_text(MAPPING)
    return f"mapping={tmp_path / 'map.yaml'}"


def test_no_odd_row_ends_a_preparation(model, mapping, tmp_path):
    folder = tmp_path / "in"
    make_clip(folder, "ok", frames=8)
    (folder / "loop").symlink_to("loop")
    picture = base64.b64encode(os.urandom(30_000)).decode()
    odd = [
        ({"v": picture}, "missing"), ({"v": "y" * 300 + ".mp4"}, "missing"), ({"v": "a\0b.mp4"}, "missing"),
        ({"v": "loop/a.mp4"}, "missing"), ({"v": "cut\ud83d.mp4"}, "missing"), ({"v": "."}, "missing"),
        ({"v": [[{"bytes": [1, 2]}]]}, "media_column"), ({"v": True}, "media_column"), ({"q": "cut \ud83d"}, "text"),
        ({"id": "\udfff"}, "text"), ({"h": "look \ud83d"}, "text"), ({"o": ["red", "\ud83d"], "a": "A"}, "text"),
        ({"o": ["red", None, "blue"], "a": "A"}, "choices"), ({"o": {"A": ["red", "x"], "B": "blue"}}, "column"),
        ({"q": {"text": "?"}}, "column"), ({"q": [["?"]]}, "column"), ({"a": ["3", "4"]}, "column"),
        ({"a": float("inf")}, "column"), ({"a": float("nan")}, "unscorable"), ({"a": None}, "unscorable"),
        ({"t": {"of": "numbers"}}, "column"), ({"v": "ok.mp4", "q": ""}, "no_question"),
    ]  # fmt: skip
    lines = [json.dumps({**GOOD, "id": 1, "q": "how many beeps ?"}), DEEP, "{", "[1]", *(
        json.dumps({**GOOD, "id": k, **row}) for k, (row, _) in enumerate(odd, 100)),
        json.dumps({**GOOD, "id": 2, "v": "ok.mp4"})]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(lines))
    out = run("mapping", folder, tmp_path / "out", model, mapping)
    assert [sample.id for sample in load_manifest(out / "manifest.jsonl")] == ["r-1", "r-2"]
    reasons = ["not_json"] * 3 + [kind for _, kind in odd]
    assert rejected(out) == dict(enumerate(reasons, 1))
    assert max(map(len, (out / "rejected.jsonl").open())) < MOST + 400

    (folder / "rows.jsonl").rename(tmp_path / "rows.jsonl")  # the same rows as a list, but for those without an end
    elements = [line for line in lines if line != "{"]
    (folder / "rows.json").write_text("\ufeff [\n" + " ,\n".join(elements) + "\n] ")
    as_list = run("mapping", folder, tmp_path / "list", model, mapping)
    assert (as_list / "manifest.jsonl").read_bytes() == (out / "manifest.jsonl").read_bytes()
    assert list(rejected(as_list).values()) == ["not_json"] * 2 + [kind for _, kind in odd]


KEYS = st.sampled_from(["type", "text", "bytes", "path", "role", "content", "A", "B"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("cut \ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)
COLUMNS = ["q", "a", "id", "t", "o", "v", "h", "messages", "solution", "question", "problem", "problem_type", "options",
           "stage", "hint", "images", "videos", "answer", "data_type", "path", "process", "prompt_id"]  # fmt: skip


@pytest.mark.parametrize("name", [*DATASETS, "mapping"])
def test_a_row_of_any_json_shape_is_a_draft_or_refused(name, mapping):
    dataset = DATASETS.get(name) or load_mapping(mapping.partition("=")[2])

    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, JSON)))
    def check(row):
        try:
            draft = dataset.read(row, "rows.jsonl line 1", "visual")
        except Refused as refused:
            assert refused.detail.encode() and len(refused.detail) <= MOST + 5
        else:
            assert isinstance(draft, Draft) and all(isinstance(text, str) for text in (draft.question, *draft.choices))
            json.dumps([draft.question, draft.answer, draft.id, draft.choices], ensure_ascii=False).encode()

    check()


@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON, max_size=5), st.integers(0, 8))
def test_a_list_holds_what_its_elements_hold_as_lines(tmp_path_factory, rows, indent):
    """Wherever a chunk ends."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_text(json.dumps(rows, indent=indent or None).replace("]", " " * 65_000 + "]"))
    found = list(read_rows(Input("", (folder / "a.json",)), 1, 0, 0))
    assert repr([row.values for row in found]) == repr([row if isinstance(row, dict) else None for row in rows])
    assert all(row.values is not None or row.refused.kind == "not_json" for row in found)


def test_a_cell_of_a_table_that_is_none_costs_its_row(tmp_path):
    dates = pa.array([0, 2**62, 1], pa.timestamp("ms"))
    pq.write_table(pa.table({"q": ["a", "b", "c"], "when": dates}), tmp_path / "a.parquet")
    rows = list(read_rows(Input("", (tmp_path / "a.parquet",)), 1, 0, 0))
    assert [row.values and row.values["q"] for row in rows] == ["a", None, "c"] and rows[1].refused.kind == "not_read"


@pytest.mark.parametrize(("options", "choices"), [
    (["red", "blue", None, float("nan"), ""], ("red", "blue")), ({"A": "red", "B": "blue", "C": None}, ("red", "blue")),
    (["（A）red", "（B）blue"], ("red", "blue")), (["Ａ．red", "Ｂ．blue"], ("red", "blue")),
    (["A、red", "B、blue"], ("red", "blue")), (["【A】red", "【B】 blue"], ("red", "blue")),
    (["a) red", "b) blue"], ("red", "blue")), (["**A.** red", "**B.** blue"], ("red", "blue")),
    (["A - red", "B – blue"], ("red", "blue")), (["A-side", "B-side"], ("A-side", "B-side")),
    (["A red dog", "B movie"], ("A red dog", "B movie")), (["A.", "B."], ("A.", "B.")), (["A", "B"], ("A", "B")),
    (["(B) red", "(A) blue"], ("(B) red", "(A) blue")), ([3, 4.5, True], ("3", "4.5", "True")), (float("nan"), ()),
])  # fmt: skip
def test_choices_of_every_form(options, choices):
    assert bare_choices(options) == choices


def test_a_messages_parts_are_its_text():
    parts = [{"type": "image", "image": None}, {"type": "text", "text": "Which "}, "one", {"type": "text", "text": "?"}]
    assert as_text(parts, "q") == "Which one?" and as_text(["only"], "q") == "only" and as_text(True, "q") == "True"
    for odd, said in (([{"type": "image_url", "image_url": {"url": "x"}}], "media in columns of their own"),
                      ([{"type": "text", "text": 3}], "text, which is no text"), ({"a": 1}, "an object and no text"),
                      (b"x", "bytes and no text"), ([1, 2], "a list and no text")):  # fmt: skip
        with pytest.raises(Refused, match=said):
            as_text(odd, "q")


def test_a_missing_package_ends_the_work_and_blames_no_row(model, mapping, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a package can't be imported here")

    rows = text_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr("data_tools.prepare.judge_row.accuracy_reward", broken)
    with pytest.raises(RuntimeError, match="can't be imported"):
        run("mapping", rows, tmp_path / "out", model, mapping)
    monkeypatch.setattr("data_tools.prepare.judge_row.accuracy_reward", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"no row is left, mostly because of fault \(40\)"):
        run("mapping", rows, tmp_path / "again", model, mapping)
    monkeypatch.undo()
    whole, out = (run("mapping", rows, tmp_path / name, model, mapping) for name in ("whole", "out"))
    assert (whole / "manifest.jsonl").read_bytes() == (out / "manifest.jsonl").read_bytes()


def text_rows(path, count=40):
    """Rows without media: numbers, letters that repeat, and some that are refused."""
    asked = [f"how many beeps in {'long ' * (k % 5)}sound {k % 33} ?" for k in range(count)]
    rows = [{**GOOD, "id": k, "q": q, "a": "x" if k % 7 == 3 else k} for k, q in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_at_once_are_one(model, mapping, tmp_path):
    rows, out = text_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    with held(out / "shards" / "0-of-1.lock", "the other"), pytest.raises(Busy, match="the other .*same command again"):
        run("mapping", rows, out, model, mapping)
    run("mapping", rows, out, model, mapping)
    ids = Counter(json.loads(line)["id"] for line in (out / "manifest.jsonl").open())
    assert len(ids) + len(rejected(out)) == 40 and set(ids.values()) == {1}
    (out / "manifest.jsonl").unlink()
    lines = (out / "shards" / "0-of-1.jsonl").read_bytes().splitlines(keepends=True)
    for changed, said in ((lines[:3] + lines[2:], "row 2 is there twice"), (lines[:2] + lines[3:], "row 2 is missing")):
        (out / "shards" / "0-of-1.jsonl").write_bytes(b"".join(changed))
        with pytest.raises(ValueError, match=said):
            run("mapping", rows, out, model, mapping)


def test_after_room_was_made_all_is_as_if_there_had_been_room(model, mapping, tmp_path):
    multiprocessing.forkserver.ensure_running()  # what it starts shall have no limit
    rows, out = text_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    whole = run("mapping", rows, tmp_path / "whole", model, mapping)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [100, 700, 2500, (whole / "shards" / "0-of-1.jsonl").stat().st_size, 12_000]
    reached = set()
    for size in sizes:  # the settings, rows, the number of rows, then what the merge writes
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(OSError) as error:
                run("mapping", rows, out, model, mapping)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        reached.add(os.path.basename(error.value.filename))
        assert not (out / "manifest.jsonl").exists()
    assert reached == {"settings.json", "0-of-1.jsonl", "tokens.png"}
    run("mapping", rows, out, model, mapping)
    for name in ("manifest.jsonl", "rejected.jsonl", "report.md", "shards/0-of-1.jsonl"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
