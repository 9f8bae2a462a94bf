"""Owners' records as items: every form of file, every feature of a benchmark's `records`, and what is refused."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.asking.benchmark import Benchmark, Protocol, Records, Source, load_benchmark, names
from eval.asking.items import Item, item_from_dict, item_to_dict, make_item, make_items, read_prepared
from eval.asking.prompts import as_sample, render
from eval.asking.records import read_records
from eval.fixture import picture, write_data, write_medium
from eval.prepare import prepare
from megatron_avatar.data.prompt import MEDIUM
from megatron_avatar.records import Media

RECORDS = Records(id="qid", question="q", options="opts", answer="gold", answer_is="letter", groups={"topic": "topic"})
ROWS = [
    {"qid": "a", "q": "Which?", "opts": ["A. Red", "B. Blue"], "gold": "B", "topic": "colour"},
    {"qid": "b", "q": "How?", "opts": ["A. Fast", "B. Slow", "C. Never"], "gold": "C. Never", "topic": "speed"},
]


def benchmark(records=RECORDS, files=("*.json*", "*.parquet", "*.tsv", "*.csv")):
    source = Source("owner/set", "test", list(files), 2, "unpack it")
    return Benchmark("made", "Made", source=source, records=records)


def items_of(folder, records=RECORDS):
    made = benchmark(records)
    return make_items(made, str(folder))[0]


def item_of(records=RECORDS, **columns):
    """The item and media of one row."""
    return make_item(benchmark(records), {**ROWS[0], **columns}, "here")


def refusal(records=RECORDS, **columns):
    with pytest.raises(ValueError) as error:
        item_of(records, **columns)
    assert str(error.value).startswith("made, here: ")
    return str(error.value)


# ---- files -----------------------------------------------------------------------------------------------------


def as_text(rows):
    return [{**row, "opts": json.dumps(row["opts"])} for row in rows]


FORMS = {
    "list.json": ROWS,
    "wrapped.json": {"questions": ROWS},
    "columns.json": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "lines.jsonl": ROWS,
    "table.parquet": ROWS,
    "table.tsv": as_text(ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_holds_the_same_items(tmp_path, name):
    write_data({"records": {name: FORMS[name]}}, tmp_path)
    first, second = [item for item, media in items_of(tmp_path) if not media]
    assert first == Item("a", "choice", "Which?", "B", "AB", ("Red", "Blue"), {"topic": ("colour",)})
    assert second == Item("b", "choice", "How?", "C", "ABC", ("Fast", "Slow", "Never"), {"topic": ("speed",)})


def test_csv_and_a_file_in_place_of_its_folder(tmp_path):
    (tmp_path / "t.csv").write_text('qid,q,opts,gold,topic\na,Which?,"[""A. Red"", ""B. Blue""]",B,colour\n')
    assert [item.gold for item, _ in items_of(tmp_path / "t.csv")] == ["B"]


def test_rows_know_their_key_file_folder_and_number(tmp_path):
    rows = {"x1": {**ROWS[0], "qid": ""}, "x2": {**ROWS[1], "qid": ""}}
    write_data({"records": {"part/one.json": rows, "part/two.json": rows}}, tmp_path)
    made = benchmark(replace(RECORDS, id="{_folder}/{_file}/{_key}/{_row}"), files=["part/*.json"])
    ids = [make_item(made, row, where)[0].id for where, row in read_records(made, str(tmp_path))]
    assert ids == ["part/one/x1/0", "part/one/x2/1", "part/two/x1/0", "part/two/x2/1"]


def test_the_first_pattern_that_matches_is_read_alone(tmp_path):
    write_data({"records": {"new.jsonl": ROWS[:1], "old.json": ROWS[1:]}}, tmp_path)
    made = benchmark(files=["*.jsonl", "*.json"])
    assert [row["qid"] for _, row in read_records(made, str(tmp_path))] == ["a"]


def test_missing_columns_are_refused_with_those_found_and_those_wanted(tmp_path):
    write_data({"records": {"r.json": [{"qid": "a", "Question": "Which?", "gold": "B", "topic": "x"}]}}, tmp_path)
    records = replace(RECORDS, asked="split", media=[{"video": "clips/{vid}.mp4", "start": "t0?"}])
    with pytest.raises(
        ValueError, match="has the columns Question, gold, qid, topic, and lacks opts, q, split, vid; data="
    ):
        items_of(tmp_path, records)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("r.json", "[1,", "r.json: breaks off .*download it again"),
    ("r.json", "[1]", "r.json 0: a int, not an object"),
    ("r.json", '{"a": 3, "b": 4}', "r.json 0: '3' is no object"),
    ("r.json", '{"q": ["x"], "qid": []}', "r.json: its columns differ in length"),
    ("r.jsonl", "{", "r.jsonl 0: not JSON"), ("r.csv", "a\n\xff", "r.csv: no table in UTF-8"),
    ("r.csv.gz", "", "holds none of .*csv; download owner/set there \\(unpack it\\)"),
])  # fmt: skip
def test_files_that_hold_no_records_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        items_of(tmp_path)


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.json"])
def test_a_byte_order_mark_belongs_to_no_column(tmp_path, name):
    sign = "," if name == "r.csv" else "\t"
    rows = ("qid", "q", "gold", "opts", "topic"), ("a", "Which?", "A", "Red", "x"), ("b", "Where?", "B", "Left", "y")
    table = "\n".join(map(sign.join, rows))
    keyed = json.dumps({"first": ROWS[0], "second": ROWS[1]})
    (tmp_path / name).write_text("\ufeff" + (keyed if name == "r.json" else table), encoding="utf-8")
    assert [values["qid"] for _, values in read_records(benchmark(), str(tmp_path))] == ["a", "b"]


DEEP = '{"qid": "z", "q": ' + "[" * 5000 + "]" * 5000 + "}"
ODD = ["[1]", DEEP, '{"qid": "z"', *(json.dumps({**ROWS[0], "qid": f"z{k}", **odd}) for k, odd in enumerate([
    {"q": [3, {"x": 1}]}, {"gold": None}, {"opts": 5}, {"opts": ["Red", {"a": 1}]}, {"q": "cut \ud83d"},
    {"topic": [[1]]},
]))]  # fmt: skip


@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_an_odd_record_is_named_and_ends_nothing(tmp_path, name):
    lines = [*map(json.dumps, ROWS), *ODD]
    if name == "r.json":  # there half of an object has no end
        lines.remove('{"qid": "z"')
    (tmp_path / name).write_text("\ufeff" + ("\n".join(lines) if name == "r.jsonl" else f"[{','.join(lines)}]"))
    found, odd = make_items(benchmark(), str(tmp_path))
    assert [(item.id, bool(item.trouble)) for item, _ in found] == [("a", 0), ("b", 0), ("z4", 1), ("z5", 0)]
    assert len(odd) == len(lines) - 4 and all("correct the record" in reason for reason in odd)
    assert "half of a character" in found[2][0].trouble and found[2][0].question == "cut \ufffd"
    prepared = prepare(benchmark(), str(tmp_path), tmp_path / "out", processes=1)
    assert prepared.dataset["unreadable"] == odd and read_prepared(tmp_path / "out") == prepared


def test_a_record_of_any_json_shape_is_an_item_or_refused(tmp_path):
    keys = st.sampled_from(["type", "text", "bytes", "path", "A"])
    shapes = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    )
    records = replace(RECORDS, media=[{"video": "clip?"}], keep=["topic"])

    @given(st.fixed_dictionaries({}, optional={key: shapes for key in ("qid", "q", "opts", "gold", "topic", "clip")}))
    def check(odd):
        try:
            item, _ = make_item(benchmark(records), {**ROWS[0], **odd}, "here")
            assert item_from_dict(json.loads(json.dumps(item_to_dict(item)))).id == item.id
        except ValueError as error:
            assert str(error).startswith("made, here: ")

    check()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "r.xlsx").write_text("")
    with pytest.raises(ValueError, match="write the records as JSON, JSONL, parquet, TSV or CSV"):
        items_of(tmp_path / "r.xlsx")


# ---- rows ------------------------------------------------------------------------------------------------------


def test_questions_in_a_list_and_in_columns(tmp_path):
    films = [{"film": "f", "topic": "t", "qa": [{k: row[k] for k in ("qid", "q", "opts", "gold")} for row in ROWS]}]
    write_data({"records": {"a/r.json": films}}, tmp_path)
    found = [item for item, _ in items_of(tmp_path / "a", replace(RECORDS, unfold="qa", id="{film}-{_part}"))]
    assert [(i.id, i.gold, i.groups["topic"]) for i in found] == [("f-0", "B", ("t",)), ("f-1", "C", ("t",))]
    films = {"f": {"topic": "t", "other": 3, "task0": ROWS[0], "task10": {**ROWS[1], "topic": "own"}}}
    write_data({"records": {"b/r.json": films}}, tmp_path)
    found = [item for item, _ in items_of(tmp_path / "b", replace(RECORDS, unfold="/task\\d+/", id="{_key}-{_part}"))]
    assert [(i.id, i.groups["topic"]) for i in found] == [("f-task0", ("colour",)), ("f-task10", ("own",))]
    with pytest.raises(ValueError, match="lacks qa"):
        items_of(tmp_path / "b", replace(RECORDS, unfold="qa"))


def test_columns_made_of_others():
    made = {"folder": {"column": "topic", "values": {"colour": "c", "/sp.*d/": "s"}},
            "stem": {"column": "clip", "take": r"(\w+)\.mp4"}}  # fmt: skip
    records = replace(RECORDS, columns=made, media=[{"video": "{folder}/{stem}.mkv"}], groups={"place": "folder"})
    item, (wanted,) = item_of(records, clip="https://site/x/k9.mp4?download=1")
    assert wanted.source.path == "c/k9.mkv" and item.groups == {"place": ("c",)}
    assert item_of(records, topic="speeeed", clip="k9.mp4")[0].groups == {"place": ("s",)}
    assert "topic is 'taste', none of colour" in refusal(records, topic="taste", clip="k9.mp4")
    assert "clip is 'k9.avi': no stem in the form" in refusal(records, clip="k9.avi")


@pytest.mark.parametrize(("answer_is", "gold", "letter"), [
    ("letter", "B", "B"), ("letter", "(B)", "B"), ("letter", "B. Blue", "B"), ("letter", "<answer>B</answer>", "B"),
    ("text", "Blue", "B"), ("text", " Blue ", "B"), ("index", 1, "B"), ("index", "1", "B"), ("as_is", "B", "B"),
])  # fmt: skip
def test_a_gold_is_a_letter_a_text_or_a_place(answer_is, gold, letter):
    assert item_of(replace(RECORDS, answer_is=answer_is), gold=gold)[0].gold == letter


@pytest.mark.parametrize(("answer_is", "gold", "said"), [
    ("letter", "Blue", "its answer 'Blue' is no letter"), ("letter", "E", "its answer 'E' is none of A, B"),
    ("letter", None, "no letter"), ("text", "Green", "its answer 'Green' is none of its options"),
    ("index", 2, "its answer 'C' is none of A, B"), ("index", 99, "IndexError"), ("index", "B", "ValueError"),
    ("as_is", "", "its answer 'gold' is empty"), ("as_is", "Blue", "its answer 'Blue' is none of A, B"),
])  # fmt: skip
def test_a_gold_that_is_no_option_is_refused(answer_is, gold, said):
    found = refusal(replace(RECORDS, answer_is=answer_is), gold=gold)
    assert said in found and found.endswith("correct the record, or download it again")


def test_a_gold_text_that_begins_like_a_letter_is_found_as_it_stands():
    records = replace(RECORDS, answer_is="text")
    assert item_of(records, opts=["A. Milne", "Poe"], gold="A. Milne")[0].gold == "A"
    assert item_of(records, opts=["A. Red", "B. Blue"], gold="B. Blue")[0].gold == "B"


@pytest.mark.parametrize(("options", "choices"), [
    (["Red", "Blue"], ("Red", "Blue")), (["(A) Red", "(B) Blue"], ("Red", "Blue")),
    ({"B": "Blue", "A": "Red", "C": None}, ("Red", "Blue")), ('["A. Red", "B. Blue", null]', ("Red", "Blue")),
    ("['A. Red', 'B. Blue']", ("Red", "Blue")), ('{"A": "Red", "B": "Blue"}', ("Red", "Blue")),
    (["A. Red", "C. Blue"], ("A. Red", "C. Blue")),  # other letters than ours belong to the text
])  # fmt: skip
def test_options_in_every_form(options, choices):
    item, _ = item_of(opts=options)
    assert item.choices == choices and item.letters == "AB"


@pytest.mark.parametrize("options", [["Red", None, "Blue"], {"A": "Red", "B": None, "C": "Blue"}])
def test_an_option_that_is_empty_moves_no_letter(options):
    assert "choice B is empty and others follow, whose letters would move" in refusal(opts=options, gold="C")


def test_a_text_is_no_list_of_options():
    assert "is no list" in refusal(opts="[Red, or blue") and "is no list" in refusal(opts="[" * 5000)
    assert "the choices are a text and not a list" in refusal(opts="Red or blue")


def test_options_inside_the_question_leave_the_letters_that_may_be_answered():
    item, _ = item_of(replace(RECORDS, options="", letters="ABCD"), q="Which?\n(A) Red\n(B) Blue")
    assert (item.choices, item.letters, item.gold) == ((), "ABCD", "B")


def test_the_kind_follows_from_a_column():
    kinds = {
        "column": "form",
        "values": {"mc": "choice", "many": "letters", "judge": "yes_no", "n": "number", "open": "text"},
    }
    records = replace(RECORDS, kind=kinds)
    found = [
        item_of(records, form=form, gold=gold)[0]
        for form, gold in (
            ("mc", "A"),
            ("many", ["A", "B"]),
            ("judge", "<answer>Yes</answer>"),
            ("n", 7),
            ("open", "sky"),
        )
    ]
    assert [item.kind for item in found] == ["choice", "letters", "yes_no", "number", "text"]
    assert [item.gold for item in found] == ["A", "A, B", "Yes", "7", "sky"]
    assert [item.letters for item in found] == ["AB", "AB", "", "", ""]
    assert [len(item.choices) for item in found] == [2, 2, 0, 0, 0]
    assert "form is 'essay', none of mc, many" in refusal(records, form="essay")


@pytest.mark.parametrize(("value", "values"), [
    ("x", ("x",)), (3, ("3",)), (["x", "y"], ("x", "y")), ('["x", "y"]', ("x", "y")), ("['x']", ("x",)), (None, ()),
    ("[sic] a song", ("[sic] a song",)), ("", ()),
    ({"zoom": 1, "still": 0, "own": True}, ("zoom", "own")), ('{"zoom": true, "still": false}', ("zoom",)),
])  # fmt: skip
def test_values_of_a_breakdown(value, values):
    assert item_of(topic=value)[0].groups == {"topic": values}


def test_breakdowns_by_template_and_by_columns_that_may_lack():
    records = replace(RECORDS, groups={"deep": "{meta[subject]}", "none": "absent?"})
    assert item_of(records, meta={"subject": "Art"})[0].groups == {"deep": ("Art",), "none": ()}


def test_kept_columns_and_empty_questions():
    assert item_of(replace(RECORDS, keep=["topic", "more"]))[0].keep == {"topic": "colour", "more": None}
    assert "its id or question is empty" in refusal(q="  ")


# ---- media -----------------------------------------------------------------------------------------------------


def test_media_by_path_list_bytes_and_base64():
    png = picture("red")
    records = replace(RECORDS, media=[{"image": "pics?"}, {"audio": "sound?"}, {"video": "clip?"}])
    row = {"pics": ["a.png", {"bytes": png, "path": None}], "sound": {"path": "s.wav", "bytes": None}, "clip": None}
    _, media = item_of(records, **row)
    assert [(w.source.kind, w.source.path, w.source.data) for w in media] == [
        ("image", "a.png", None), ("image", "", png), ("audio", "s.wav", None)]  # fmt: skip
    _, (embedded,) = item_of(records, pics=base64.b64encode(png * 20).decode())
    assert embedded.source.data == png * 20
    assert item_of(records)[1] == []


def test_a_picture_in_base64_of_a_table_arrives_as_its_bytes(tmp_path):
    row = {**as_text(ROWS)[0], "pic": {"$image": "red"}}
    write_data({"records": {"r.tsv": [row]}}, tmp_path)
    [(_, [wanted])] = items_of(tmp_path, replace(RECORDS, media=[{"image": "pic"}]))
    assert wanted.source.data == picture("red")


def test_parts_and_folders_of_frames():
    records = replace(RECORDS, media=[{"video": "clip", "start": "t0?", "end": "t1?", "fps": 3}])
    wanted = [item_of(records, clip="c.mp4", **times)[1][0]
              for times in ({}, {"t0": 1, "t1": "2.5"}, {"t0": "", "t1": None})]  # fmt: skip
    assert [(w.start, w.end, w.fps) for w in wanted] == [(None, None, 3.0), (1.0, 2.5, 3.0), (None, None, 3.0)]
    assert "could not convert" in refusal(records, clip="c.mp4", t0="soon")


MARKED = replace(RECORDS, marks=r"\[(?:img|audio|video)\d+\]",
                 media=[{"image": "i?"}, {"video": "v?"}, {"audio": "a?"}])  # fmt: skip
PICTURES = {"i": ["i1", "i2"], "a": ["a1", "a2"]}
SHOWN = Protocol(instruction={"choice": "Say it."})


def measured(item, wanted):
    return replace(item, media=tuple(Media(path=w.source.path, kind=w.source.kind) for w in wanted))


def test_marks_order_the_media_and_stay_in_the_text():
    item, wanted = item_of(
        MARKED, **PICTURES, q="Is [audio2] like [img2], or is [audio2] not?", opts=["[img1]", "[audio1]"]
    )
    assert item.places == ("[audio2]", "[img2]", "[img1]", "[audio1]")
    assert [w.source.path for w in wanted] == ["a2", "i2", "i1", "a1"]
    assert render(item, SHOWN).splitlines() == [
        f"Is {MEDIUM}[audio2] like {MEDIUM}[img2], or is [audio2] not?", f"A. {MEDIUM}[img1]", f"B. {MEDIUM}[audio1]",
        "Say it.",
    ]  # fmt: skip
    assert item.choices == ("[img1]", "[audio1]")


def test_media_that_no_mark_names_come_first():
    item, wanted = item_of(MARKED, **PICTURES, q="What does [audio1] mean?")
    assert item.places == ("", "", "", "[audio1]") and [w.source.path for w in wanted] == ["i1", "i2", "a2", "a1"]
    assert render(item, SHOWN).startswith(f"{MEDIUM * 3}What does {MEDIUM}[audio1] mean?")
    assert item_of(MARKED, **PICTURES)[0].places == ()


def test_a_protocol_without_places_hands_over_pictures_clips_and_sounds():
    item, wanted = item_of(MARKED, **PICTURES, v=["v1"], q="Is [audio1] in [video1] or [img2]?", opts=["[img1]", "no"])
    loose = replace(SHOWN, interleaved=False)
    sample = as_sample(measured(item, wanted), loose, "made")
    assert [m.path for m in sample.media] == ["i2", "i1", "v1", "a2", "a1"]
    assert sample.question == "Is [audio1] in [video1] or [img2]?\nA. [img1]\nB. no\nSay it."
    ordered = as_sample(measured(item, wanted), SHOWN, "made")
    assert [m.path for m in ordered.media] == ["a2", "a1", "v1", "i2", "i1"]
    assert ordered.question.count(MEDIUM) == len(ordered.media) == 5


@pytest.mark.parametrize("mark", ["[img3]", "[video1]", "[img0]"])
def test_a_mark_without_its_medium_is_refused(mark):
    assert f"{mark} stands in the question, but the record has" in refusal(MARKED, **PICTURES, q=f"See {mark}?")


# ---- prepared items --------------------------------------------------------------------------------------------


TEXTS = st.lists(st.text()).map(tuple)
MEDIA = st.lists(st.builds(Media, path=st.text(), kind=st.just("video"), pts=st.none() | st.just((0.0, 0.5)))).map(
    tuple
)


@given(st.builds(
    Item, id=st.text(), kind=st.sampled_from(["choice", "text"]), question=st.text(), gold=st.text(), letters=st.text(),
    choices=TEXTS, groups=st.dictionaries(st.text(), TEXTS), keep=st.dictionaries(st.text(), st.none() | st.integers()),
    places=TEXTS, media=MEDIA, trouble=st.text(),
))  # fmt: skip
def test_items_survive_their_file(item):
    assert item_from_dict(json.loads(json.dumps(item_to_dict(item)))) == item


CLIPS = replace(RECORDS, media=[{"video": "clip"}])


def write_rows(folder, clips=("one.mp4", "gone.mp4"), **changed):
    rows = [{**row, "clip": clip, **changed} for row, clip in zip(ROWS, clips, strict=True)]
    write_data({"records": {"r.json": rows}}, folder)


def test_prepared_items_are_reused_and_other_records_refused(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "prepared"
    write_rows(data)
    write_medium(data / "one.mp4", "video", sound=True)
    made = prepare(benchmark(CLIPS), str(data), folder, processes=1)
    here, gone = made.items
    assert here.trouble == "" and here.media[0].frame_count == 16 and here.media[0].audio_in_video
    assert (folder / here.media[0].path).is_file()
    assert gone.media == () and gone.trouble.startswith("gone.mp4: there is no such file")
    assert made.dataset | {"fingerprint": ""} == {"name": "owner/set", "revision": "", "fingerprint": "", "items": 2,
                                                  "expected": 2, "unreadable": []}  # fmt: skip
    (data / "one.mp4").unlink()  # not read again
    assert prepare(benchmark(CLIPS), str(data), folder) == read_prepared(folder) == made
    write_rows(data, gold="A")
    with pytest.raises(ValueError, match=r"holds items of other records \(2 items, .* write another prepared=FOLDER"):
        prepare(benchmark(CLIPS), str(data), folder)


def test_a_damaged_part_fails_its_item_and_no_other(tmp_path):
    data = tmp_path / "data"
    write_rows(data, clips=("one.mp4", "frames"))
    write_medium(data / "one.mp4", "video", seconds=4)
    content = (data / "one.mp4").read_bytes()
    (data / "one.mp4").write_bytes(content[: len(content) // 3])
    write_medium(data / "frames", "frames")
    (data / "frames" / "00001.png").write_bytes(b"no picture")
    parts = replace(CLIPS, media=[{"video": "clip", "start": "absent?", "end": "absent?", "fps": 8}])
    items = prepare(benchmark(parts), str(data), tmp_path / "out", processes=1).items
    assert [item.trouble.partition(":")[0] for item in items] == ["one.mp4", "frames"]


def test_two_evaluations_at_once_prepare_one_after_the_other(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "prepared"
    write_rows(data)
    write_medium(data / "one.mp4", "video")
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(prepare, benchmark(CLIPS), str(data), folder, processes=1) for _ in range(2))
        assert first.result() == second.result() and not list(folder.glob("scratch"))


def test_ids_twice_and_no_questions_are_refused(tmp_path):
    write_rows(tmp_path, qid="same")
    with pytest.raises(ValueError, match="the id 'same' is there twice"):
        prepare(benchmark(CLIPS), str(tmp_path), tmp_path / "prepared")
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="its records hold no question"):
        prepare(benchmark(CLIPS), str(tmp_path), tmp_path / "prepared")


# ---- the benchmarks' own files ---------------------------------------------------------------------------------


def test_video_mme_as_columns_of_one_object_is_the_table(tmp_path):
    from eval.fixture import load_fixture

    rows = load_fixture("videomme")["records"]["videomme/test-00000-of-00001.parquet"]
    (tmp_path / "hub/videomme").mkdir(parents=True)
    (tmp_path / "script").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/videomme/t.parquet")
    (tmp_path / "script/v.json").write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    own = load_benchmark("videomme")
    hub, script = ([make_item(own, row, where) for where, row in read_records(own, str(tmp_path / name))]
                   for name in ("hub", "script"))  # fmt: skip
    assert hub == script and len(hub) == 6


def test_each_of_mvbench_s_tasks_has_a_folder():
    tasks = ("action_antonym action_count action_localization action_prediction action_sequence character_order "
             "counterfactual_inference egocentric_navigation episodic_reasoning fine_grained_action fine_grained_pose "
             "moving_attribute moving_count moving_direction object_existence object_interaction object_shuffle "
             "scene_transition state_change unexpected_action").split()  # fmt: skip
    row = {"_row": "0", "video": "v.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y"}
    folders = {}
    for task in tasks:
        item, (wanted,) = make_item(load_benchmark("mvbench"), {**row, "_file": task}, "here")
        assert (item.id, item.gold, item.groups) == (f"{task}-0", "B", {"task": (task,)})
        folders[task] = wanted.source.path.removeprefix("video/").removesuffix("/v.mp4")
    assert len(set(folders.values())) == 11 and folders["episodic_reasoning"] == "tvqa/frames_fps3_hq"
    with pytest.raises(ValueError, match="_file is 'other'"):
        make_item(load_benchmark("mvbench"), {**row, "_file": "other"}, "here")


@pytest.mark.parametrize("name", sorted(set(names()) - {"held_out"}))
def test_every_benchmark_says_where_it_is_from(name):
    source = load_benchmark(name).source
    assert load_benchmark(name).title and "/" in source.dataset and source.files and source.items > 0
