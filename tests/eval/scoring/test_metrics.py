"""From answers to scores: hand-computed values for every metric."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scoring.metrics import METRICS


def score(metric, answer, gold, kind="choice", choices=("Red", "Blue", "Green"), letters="ABC", **more):
    line = {
        "id": "x",
        "kind": kind,
        "gold": gold,
        "choices": list(choices),
        "letters": letters,
        "keep": {},
        "error": None,
    }
    return METRICS[metric](answer, {**line, **more})


def accuracy(*args, **more):
    (value,) = score(*args, **more).values()
    return value


# ---- letters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "right"), [
    ("B", 1), ("b", 1), ("(B) Blue", 1), ("blue", 1), ("B. Green", 0), ("A", 0), ("B, C", 0), (None, 0), ("", 0),
])  # fmt: skip
def test_exact_letters(answer, right):
    assert accuracy("exact", answer, "B") == right


@pytest.mark.parametrize(("answer", "right"), [("B", 1), ("b", 0), ("B. Blue", 0), ("Blue", 0), (None, 0)])
def test_the_same_characters(answer, right):
    assert accuracy("same", answer, "B") == right


@pytest.mark.parametrize(("answer", "gold", "same", "f1"), [
    ("A,C", "A,C", 1, 1.0), ("C, A", "A,C", 1, 1.0), ("A", "A,C", 0, 2 / 3), ("A,B,G", "A", 0, 0.5),
    ("B,D", "A,C", 0, 0.0), ("A,B", "B,C,D", 0, 2 / 5), (None, "A", 0, 0.0), ("", "A", 0, 0.0),
])  # fmt: skip
def test_sets_of_letters(answer, gold, same, f1):
    assert accuracy("letter_set", answer, gold, "letters") == same
    assert accuracy("letter_f1", answer, gold, "letters") == pytest.approx(f1)


SETS = st.sets(st.sampled_from("ABCDEFG"), min_size=1).map(sorted).map(",".join)


@given(SETS, SETS)
def test_f1_is_symmetric_and_1_for_equal_sets_alone(first, second):
    f1 = accuracy("letter_f1", first, second, "letters")
    assert f1 == accuracy("letter_f1", second, first, "letters")
    assert (f1 == 1) == (first == second) == (accuracy("letter_set", first, second, "letters") == 1)


@pytest.mark.parametrize(("answer", "gold", "right"), [("yes", "Yes", 1), ("no", "Yes", 0), (None, "No", 0)])
def test_yes_and_no(answer, gold, right):
    assert accuracy("exact", answer, gold, "yes_no", choices=()) == right


# ---- counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "gold", "right", "near", "error", "capped"), [
    ("3", 3, 1, 1, 0, 0), ("four", 4, 1, 1, 0, 0), ("4 knocks", 3, 0, 1, 1, 1), ("1,200", 1200, 1, 1, 0, 0),
    ("900", 3, 0, 0, 897, 6),  # 897 > max(6, 100)
    ("102", 2, 0, 0, 100, 100),  # 100 is not above max(4, 100)
    ("103", 2, 0, 0, 101, 4), ("180", 60, 0, 0, 120, 120),  # 120 is not above max(120, 100)
    ("181", 60, 0, 0, 121, 120), ("3 or 4", 3, 0, 0, 3, 3), (None, 1, 0, 0, 1, 1), (None, 0, 0, 0, 0, 0),
    ("0", 1, 0, 1, 1, 1),
])  # fmt: skip
def test_counting(answer, gold, right, near, error, capped):
    ours = score("counting", answer, str(gold), "number", choices=())
    published = score("counting_uncapped", answer, str(gold), "number", choices=())
    assert ours == {"accuracy": right, "oboa": near, "mae": capped, "rmse": capped}
    assert published == {"accuracy": right, "oboa": near, "mae": error, "rmse": error}


@pytest.mark.parametrize(("answer", "gold", "share"), [
    ("10", 10, 1.0), ("7.9", 10, 0.6), ("12.1", 10, 0.6), ("4", 10, 0.0), ("30", 10, 0.0), ("6.1", 10, 0.3),
    ("0", 0, 1.0), ("1", 0, 0.0), (None, 10, 0.0), ("9.74", 10, 1.0), ("7.3", 10, 0.5),
])  # fmt: skip
def test_mean_relative_accuracy_is_relative_to_the_truth(answer, gold, share):
    """Thresholds 0.50, 0.55 ... 0.95: an error of 21 % passes six of them, of 27 % five."""
    assert accuracy("mra", answer, str(gold), "number", choices=()) == pytest.approx(share)


# ---- a language model's verdict --------------------------------------------------------------------------------


def test_a_verdict_is_the_score_and_none_until_it_is_there():
    assert score("judged", "x", "sky", "text", judged=1.0) == {"accuracy": 1.0}
    assert score("judged", "x", "sky", "text", judged=0.0) == {"accuracy": 0.0}
    assert score("judged", "x", "sky", "text") == {"accuracy": None}
    assert score("judged", "sky", "sky", "text") == {"accuracy": 1.0}  # equal to the letter: nobody has to be asked
    assert score("judged", None, "sky", "text", error="damaged") == {"accuracy": 0.0}
