"""From replies to answers: hand-made cases for every parser."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring.parsers import PARSERS
from tests.costs import costs_its_length


def line(kind="choice", letters="ABCD", choices=("Red", "Blue", "Green", "White"), gold="B", **keep):
    return {"id": "x", "kind": kind, "gold": gold, "letters": letters, "choices": list(choices), "keep": keep}


def read(parser, text, **more):
    return PARSERS[parser](text, line(**more))


QUESTIONS = [line(), line(choices=()), line("letters"), line("number", gold="3"), line("yes_no"), line("text")]


@given(st.text() | st.text("ABab ()<>/.,12", min_size=1), st.sampled_from(sorted(PARSERS)),
st.sampled_from(QUESTIONS))
def test_a_parser_reads_anything_as_a_text_or_nothing(text, parser, question):
    assert isinstance(PARSERS[parser](text, question), str | None)


LONG = ["<answer>", "A", "A ", "AC ", "a, ", "1", "answer is ", "选", "(A) ", "\\boxed{", "yes no ", "\n", "x=",
"1,", "so ", "not "]


def test_a_long_reply_costs_no_more_than_its_length():
    for parser, piece in itertools.product(PARSERS.values(), LONG):
        text = piece * (20_000 // len(piece))
        assert costs_its_length(lambda text, parser=parser: parser(text, QUESTIONS[0]), text), (parser, piece)


# ---- the sound protocol ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "answer"), [
    ("<think>A or C?</think><answer>B</answer>", "B"), ("<answer>B. Blue</answer>", "B. Blue"),
    ("<answer>B", None), ("<answer>B</answer><answer>B</answer>", None), ("<answer></answer>", None),
    ("It is blue.", "B"), ("The answer is (b).", "B"), ("Red or blue.", None), ("(A) red, not (B)", None),
    ("A car. I see it.", None), ("", None),
    ("<think>Not red, not green.</think> B", "B"), ("<think>It is blue.", "B"), ("<think>Red!</think>", None),
])  # fmt: skip
def test_tagged_choices(text, answer):
    assert read("tagged", text) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>(B) A box</answer>", "B"), ("<answer>B. A box</answer>", "B"), ("<answer>B</answer>", "B"),
    ("<answer>B) A box</answer>", "B"), ("so the answer is C.", "C"), ("<answer>A box</answer>", "A box"),
    ("<answer>E. none</answer>", "E. none"), ("<answer>Box</answer>", "Box"),
])  # fmt: skip
def test_tagged_choices_whose_options_stand_in_the_question(text, answer):
    assert read("tagged", text, choices=()) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>A, C</answer>", "A,C"), ("<answer>C,A,A</answer>", "A,C"), ("<answer>c and a</answer>", "A,C"),
    ("<answer>A. Red, C. Green</answer>", "A,C"), ("<answer>(D)</answer>", "D"), ("<answer>A, G</answer>", "A"),
    ("<answer>Red and Green</answer>", None), ("<think>A man</think><answer>B", None), ("B,D", "B,D"),
    ("<think>A man, so C</think> b", "B"), ("A man is angry", None), ("", None),
    ("<answer>A</answer><answer>B</answer>", None),
    ("<answer>AC</answer>", "A,C"), ("<answer>CA</answer>", "A,C"), ("<answer>ac</answer>", "A,C"),
    ("<answer>ABD.</answer>", "A,B,D"), ("<answer>A C</answer>", "A,C"), ("<answer>A/C</answer>", "A,C"),
    ("<answer>(A)(C)</answer>", "A,C"), ("<answer>ＡＣ</answer>", "A,C"), ("<answer>A、C。</answer>", "A,C"),
    ("<answer>A和C</answer>", "A,C"), ("<answer>答案是AC</answer>", "A,C"), (r"<answer>\boxed{A, C}</answer>", "A,C"),
    (r"<answer>\boxed{\text{AC}}</answer>", "A,C"), ("<answer>**A**, **C**</answer>", "A,C"),
    ("<answer>The answers are A and C</answer>", "A,C"), ("<answer>Answer: AC</answer>", "A,C"), ("AC", "A,C"),
    ("It moves.\nThe answers are B and D.", "B,D"), ("故选BD。", "B,D"), ("<answer>A&D</answer>", "A,D"),
    ("<answer>A, not C</answer>", "A"), ("<answer>A and D, not B or C.</answer>", "A,D"),
    ("<answer>Not A, but C</answer>", "C"),
    ("<answer>not only A but also C</answer>", "A,C"), ("<answer>选A，不是C</answer>", "A"), ("It is not A", None),
    ("<answer>cab</answer>", None), ("<answer>bad</answer>", None), ("<answer>AA</answer>", None),
    ("<answer>ACE</answer>", None), ("<answer>CD player</answer>", None), ("<answer>none</answer>", None),
    ("<answer>A CAB</answer>", "A"), ("AC/DC plays", None), ("The answer is loud", None), ("ABCDE", None),
    ("<answer>E</answer>", None), ("a band", None), ("<answer></answer>", None), ("dab", None), ("I hear A and C",
    None),
])  # fmt: skip
def test_tagged_letters(text, answer):
    assert read("tagged_letters", text, kind="letters") == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<think>No doubt.</think><answer>Yes</answer>", "yes"), ("<answer>No, he lies not</answer>", "no"),
    ("<answer>yes and no</answer>", None), ("<answer>I know</answer>", None), ("No.", "no"), ("<answer>yes", None),
    ("Yes, no doubt", None),
])  # fmt: skip
def test_tagged_yes_and_no(text, answer):
    assert read("tagged_yes_no", text, kind="yes_no", letters="", choices=()) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>four</answer>", "four"), ("There are 7 of them.", "There are 7 of them."), ("seven or eight", None),
    ("none", None), ("<think>2 groups</think>\n6", "6"),
])  # fmt: skip
def test_tagged_numbers(text, answer):
    assert read("tagged", text, kind="number", letters="", choices=(), gold="4") == answer


# ---- published scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>B</answer>", "B"), ("<answer> B. Blue\n</answer>", "B. Blue"),
    ("<answer>A</answer> <answer>C</answer>", "C"),
    ("<ANSWER>b</ANSWER>", "b"), ("A dog, so B", "B"), ("B, as far as I see", "I"), ("the answer is Blue", "B"),
    ("X marks it", "X"), ("<answer>B", "B"), ("blue", "B"), ("in it", None), ("", None), ("ABBA", "A"),
])  # fmt: skip
def test_last_capital(text, answer):
    assert read("last_capital", text) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>B</answer>", "B"), ("<answer>B</answer> I hope", "I"), ("<answer>E. salt</answer>", "E"),
    ("catalyst", "C"),
])  # fmt: skip
def test_last_capital_without_looking_at_tags(text, answer):
    assert read("last_capital_untagged", text) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>B</answer> I hope", "B"), ("A dog. D", "D"), ("Z or F", None), ("Because", "B"), ("blue", None),
    ("No", None),
])  # fmt: skip
def test_last_capital_of_a_to_d(text, answer):
    assert read("last_capital_a_d", text) == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("A, C", "A,C"), ("cab", "A,B,C"), ("<answer>B</answer>", "A,B,E"), ("G", None), ("", None),
])  # fmt: skip
def test_every_character_a_to_f(text, answer):
    assert read("capitals_a_f", text, kind="letters") == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("12 or 13", "12"), ("<think>2 groups</think>6", "2"), ("four", "0"), ("-3", "-3"), ("3.7", "3"), ("", "0"),
])  # fmt: skip
def test_first_integer(text, answer):
    assert read("first_integer", text, kind="number") == answer


@pytest.mark.parametrize(("text", "answer"), [
    ("Yes, he does", "yes"), ("NO", "no"), ("no, yes", None), ("Nothing", None), ("I know", None), ("", None),
])  # fmt: skip
def test_says_yes_no(text, answer):
    assert read("says_yes_no", text, kind="yes_no") == answer


def test_the_whole_reply():
    assert read("whole", " a b \n", kind="text") == "a b" and read("whole", " ", kind="text") is None
