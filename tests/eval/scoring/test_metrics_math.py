"""Metrics of Video-MMMU's open answers, MathVista's forms, VSI-Bench's borders, and of what a language model says."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.asking.benchmark import load_benchmark
from eval.asking.items import make_item
from eval.scoring import open_answers
from eval.scoring.ask import messages
from eval.scoring.metrics import METRICS
from eval.scoring.open_answers import candidates
from tests.costs import costs_its_length


def line(gold="B", kind="choice", choices=(), keep=None, **more):
    return {"id": "x", "kind": kind, "gold": gold, "choices": list(choices), "keep": keep or {}, "error": None, **more}


def accuracy(metric, answer, **rest):
    return METRICS[metric](answer, line(**rest))["accuracy"]


# ---- VSI-Bench -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "thresholds"),  # held of 0.50, 0.55 ... 0.95, by hand
    [
        ("10", "10", 10),
        ("9.5", "10", 10),  # an error of exactly 0.05
        ("9.4", "10", 9),
        ("9", "10", 9),  # of exactly 0.1
        ("11", "10", 9),
        ("7.5", "10", 6),  # of exactly 0.25
        ("5", "10", 1),  # of exactly 0.5
        ("15", "10", 1),
        ("4.9", "10", 0),
        ("-10", "10", 0),
        ("about ten", "10", 10),
        (None, "10", 0),
        ("0", "0", 10),
        ("1", "0", 0),
    ],
)
def test_mean_relative_accuracy(answer, gold, thresholds):
    assert accuracy("mra", answer, gold=gold, kind="number") == pytest.approx(thresholds / 10)


@given(st.integers(1, 1000), st.integers(0, 3000))
def test_mean_relative_accuracy_in_whole_numbers(gold, answer):
    """By integers, where no threshold is met exactly: 20 |answer - gold| <= (10 - k) gold for t = 0.5 + k/20."""
    held = [20 * abs(answer - gold) <= (10 - k) * gold for k in range(10)]
    if not any(20 * abs(answer - gold) == (10 - k) * gold for k in range(10)):
        assert accuracy("mra", str(answer), gold=str(gold), kind="number") == pytest.approx(sum(held) / 10)


def test_written_alike_letters_case_aside():
    assert accuracy("equal", "b") == 1
    assert accuracy("equal", "B.") == accuracy("equal", None) == 0


# ---- Video-MMMU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("0.333", "0.33", 1),  # two decimals
        ("0.336", "0.33", 0),
        ("The result is 12,000 dollars", "12000", 1),
        ("So x = 4.0", "4", 1),
        ("x = 5, so it is 4", "5", 0),  # the shortest tail alone: 4
        ("a\nThe answer is 7\nx = 8", "7", 1),  # each line has a candidate
        ("1.5e3", "1500", 1),
        ("The key is C Major.", "c major", 1),
        ("in D minor, I think", "d minor", 1),  # no leading word: the whole reply
        ("minor", "d minor", 0),  # the gold in the reply, not the other way round
        ("b", "B", 1),
        ("bold", "B", 0),  # a single character only beside a space
        ("It is Bb or C-dur", "['C major', 'C-dur']", 1),  # one of several golds
        ("12 and 13", "13", 1),
        ("", "B", 0),
        (None, "B", 0),
    ],
)
def test_open_answers(answer, gold, right):
    assert accuracy("open_answer", answer, gold=gold, kind="text") == right


def test_candidates_are_the_shortest_tails_and_their_numbers():
    assert candidates("So the total is 1,250.5 m\nThus y = 3.") == ["1,250.5 m", "3", "1,250", "250.5", "3"]
    assert candidates("nothing 7 here") == ["nothing 7 here", "7"]


OWNERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
          r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")  # fmt: skip


@settings(deadline=None)
@given(st.text("0012.,eE+- x", max_size=16))
def test_numbers_are_found_as_the_owners_patterns_find_them(text):
    assert [re.findall(ours, text) for ours in open_answers._NUMBERS] == [re.findall(theirs, text) for theirs in OWNERS]


@pytest.mark.parametrize("piece", ["1", "1,", "1,111", ".5", "1e", "is ", "so\n", "=", "-1.", "x ", "answer 1 "])
def test_a_long_open_answer_costs_no_more_than_its_length(piece):
    text = piece * (20_000 // len(piece))
    assert not open_answers.same(text, "['sky', '4']")
    assert costs_its_length(lambda text: open_answers.same(text, "['sky', '4']"), text)


# ---- MathVista -------------------------------------------------------------------------------------------------

CITIES = ["hong kong", "osaka", "tokyo"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("C", 1), ("(C) tokyo", 1), ("tokyo", 1), ("Tokio", 1), ("(c)", 1), ("A", 0), ("osak", 0), ("D", 0), ("", 0)],
)
def test_an_option_by_letter_or_the_closest_text(answer, right):
    # "D" is no option's letter: of the texts `tokyo` and `osaka` are five away, and the first of them counts
    assert accuracy("normalised", answer, gold="C", choices=CITIES) == right


@pytest.mark.parametrize(
    ("answer", "gold", "form", "precision", "right"),
    [
        ("14", "14", "integer", None, 1),
        ("14.9", "14", "integer", None, 1),  # cut off
        ("13.9", "14", "integer", None, 0),
        ("14 apples", "14", "integer", None, 1),
        ("no", "14", "integer", None, 0),
        ("1.24", "1.2", "float", 1.0, 1),
        ("1.26", "1.2", "float", 1.0, 0),
        ("2", "2.0", "float", 1.0, 1),
        ("1.449", "1.45", "float", 2, 1),
    ],
)
def test_numbers_in_the_golds_form(answer, gold, form, precision, right):
    keep = {"answer_type": form, "precision": precision}
    assert accuracy("normalised", answer, gold=gold, kind="number", keep=keep) == right


def test_lists_as_they_are_written():
    assert accuracy("normalised", "[1, 2]", gold="[1, 2]", kind="math") == 1
    assert accuracy("normalised", "[1,2]", gold="[1, 2]", kind="math") == 0


# ---- what waits for a language model ---------------------------------------------------------------------------


def test_an_extraction_is_waited_for():
    keep = {"answer_type": "integer", "precision": None}
    assert accuracy("normalised_extraction", None, gold="3", kind="number", keep=keep) is None
    assert accuracy("normalised_extraction", "3", gold="3", kind="number", keep=keep, extracted="3") == 1
    assert accuracy("normalised_extraction", "", gold="3", kind="number", keep=keep, extracted="") == 0
    assert METRICS["normalised_extraction"](None, line(gold="3") | {"error": "no picture"})["accuracy"] == 0


def test_the_gold_itself_needs_no_judge():
    assert accuracy("judged", "B") == 1
    assert accuracy("judged", "60") is None
    assert accuracy("judged", "60", judged=1.0) == 1
    assert accuracy("judged", "60", judged=0.0) == 0
    assert METRICS["judged"]("B", line() | {"error": "no picture"})["accuracy"] == 0


def test_the_judge_is_asked_about_the_owners_question():
    row = {
        "sample_index": "1",
        "query_cot": "Reason first.",
        "question_for_eval": "Find x.",
        "answer": "5",
        "image": None,
        "question_type": "free-form",
        "problem_version": "Vision Only",
        "metadata": {"subject": "", "subfield": ""},
    }
    item, _ = make_item(load_benchmark("mathverse"), row, "row 0")
    assert item.question == "Reason first." and item.keep["asked"] == "Find x."


def test_a_picture_that_is_not_there_is_trouble_unless_it_may_lack():
    row = {"id": "m1", "question": "q", "answer": "A", "subject": "math", "image": None}
    assert make_item(load_benchmark("mmk12"), row, "row 0")[0].trouble == "its image is empty"
    row = {**row, "image": {"bytes": b"png", "path": None}}
    assert make_item(load_benchmark("mmk12"), row, "row 0")[0].trouble == ""


def test_the_judge_reads_the_extraction_and_the_owners_question():
    asked = line(question="Reason first.", text="long reply", keep={"asked": "Find x."}, extracted="x=5", gold="5")
    said = str(messages("judge", asked))
    assert "Find x." in said and "x=5" in said and "Correct answer" in said
    assert "Reason first." not in said and "long reply" not in said
    said = str(messages("extract", asked))
    assert "Find x." in said and "long reply" in said and "Correct answer" not in said
    said = str(messages("judge", {"question": "1 + 1?", "gold": "2", "text": "it is 2"}))
    assert "1 + 1?" in said and "it is 2" in said
