"""Hints that give the answer away, as a person judged them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.leaks import leak
from megatron_avatar.records import Sample

COLOURS = ("red circle", "blue square", "green star", "yellow cross")
IN_TEXT = "What moves ?\nA. red circle\nB. blue square\nC. green star"  # as AVATAR's own rows bring them


def make(kind, answer, choices=(), question="?"):
    return Sample("s", "visual", "train", "f", question, answer, kind, choices)


LEAKS = [  # (hint, problem type, gold, choices)
    ("It is the blue square.", "multiple_choice", "B", COLOURS),
    ("Look for the BLUE, square thing.", "multiple_choice", "B", COLOURS),
    ("Squares that are blue move last.", "multiple_choice", "B", COLOURS),  # both content words, another order
    ("The right option is B.", "multiple_choice", "B", COLOURS),
    ("Think about (B) first.", "multiple_choice", "B", COLOURS),
    ("Choose b when you hear the bell, option b.", "multiple_choice", "B", COLOURS),
    ("Prefer B over the others.", "multiple_choice", "B", COLOURS),
    ("It is neither the red circle nor the green star nor the yellow cross.", "multiple_choice", "B", COLOURS),
    ("Rule out A, C and (A) as well as D.", "multiple_choice", "B", ("w", "x", "y", "z")),
    ("It is A.", "multiple_choice", "A", COLOURS),
    ("Answer: A", "multiple_choice", "A", COLOURS),
    ("Pick the second option.", "multiple_choice", "B", COLOURS),
    ("The last choice fits.", "multiple_choice", "D", COLOURS),
    ("Choose option number 2.", "multiple_choice", "B", COLOURS),
    ("Choose Ｂ now.", "multiple_choice", "B", COLOURS),
    ('It is "b", say.', "multiple_choice", "B", COLOURS),
    ("Count the beeps: there are 4.", "numerical", "4", ()),
    ("It comes one hundred and twenty times.", "numerical", "120", ()),
    ("It comes one hundred twenty times.", "numerical", "120", ()),
    ("A dozen beeps are heard.", "numerical", "12", ()),
    ("Half a dozen beeps are heard.", "numerical", "6", ()),
    ("There are none of them.", "numerical", "0", ()),
    ("Spell it: v-i-o-l-i-n.", "other", "violin", ()),
    ("Listen: four beeps.", "numerical", "4", ()),
    ("You hear it twice.", "numerical", "2", ()),
    ("The fourth beep is the last.", "numerical", "4", ()),
    ("It comes twenty-one times.", "numerical", "21", ()),
    ("It comes twenty one times.", "numerical", "21", ()),
    ("Half is 50%.", "numerical", "0.5", ()),
    ("It weighs 1,200 grams.", "numerical", "1200", ()),
    ("Simplify to 3/4 first.", "math", "0.75", ()),
    ("The sign says EXIT.", "ocr", "EXIT", ()),
    ("Read the word exit above the door.", "ocr", "Exit", ()),
    ("A dog barks and then runs away.", "free_form", "The dog barks, then it runs away.", ()),
    ("Barking dogs, running away.", "free_form", "The dog barks, then it runs away.", ()),
    ("The answer is a violin.", "other", "violin", ()),
    ("", "other", "violin", ()),
    ("Look left. Then listen. Then look right.", "other", "violin", ()),
    ("Look <answer>here</answer>.", "other", "violin", ()),
    ("word " * 60, "other", "violin", ()),
]

FINE = [
    ("Watch which shape moves when the bell rings.", "multiple_choice", "B", COLOURS),
    ("A close look at the left half, as I would, helps.", "multiple_choice", "A", COLOURS),
    ("Compare all: red circle, blue square, green star and yellow cross.", "multiple_choice", "B", COLOURS),
    ("Compare A, B, C and D in turn.", "multiple_choice", "B", COLOURS),
    ("Follow the red circle to see what it hits.", "multiple_choice", "B", COLOURS),  # a wrong choice alone
    ("Pay attention to the blue sky.", "multiple_choice", "B", COLOURS),
    ("Count the beeps one by one, after the tone ends.", "numerical", "4", ()),
    ("Ignore the first second.", "numerical", "4", ()),
    ("Compare the second clip with the last picture.", "multiple_choice", "B", COLOURS),
    ("Listen to the hundred voices.", "numerical", "120", ()),
    ("Fortify your attention before the beeps.", "numerical", "40", ()),
    ("Set up an equation and solve for x.", "math", "0.75", ()),
    ("Zoom in on the sign above the door.", "ocr", "EXIT", ()),
    ("Describe the animal's sound and what it does afterwards.", "free_form", "The dog barks, then runs away.", ()),
    ("Which instrument has strings and a bow?", "other", "violin", ()),
    ("Listen to the pitch before you look.", "other", "low", ()),
]


@pytest.mark.parametrize(("hint", "kind", "gold", "choices"), LEAKS)
def test_a_hint_that_tells_is_refused(hint, kind, gold, choices):
    assert leak(hint, make(kind, gold, choices)) is not None


@pytest.mark.parametrize(("hint", "kind", "gold", "choices"), FINE)
def test_a_hint_that_helps_is_kept(hint, kind, gold, choices):
    assert leak(hint, make(kind, gold, choices)) is None


@pytest.mark.parametrize("hint", ["The right option is C.", "Follow the green star.", "C moves.", "Take choice 3."])
def test_choices_within_the_question_count_too(hint):
    assert leak(hint, make("multiple_choice", "C", question=IN_TEXT)) is not None
    assert leak("Compare the shapes while the bell rings.", make("multiple_choice", "C", question=IN_TEXT)) is None
    assert leak("Follow the red circle.", make("multiple_choice", "C", question=IN_TEXT)) is None
    one_line = "Which one? (A) red circle (B) blue square (C) green star"
    assert leak(hint, make("multiple_choice", "C", question=one_line)) is not None


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=80), st.sampled_from(["multiple_choice", "numerical", "math", "ocr", "free_form", "other"]),
       st.text(max_size=20), st.lists(st.text(max_size=10), max_size=5))  # fmt: skip
def test_any_hint_is_judged(hint, kind, gold, choices):
    assert leak(hint, make(kind, gold, tuple(choices))) is None or hint is not None


@given(st.sampled_from(["violin", "two dogs", "Blue Car", "x1"]), st.text(alphabet="abc .,", max_size=20))
def test_the_answer_itself_never_passes(answer, around):
    assert leak(f"{around} {answer} {around}", make("other", answer)) is not None
