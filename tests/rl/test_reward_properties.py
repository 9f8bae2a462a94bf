"""Answers kind by kind as a person graded them, and what holds of every answer: a gold is its own answer, dress changes
nothing, a wrong number is never right."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import accuracy_reward, combine, grade
from megatron_avatar.rl.rewards.accuracy import canonical
from megatron_avatar.rl.rewards.numbers import number_words, quantity
from tests.rl.reward_cases import BY_TYPE, CHOICES
from tests.rl.reward_readings import READINGS, UNTAGGED

GOLDS = sorted({(kind, gold) for kind, cases in BY_TYPE.items() for _, gold, _ in cases} | {c[1:3] for c in READINGS})
# Free form needs a process of its own for each answer; code and text within a picture are compared with their dress.
CASES = [(c[1], c[2], answer, good) for c in READINGS for good in (True, False) for answer in c[3 if good else 4]]


def make(kind, gold):
    return Sample("id", "stage1", "train", "what", "?", gold, kind, CHOICES if kind == "multiple_choice" else ())


def test_the_readings_hold_as_many_wrong_answers_as_right_ones():
    wrong = sum(len(case[4]) for case in READINGS) + sum(letter is None for _, letter in UNTAGGED)
    assert wrong >= sum(len(case[3]) for case in READINGS)
    assert sum(map(len, BY_TYPE.values())) + sum(len(case[3] + case[4]) for case in READINGS) >= 900
    assert all(len(set(right + wrong)) == len(right + wrong) for *_, right, wrong in READINGS)


@pytest.mark.parametrize(
    ("problem_type", "gold", "right", "wrong"), [case[1:] for case in READINGS], ids=[case[0] for case in READINGS]
)
def test_answers_of_a_kind_are_right_or_wrong_as_a_person_said(problem_type, gold, right, wrong):
    sample = make(problem_type, gold)
    assert [a for a in right if not grade(sample, f"<answer>{a}</answer>")["correct"]] == []
    assert [a for a in wrong if grade(sample, f"<answer>{a}</answer>")["correct"]] == []


@pytest.mark.parametrize("kind", sorted(set(BY_TYPE) - {"free_form"}))
def test_a_gold_is_its_own_right_answer(kind):
    golds = [gold for of, gold in GOLDS if of == kind]
    assert [gold for gold in golds if not grade(make(kind, gold), f"<answer>{gold}</answer>")["correct"]] == []


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([case for case in CASES if "\n" not in case[2]]),
    st.sampled_from(
        ["{}", " {}\n", "\u3000{}\u00a0", "$ {} $", r"\boxed{{{}}}", r"\( {} \)", "**{}**", r"\boxed{{\text{{{}}}}}"]
    ),
)
def test_dress_changes_no_verdict(case, dress):
    kind, gold, answer, good = case
    assume(kind != "other" or not dress.startswith(("$", "\\(")))
    assume(not set("*$`\\{") & set(answer) or dress.strip(" \n\u3000\u00a0") == "{}")  # dress over other dress
    assert bool(grade(make(kind, gold), f"<answer>{dress.format(answer)}</answer>")["correct"]) == good


NUMBERS = st.one_of(
    st.integers(-3000, 3000).map(Fraction), st.fractions(-50, 50, max_denominator=60), st.integers(10**11, 10**11 + 9)
).map(Fraction)


@st.composite
def spelled(draw, number=NUMBERS):
    """A number and one of its spellings."""
    value = draw(number)
    size, sign = abs(value), "-" if value < 0 else ""
    forms = [f"{sign}{size}", rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"]
    if value.denominator == 1:
        forms += [
            f"{sign}{int(size):,}",
            f"{sign}{int(size)}.0",
            f"$\\boxed{{{sign}{int(size)}}}$",
            f"x = {sign}{int(size)}",
        ]
        if size < 10_000:
            forms.append(("minus " if sign else "") + number_words(int(size)))
    elif size > 1:
        whole, part = divmod(size, 1)
        forms += [rf"{sign}{whole}\frac{{{part.numerator}}}{{{part.denominator}}}", f"{sign}{whole} {part}"]
    if size.denominator in (2, 4, 5, 8, 20, 25, 40, 50):
        forms.append(f"{sign}{float(size)}")
    return value, draw(st.sampled_from(forms))


@settings(deadline=None, max_examples=400)
@given(spelled(), spelled())
def test_a_wrong_number_is_never_right_and_a_right_one_always(one, other):
    (value, answer), (wanted, gold) = one, other
    assert accuracy_reward(answer, make("math", gold)) == (value == wanted)
    near = abs(value - wanted) <= abs(wanted) / 1000 if wanted else abs(value) < Fraction(1, 100_000)
    assert bool(grade(make("numerical", gold), f"<answer>{answer}</answer>")["correct"]) == near


@settings(deadline=None, max_examples=200)
@given(NUMBERS.flatmap(lambda value: st.tuples(spelled(st.just(value)), spelled(st.just(value)))))
def test_spellings_of_one_number_vote_together(pair):
    (_, one), (_, other) = pair
    for kind in ("math", "numerical"):
        assert canonical(one, make(kind, "7")) == canonical(other, make(kind, "7"))


def test_tiny_values_with_a_unit_vote_apart():
    votes = [canonical(text, make("math", "1")) for text in ("1.6e-19 C", "6.63e-34 J", "1.6e-19", "two thirds", "2/3")]
    assert votes[0] == votes[2] != votes[1] and votes[3] == votes[4]


UNITS = ["m", "kg", "s", "km/h", "m^2", "cm³", "°C", "m/s^2", "miles per hour", "percent"]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 999), st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_a_unit_keeps_its_value_and_excludes_others(value, unit, other):
    assert quantity(f"{value} {unit}").value == quantity(str(value)).value == value
    assert accuracy_reward(f"{value} {unit}", make("numerical", f"{value} {unit}")) == 1
    convertible = {frozenset(("km/h", "miles per hour"))}
    if unit != other and frozenset((unit, other)) not in convertible:
        assert accuracy_reward(f"{value} {unit}", make("numerical", f"{value} {other}")) == 0


@settings(deadline=None)
@given(
    st.sampled_from("ABCD"),
    st.sampled_from("ABCD"),
    st.sampled_from(["{}", "({})", "{}.", "答案是{}", "The answer is {}", "选{}。"]),
)
def test_a_wrong_letter_is_never_right(said, gold, form):
    assert accuracy_reward(form.format(said), make("multiple_choice", gold)) == (said == gold)
    assert grade(make("multiple_choice", gold), form.format(said))["correct"] == (said == gold)


@pytest.mark.parametrize(("answer", "graded", "exact"), [("4", 1, 1), ("4.003", 0.99925, 1), ("4.005", 0.99875, 0),
                                                         ("3", 0.75, 0), ("12", 0, 0), (None, 0, 0), ("four", 1, 1)])
def test_a_number_is_graded_or_exact(answer, graded, exact):
    sample = Sample("n", "visual", "train", "count", "How many?", "4", "numerical")
    assert accuracy_reward(answer, sample) == pytest.approx(graded)
    assert accuracy_reward(answer, sample, numerical="exact") == exact


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=5))
def test_rewards_in_0_to_1_combine_to_one_in_0_to_1(given_parts):
    """Without a clip: each rounded product is at most its weight, and both sums round alike."""
    parts = {str(k): reward for k, (reward, _) in enumerate(given_parts)}
    weights = {str(k): weight for k, (_, weight) in enumerate(given_parts)}
    total = sum(weights.values())
    reward = combine(parts, weights)
    assert 0 <= reward <= 1
    if total > 1e-9:
        assert reward == pytest.approx(np.average(list(parts.values()), weights=list(weights.values())), abs=1e-9)
