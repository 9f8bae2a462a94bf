"""What data_tools.prepare reads out of a row, and which rows it refuses, without any file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_tools.prepare.damage import Refused
from data_tools.prepare.judge_row import _require_trace, row_key, scorable
from data_tools.prepare.sources import (
    DATASETS,
    Draft,
    all_media,
    as_trace,
    bare_answer,
    bare_choices,
    media_of,
    problem_type,
)
from megatron_avatar.records import Sample


def sample(answer: str, kind: str, question: str = "?", choices: tuple[str, ...] = ()) -> Sample:
    return Sample("i", "visual", "train", "f", question, answer, kind, choices)


@pytest.mark.parametrize(("answer", "kind", "choices", "letter"), [
    ("B", "multiple_choice", ("x", "y"), "B"), ("(b)", "multiple_choice", ("x", "y"), "B"),
    ("B. y", "multiple_choice", ("x", "y"), "B"), ("y", "multiple_choice", ("x", "y"), "B"),
    ("E", "multiple_choice", (), "E"), ("3.5 kg", "numerical", (), "3.5 kg"), ("0", "numerical", (), "0"),
    ("$\\frac{1}{2}$", "math", (), "$\\frac{1}{2}$"), ("红色", "free_form", (), "红色"), ("a b", "ocr", (), "a b"),
])  # fmt: skip
def test_answers_that_can_be_scored(answer, kind, choices, letter):
    assert scorable(sample(answer, kind, choices=choices)).answer == letter


@pytest.mark.parametrize(("answer", "kind", "question", "choices"), [
    ("C", "multiple_choice", "?", ("x", "y")), ("z", "multiple_choice", "?", ("x", "y")),
    ("D", "multiple_choice", "?\nA. x\nB. y\nC. z", ()), ("A", "multiple_choice", "?", ("x",) * 27),
    ("none", "numerical", "?", ()), ("3 or 4", "numerical", "?", ()), ("", "other", "?", ()), (" ", "math", "?", ()),
    ("?!", "free_form", "?", ()), ("A", "other", "", ()),
])  # fmt: skip
def test_answers_that_cannot_be_scored(answer, kind, question, choices):
    with pytest.raises(Refused):
        scorable(sample(answer, kind, question, choices))


@pytest.mark.parametrize(("answer", "kind", "ends", "kept"), [
    ("B", "multiple_choice", "B", True), ("B", "multiple_choice", "b. y", True), ("B", "multiple_choice", "A", False),
    ("3 km", "numerical", "3000 m", True), ("3", "numerical", "4", False), ("red", "other", "Red.", True),
])  # fmt: skip
def test_a_trace_has_to_end_in_the_answer(answer, kind, ends, kept):
    choices = ("x", "y") if kind == "multiple_choice" else ()
    traced = replace(sample(answer, kind, choices=choices), trace=f"<think>so</think><answer>{ends}</answer>")
    if kept:
        _require_trace(traced)
    else:
        with pytest.raises(Refused, match="the trace ends in"):
            _require_trace(traced)


def test_letters_in_a_text_are_no_choices():
    assert scorable(sample("B", "multiple_choice", "It goes from A. Then it stops at D. Where?")).answer == "B"


def test_words_of_the_owners():
    kinds = ["multiple choice", "Numerical", "OCR", "free-form", "regression", "text_recognition", "descriptive",
             "code", "numerical/units", "riddle", ""]  # fmt: skip
    assert [problem_type(kind) for kind in kinds] == [
        "multiple_choice", "numerical", "ocr", "free_form", "numerical", "ocr", "free_form", "code", "numerical",
        "other", "other"]  # fmt: skip
    assert bare_answer("<think>a</think> <answer> B </answer>") == "B" and bare_answer("plain") == "plain"
    assert bare_choices(["A. x", "B) y"]) == ("x", "y") and bare_choices(["B. x", "A. y"]) == ("B. x", "A. y")
    assert bare_choices({"B": "y", "A": "x"}) == ("x", "y") and bare_choices(None) == ()
    assert as_trace("so", "3") == "<think>so</think><answer>3</answer>"
    assert as_trace("<think>so</think>", "3") == "<think>so</think><answer>3</answer>"
    assert as_trace("<think>so</think><answer>3</answer>", "3").count("<answer>") == 1
    with pytest.raises(Refused, match="a text and not a list"):
        bare_choices("A. x")


def test_media_columns():
    pictures = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "i.png"}]
    row = {"images": pictures, "video": "v.mp4", "audios": None}
    assert [(m.kind, m.path, m.data) for m in all_media(row)] == [
        ("video", "v.mp4", None), ("image", "", b"1"), ("image", "i.png", None)]  # fmt: skip
    with pytest.raises(Refused, match="not a path"):
        media_of([3], "image")


@pytest.mark.parametrize(("row", "origin", "given", "stage"), [
    ({"stage": 2}, "x.jsonl line 1", "", "audio_visual"), ({"stage": "stage_3"}, "x.jsonl line 1", "", "localisation"),
    ({}, "avatar_stage0.jsonl line 7", "visual", "sft"), ({}, "x.jsonl line 1", "visual", "visual"),
    ({"stage": "own"}, "x.jsonl line 1", "", "own"),
])  # fmt: skip
def test_stages_of_avatar(row, origin, given, stage):
    row = {"question": "?", "solution": "3", "problem_type": "numerical", "videos": [], **row}
    assert DATASETS["avatar_rl"].draft(row, origin, given).stage == stage


def test_a_row_without_a_stage_is_the_users_to_name():
    with pytest.raises(Refused, match="write stage= one of"):
        DATASETS["avatar_rl"].read({"question": "?", "solution": "3"}, "x.jsonl line 1", "")


def test_rows_are_the_same_by_media_question_and_answer():
    one = Draft("What  moves?", "Red", "other", "visual", "f")
    same = Draft("what moves? ", "red", "free_form", "visual", "g", id="x")
    assert row_key(one, ("m",)) == row_key(same, ("m",)) != row_key(same, ("n",))
    for changed in ({"answer": "Blue"}, {"question": "Who moves?"}, {"stage": "sft"}, {"choices": ("red",)}):
        assert row_key(one, ("m",)) != row_key(replace(one, **changed), ("m",))
