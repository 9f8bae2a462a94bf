r"""First words and capitals, boxes, letters before a text that isn't known."""

import pytest

from eval.scoring.parsers import PARSERS


def line(kind="choice", letters="ABCD", choices=()):
    return {"id": "x", "kind": kind, "gold": "B", "letters": letters, "choices": list(choices), "keep": {}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("B. left", "B"),
        ("B) left", "B)"),
        ("(B)", "(B)"),
        ("B\nleft", "B"),
        ("<answer>B</answer>", "<answer>B</answer>"),
        ("  left.", "left"),
        (".", None),
        ("", None),
    ],
)
def test_the_first_word_without_its_full_stop(text, answer):
    assert PARSERS["first_token"](text, line()) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("3", "3"), ("3.5 m", "3.5"), ("4.", "4"), ("-2", "-2"), ("three", None), ("3m", None), ("about 3", None)],
)
def test_a_first_word_is_a_number_in_digits(text, answer):
    assert PARSERS["first_token"](text, line("number")) == answer


@pytest.mark.parametrize(
    ("text", "letters", "answer"),
    [
        ("Because it falls, D", "ABCD", "B"),  # any word's capital
        ("The answer is D", "ABCD", "D"),
        ("The best option is C.", "ABCD", "C"),
        ("Answer: D", "ABCD", "D"),
        ("Kangaroo J", "ABCDEFGHIJ", "J"),  # K can't be answered
        ("### Final Answer:\n$$\\boxed{E}", "ABCDE", "E"),
        ("(d)", "ABCD", None),
        ("", "ABCD", None),
    ],
)
def test_the_first_capital_behind_the_usual_phrases(text, letters, answer):
    assert PARSERS["first_capital"](text, line(letters=letters)) == answer


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        (r"\boxed{A}? No: \boxed{C}", "choice", "C"),
        (r"\boxed{\frac{1}{2}} m", "math", r"\frac{1}{2}"),
        (r"\boxed{B. 30}", "choice", "B"),
        (r"\boxed{B", "choice", None),  # unclosed, and nothing else is plainly said
        ("<answer>D</answer>", "choice", "D"),
        ("The answer is D", "choice", "D"),
        ("12", "math", "12"),
    ],
)
def test_what_stands_in_the_last_box(text, kind, answer):
    assert PARSERS["boxed"](text, line(kind)) == answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(B)", "B"), ("B. It stops", "B"), ("B:90", "B"), ("(B) 90", "B"), ("A rod", "A rod"), ("90", "90")],
)
def test_a_letter_before_a_text_that_is_not_known(answer, letter):
    assert PARSERS["tagged"](f"<answer>{answer}</answer>", line()) == letter
    assert PARSERS["tagged"]("<answer>B. It stops</answer>", line(choices=["no", "It stops"])) == "B. It stops"
