"""Format, accuracy, agreement and judge rewards, and their weighted sum."""

import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import (
    CRITERIA,
    RuleJudge,
    accuracy_reward,
    combine,
    format_reward,
    grade,
    judge_reward,
    judge_rewards,
    parse,
    read_answer,
    score_group,
    self_rewards,
)
from megatron_avatar.rl.rewards.algebra import equal
from tests.rl.reward_cases import BY_TYPE, CHOICES, FORMAT
from tests.rl.reward_readings import INSTRUMENTS, UNTAGGED, UNTAGGED_OTHER

STAGE_3 = {"format": 0.2, "accuracy": 0.3, "self": 0.2, "judge": 0.3}
SCENE = {
    "judge": {
        "audio_grounding_score": {"expect": ["high tone"], "contradict": ["low tone"]},
        "visual_id_score": {"expect": ["red", "circle"], "contradict": ["blue", "green", "square"]},
    }
}


def make(problem_type, answer, choices=(), scene=None):
    return Sample("id", "stage1", "train", "what", "?", answer, problem_type, choices, scene=scene)


def wrap(answer, think="I see it."):
    return f"<think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("kind", BY_TYPE)
def test_every_type_has_cases_enough_and_two_fifths_of_them_fail(kind):
    cases = BY_TYPE[kind]
    assert len(cases) >= 25 and len({case[:2] for case in cases}) == len(cases)
    assert sum(reward < 0.5 for *_, reward in cases) >= 0.4 * len(cases)


@pytest.mark.parametrize(("kind", "answer", "gold", "reward"), [(k, *case) for k, v in BY_TYPE.items() for case in v])
def test_an_answer_earns_what_a_person_gave_it(kind, answer, gold, reward):
    sample = make(kind, gold, CHOICES if kind == "multiple_choice" else ())
    assert accuracy_reward(answer, sample) == pytest.approx(reward)


@pytest.mark.parametrize(("completion", "reward"), FORMAT)
def test_a_completion_has_the_format_that_a_person_saw(completion, reward):
    assert format_reward(completion) == reward


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "A", "3", " ", "\n", "red circle", "\\frac{1}{2}", "```", "<th",
     "1/2", "%", "10^", "½", " km", "\\boxed{", "}", "**", "not ", "answer is ", "\ud800", "²"]
)
TEXTS = st.one_of(st.text(), st.lists(FRAGMENTS, max_size=12).map("".join), st.text(max_size=40).map(wrap))


# format


@pytest.mark.parametrize(
    "text", [wrap("A"), "  <think>a\nb</think>\n\n<answer> B </answer>\n", wrap("x < y", "if a > b"), wrap("<b>")]
)
def test_the_format_is_a_think_block_then_an_answer_block(text):
    assert format_reward(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "<answer>A</answer>",
        "<think>a</think>",
        "<answer>A</answer><think>a</think>",  # order
        wrap("A") + " and more",
        "Well, " + wrap("A"),
        "<think>a</think> so <answer>A</answer>",
        wrap("A") + wrap("A"),  # repeated
        "<think>a</think><answer>A</answer><answer>B</answer>",
        "<think>a<answer>A</answer></think>",  # nested
        "<think><think>a</think></think><answer>A</answer>",
        "<think>a<answer>A</answer>",  # unclosed
        "<think>a</think><answer>A",
        "</think>a<think><answer>A</answer>",
        wrap(" "),  # empty
        wrap("A", "\n"),
        "<THINK>a</THINK><ANSWER>A</ANSWER>",
        "<think>a</think><answer>A</answer",
    ],
)
def test_anything_else_is_not_the_format(text):
    assert format_reward(text) == 0.0


def test_parse_reads_each_block_on_its_own():
    assert parse(wrap(" B ", " why ")) == ("why", "B")
    assert parse("so <answer>B</answer> it is") == (None, "B")
    assert parse("<think>a</think><answer>A</answer><answer>B</answer>") == ("a", None)
    assert parse("<think>say <answer>A</answer></think>") == (None, "A")


@settings(deadline=None)
@given(TEXTS)
def test_formatted_text_is_its_two_blocks(text):
    think, answer = parse(text)
    blocks = think is not None and answer is not None
    spelled = "".join(f"<think>{think}</think><answer>{answer}</answer>".split()) == "".join(text.split())
    assert format_reward(text) == float(blocks and spelled)


# accuracy



@pytest.mark.parametrize("answer", ["B", "b", "B.", "(b)", "b)", "B. blue square", "Blue square.", "B: blue square"])
def test_a_choice_is_its_letter_in_any_usual_spelling(answer):
    assert accuracy_reward(answer, make("multiple_choice", "B", CHOICES)) == 1.0
    assert accuracy_reward(answer, make("multiple_choice", "blue square", CHOICES)) == 1.0


def test_a_letter_numbers_a_choice_before_it_spells_one():
    spelled = make("multiple_choice", "A", ("B", "x", "y"))
    assert accuracy_reward("A", spelled) == 1.0 and accuracy_reward("B", spelled) == 0.0
    assert accuracy_reward("x", make("multiple_choice", "B", ("B", "x", "y"))) == 1.0  # X numbers none of three
    assert accuracy_reward("E", make("multiple_choice", "E")) == 1.0  # choices inside of the question's text


@pytest.mark.parametrize("answer", ["A", "", "A or B", "A B", "B. red circle", "Both", "square", "BB", "A, B, C"])
def test_hedges_and_other_choices_are_wrong(answer):
    assert accuracy_reward(answer, make("multiple_choice", "B", CHOICES)) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("4", "4", 1.0),
        ("3", "4", 0.75),
        ("5.0 beeps", "4", 0.75),
        ("-4", "4", 0.0),
        ("1,200", "1200", 1.0),
        ("100", "4", 0.0),
        ("0.000001", "0", 1.0),
        ("0.1", "0", 0.0),
        ("three or 4 or 5", "4", 0.0),
        ("three hundred", "300", 1.0),
        ("one hundred and five beeps", "105", 1.0),
        ("Two thousand, three hundred", "2300", 1.0),
        ("a hundred", "100", 1.0),
        ("twenty-one", "21", 1.0),
        ("twenty and one", "21", 0.0),
        ("twenty, one", "21", 0.0),
        ("one hundred, two", "102", 0.0),
        ("nineteen hundred", "19", 0.0),
        ("nan", "4", 0.0),
        ("inf", "4", 0.0),
        ("1e999", "4", 0.0),
    ],
)
def test_numbers_are_graded_by_relative_error(answer, gold, score):
    assert accuracy_reward(answer, make("numerical", gold)) == pytest.approx(score)


def test_text_is_scored_by_word_error_rate():
    sample = make("ocr", "one two three four")
    assert accuracy_reward("one two three four", sample) == 1.0
    assert accuracy_reward("one two too four", sample) == 0.75
    assert accuracy_reward("one three four five", sample) == 0.5
    assert accuracy_reward("a b c d e f g", sample) == 0.0


def test_free_text_is_scored_by_the_mean_rouge():
    sample = make("free_form", "a red circle moves left")
    assert accuracy_reward("a red circle moves left", sample) == pytest.approx(1.0)
    assert accuracy_reward("nothing here", sample) == 0.0
    # 3 of 5 words, 2 of 4 pairs, longest common subsequence of 3, at equal lengths F1 = precision = recall
    assert accuracy_reward("a red circle goes up", sample) == pytest.approx((3 / 5 + 2 / 4 + 3 / 5) / 3)


def test_code_and_other_text_are_compared_after_normalising():
    code = make("code", "def f(x):\n    return x")
    assert accuracy_reward("```python\ndef f(x):  \n\n    return x\n```", code) == 1.0
    assert accuracy_reward("def f(x):\nreturn x", code) == 0.0
    assert accuracy_reward(" To the  LEFT. ", make("other", "to the left")) == 1.0
    assert accuracy_reward("right", make("other", "to the left")) == 0.0


def test_no_answer_scores_nothing():
    for problem_type in ("multiple_choice", "numerical", "math", "ocr", "free_form", "code", "other"):
        assert accuracy_reward(None, make(problem_type, "0")) == 0.0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x**2 + 2*x + 1", "(x+1)^2"),
        ("\\frac{1}{2}", "0.5"),
        ("$\\frac{\\sqrt{2}}{2}$", "1/\\sqrt{2}"),
        ("x = 3", "3"),
        ("2x(x+1)", "2x^{2} + 2x"),
        ("\\boxed{\\sin(x)^2 + \\cos(x)^2}", "1"),
        ("\\sqrt[3]{27}", "3"),
        ("5√3", "5\\sqrt{3}"),
        ("√(x + 1)", "\\sqrt{x+1}"),
        ("√12", "2√3"),
        ("\\frac{\\sqrt3}{2}", "\\sqrt{0.75}"),
        ("1{,}000", "1000"),
        ("(1, \\frac{4}{2})", "(1, 2)"),
        ("2\\pi", "2*π"),
        ("e^{2}", "exp(2)"),
        ("90^\\circ", "90"),
    ],
)
def test_equal_expressions(left, right):
    assert equal(left, right) and equal(right, left)
    assert accuracy_reward(left, make("math", right)) == 1.0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x", "y"),
        ("x^2", "2x"),
        ("sqrt(x**2)", "x"),
        ("5√3", "5√2"),
        ("√12", "√1*2"),
        ("1000000", "1000001"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("x <= 3", "3"),
        ("1/0", "1/0 + 1"),
        ("", ""),
        ("__import__('os').getcwd()", "1"),
        ("9**9**9**9", "9**9**9"),
        ("(lambda: 1)()", "1"),
        ("[1][0]", "1"),
        ("-" * 390 + "1", "2"),
        ("(" * 300, "("),
    ],
)
def test_unequal_or_unreadable_expressions(left, right):
    assert not equal(left, right)


def test_numbers_too_small_for_decimals_are_compared_by_size():
    assert not accuracy_reward(r"\frac{1}{2006!}", make("math", r"\frac{1}{2004!}"))
    assert accuracy_reward(r"\frac{2}{2 \cdot 2004!}", make("math", r"\frac{1}{2004!}")) == 1.0


X, Y = sympy.symbols("x y")
EXPRESSIONS = st.recursive(
    st.sampled_from([X, Y, sympy.Integer(2), sympy.Integer(-3), sympy.Rational(1, 3)]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        inner.map(lambda e: (e + 1) ** 2),
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=50)
@given(EXPRESSIONS, EXPRESSIONS)
def test_equality_agrees_with_sympy(left, right):
    assert equal(str(left), str(right)) == (sympy.expand(left - right) == 0)
    for form in (sympy.expand(left), sympy.factor(left)):
        assert equal(str(left), str(form)) and equal(sympy.latex(left), str(form))


# agreement


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["A", "a.", "B", None], [1, 1, 0, 0]),
        (["A", "B"], [0, 0]),  # a tie has no majority
        (["A", "A", "B", "B", "C"], [0, 0, 0, 0, 0]),
        (["A", None, None], [1, 0, 0]),
        ([None, None], [0, 0]),
    ],
)
def test_agreement_with_the_majority(answers, rewards):
    assert self_rewards(answers) == rewards


def test_quantities_vote_by_what_they_measure():
    distance = make("numerical", "2 km")
    texts = [wrap(a) for a in ("2 km", "2000 m", "two", "2 kg", "2 miles")]
    votes = [parts["self"] for _, parts in score_group(distance, texts, {"self": 1.0})]
    assert votes == [1, 1, 1, 0, 0]
    half = [wrap(a) for a in ("50%", "0.5", "1/2", "50", "5%")]
    assert [parts["self"] for _, parts in score_group(make("numerical", "0.5"), half, {"self": 1.0})] == [1, 1, 1,
    0, 0]


def test_a_single_completion_is_masked():
    assert math.isnan(self_rewards(["A"])[0])


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.sampled_from("ABCD")), min_size=2, max_size=9), st.randoms())
def test_agreement_does_not_depend_on_order(answers, random):
    order = list(range(len(answers)))
    random.shuffle(order)
    rewards = self_rewards(answers)
    assert self_rewards([answers[i] for i in order]) == [rewards[i] for i in order]
    winners = {answer for answer, reward in zip(answers, rewards, strict=True) if reward}
    assert len(winners) <= 1 and None not in winners


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), st.sampled_from("ABC")), st.booleans()), min_size=2, max_size=9))
def test_agreement_counts_where_the_majority_is_right(group):
    """Against the paper's rule: the same where the majority is right, masked for all of the group elsewhere."""
    right = {answer: verdict for answer, verdict in group if answer is not None}  # one answer, one verdict
    answers = [answer for answer, _ in group]
    checked = [answer is not None and right[answer] for answer in answers]
    plain, votes = self_rewards(answers), self_rewards(answers, checked)
    if any(reward and verdict for reward, verdict in zip(plain, checked, strict=True)):
        assert votes == plain
    else:
        assert all(map(math.isnan, votes))


def test_a_few_that_agree_can_not_cancel_a_right_answer():
    sample = make("multiple_choice", "B", CHOICES)
    texts = [wrap("B"), wrap("A"), wrap("A"), wrap("A")]
    weights = {"format": 0.2, "accuracy": 0.4, "self": 0.4}  # published
    assert [r for r, _ in score_group(sample, texts, weights, self_reward="majority")] == pytest.approx([0.6] * 4)
    assert [r for r, _ in score_group(sample, texts, weights)] == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])
    # Without an accuracy reward agreement is all there is.
    assert [r for r, _ in score_group(sample, texts, {"self": 1.0})] == [0, 1, 1, 1]
    assert [r for r, _ in score_group(sample, [wrap("B"), wrap("B"), wrap("A")], weights)] == pytest.approx([1, 1,
    0.2])


# judge


def verdicts(text, scene=SCENE):
    [scores] = RuleJudge().score(make("other", "x", scene=scene), [text])
    return scores


def test_the_judge_scores_the_share_of_expected_words():
    scores = verdicts("The RED shape moves; a high tone sounds.")
    assert set(scores) == set(CRITERIA)
    assert scores["audio_grounding_score"] == 1.0 and scores["visual_id_score"] == 0.5
    assert math.isnan(scores["location_acc_score"])
    assert judge_reward(scores) == 0.75


def test_whole_words_count_and_phrases_keep_their_order():
    scores = verdicts("A tired tone, high encircled.")
    assert scores["audio_grounding_score"] == 0.0 and scores["visual_id_score"] == 0.0


def test_naming_everything_contradicts_itself():
    assert judge_reward(verdicts("red circle high tone")) == 1.0
    assert judge_reward(verdicts("red blue green circle square high tone low tone")) == 0.0
    assert verdicts("red " * 50)["visual_id_score"] == 0.5


@pytest.mark.parametrize("scene", [None, {}, {"judge": {}}, {"judge": {"visual_id_score": {"expect": []}}}])
def test_without_a_scene_there_is_no_verdict(scene):
    assert math.isnan(judge_reward(verdicts("red", scene)))


# the weighted sum


def test_a_group_is_scored_with_the_weights_of_its_stage():
    sample = make("multiple_choice", "B", CHOICES, SCENE)
    good = wrap("B", "a red circle and a high tone")
    texts = [good, wrap("blue square"), wrap("A"), "B"]
    scored = score_group(sample, texts, STAGE_3, judge_rewards(RuleJudge(), sample, texts))
    whole = {"format": 1.0, "accuracy": 1.0, "self": 1.0, "judge": 1.0, "correct": 1.0}
    assert scored[0] == (1.0, whole) and scored[1] == (pytest.approx(0.7), {**whole, "judge": 0.0})
    assert scored[2][0] == pytest.approx(0.2)
    # Rewards want the tags; evaluation would read the letter.
    assert scored[3] == (0.0, {"format": 0.0, "accuracy": 0.0, "self": 0.0, "judge": 0.0, "correct": 1.0})


def test_a_masked_parts_weight_is_shared_in_proportion():
    sample = make("multiple_choice", "B", CHOICES)  # no scene: no judge; one completion: no vote
    reward, parts = score_group(sample, [wrap("A")], STAGE_3, [math.nan])[0]
    assert math.isnan(parts["self"]) and math.isnan(parts["judge"])
    assert reward == pytest.approx(0.2 / (0.2 + 0.3))
    assert combine({"format": 1.0, "accuracy": 0.0}, STAGE_3) == pytest.approx(0.4)
    assert combine({"self": math.nan}, {"self": 1.0}) == 0.0


def test_a_judge_that_misses_one_completion_counts_for_none_of_its_group():
    """Masked alone it would earn more than the others, which the judge has marked down."""
    sample = make("multiple_choice", "B", CHOICES)
    texts = [wrap("B")] * 3
    scored = score_group(sample, texts, STAGE_3, [0.6, math.nan, 0.6])
    assert len({round(reward, 12) for reward, _ in scored}) == 1
    assert all(math.isnan(parts["judge"]) for _, parts in scored)
    assert [r for r, _ in score_group(sample, texts, STAGE_3, [0.6, 0.6, 0.6])] == pytest.approx([0.88] * 3)


def test_format_and_accuracy_are_measured_without_weight():
    sample = make("multiple_choice", "B", CHOICES, SCENE)
    weights = {"judge": 1.0, "accuracy": 0.0}
    reward, parts = score_group(sample, [wrap("B", "red circle, high tone")], weights, [1.0])[0]
    assert reward == 1.0 and parts["format"] == 1.0 and parts["accuracy"] == 1.0 and "self" not in parts


@pytest.mark.parametrize("weights", [{"fromat": 1.0}, {"format": -0.1}, {"accuracy": math.nan}])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(ValueError, match="rewards"):
        score_group(make("other", "x"), [], weights)


@settings(deadline=None)
@given(
    st.sampled_from(["multiple_choice", "numerical", "math", "ocr", "free_form", "code", "other"]),
    st.text(max_size=20),
    st.lists(TEXTS, max_size=4),
    st.dictionaries(st.sampled_from(["format", "accuracy", "self", "judge"]), st.floats(0, 10)),
    st.sampled_from(["right", "majority"]),
)
def test_any_text_scores_within_the_unit_interval(problem_type, gold, texts, weights, rule):
    sample = make(problem_type, gold, CHOICES if problem_type == "multiple_choice" else (), SCENE)
    verdicts = judge_rewards(RuleJudge(), sample, texts)
    scored = score_group(sample, texts, weights, verdicts, self_reward=rule)
    for text, (_, parts) in zip(texts, scored, strict=True):
        assert parts["correct"] == grade(sample, text)["correct"]
    assert len(scored) == len(texts)
    for reward, parts in scored:
        assert 0.0 <= reward <= 1.0 and {"format", "accuracy"} <= set(parts)
        assert all(math.isnan(value) or 0.0 <= value <= 1.0 for value in parts.values())


# grading


@pytest.mark.parametrize(
    ("text", "answer", "choices"),
    [
        (wrap("b"), "b", CHOICES),
        ("A blue square moves.", "B", CHOICES),  # the article is no letter
        ("I think that the answer is C", "C", CHOICES),
        ("(B) blue square", "B", CHOICES),
        ("B", "B", CHOICES),
        ("a red circle and a blue square", None, CHOICES),
        ("<answer>A</answer><answer>B</answer> (B)", None, CHOICES),
        ("nothing", None, CHOICES),
        ("It is not B, the answer is D", "D", CHOICES),
        ("The correct answer is (B)", "B", CHOICES),
        ("Based on the sound", None, CHOICES),
        ("The correct answer is (B)", "B", ()),
        ("(A) is out. The answer is B", "B", ()),
        ("A. one\nB. two", None, ()),
        ("B. It stops", "B", ()),
        *[(text, letter, INSTRUMENTS) for text, letter in UNTAGGED],
    ],
)
def test_an_untagged_reply_is_read_if_it_names_one_choice(text, answer, choices):
    assert read_answer(text, make("multiple_choice", "B", choices)) == answer


@pytest.mark.parametrize(("problem_type", "text", "answer"), UNTAGGED_OTHER)
def test_an_untagged_reply_is_what_it_states_last(problem_type, text, answer):
    assert read_answer(text, make(problem_type, "5")) == answer


def test_grading_counts_only_right_answers():
    three = make("numerical", "4")
    assert grade(three, wrap("4")) == {
        "text": wrap("4"), "answer": "4", "accuracy": 1.0, "correct": 1.0, "format": 1.0
    }  # fmt: skip
    assert grade(three, wrap("3"))["accuracy"] == 0.75 and grade(three, wrap("3"))["correct"] == 0.0
    assert grade(three, "There are 4.")["correct"] == 1.0 and grade(three, "There are 4.")["format"] == 0.0
    assert grade(three, "1 2 3 4")["answer"] is None
    assert grade(make("free_form", "a red circle moves left"), "a red circle moves")["correct"] == 1.0
    assert grade(make("other", "left"), "")["answer"] is None


@settings(deadline=None)
@given(st.sampled_from(["multiple_choice", "numerical", "other"]), TEXTS)
def test_any_text_can_be_graded(problem_type, text):
    graded = grade(make(problem_type, "B", CHOICES), text)
    assert graded["correct"] in (0.0, 1.0) and (graded["answer"] is not None or graded["accuracy"] == 0.0)
