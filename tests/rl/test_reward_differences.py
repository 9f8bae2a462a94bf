r"""Our reading of answers beside math-verify's and lmms-eval's: where they differ, and why.

Every case has been graded by a person (reward_readings.py),
so each difference is an answer that one of the readers gets
wrong. A new class of differences fails these tests until it is explained here, and so does one that is gone.
"""

import ast
import importlib.util
import logging
import random
import re
from pathlib import Path

import pytest
from math_verify import parse, verify

from eval.scoring.open_answers import same
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import grade, read_answer
from tests.rl.reward_readings import INSTRUMENTS, READINGS, UNTAGGED

# ---- math-verify 0.9.0 -----------------------------------------------------------------------------------------

MATH = {kind: (gold, right, wrong) for kind, of, gold, right, wrong in READINGS if of == "math"}
# Kinds in which math-verify differs from a person; in all others it doesn't.
MATH_VERIFY = {
    "names of a value": "of an equation that it meets where a value is asked it takes the last side: 2x = 9 is 9",
    "named values": "names are dropped and the values sorted: (5,3) is x=3, y=5; cases aren't read",
    "several solutions": "numbered unknowns and `或` aren't read",
    "functions": "f(x) and y are two functions, and f(t) isn't f(x)",
    "plus or minus": "± is LaTeX's alone",
    "orders": "inequalities are not compared up to a factor: 2x > 6",
    "tiny values": "1e-12 is a product with e, Unicode's exponents aren't read",
    "values that cancel": "an equation's last side again: 3x - y = 0 is 0; sums of decimals are rounded",
    "mixed numbers": "in plain text and Unicode they aren't read, and 2(1/4) is one",
    "a product is no mixed number": "2(1/4) is a mixed number",
    "commas inside of brackets": "full-width brackets aren't read",
    "commas outside of brackets": "thin spaces and blanks, prices and `x = 1,234` aren't read as thousands",
    "sets and tuples": "a tuple's elements may be a set's",
    "intervals": "infinity may be closed; ∞ isn't read",
    "the empty set": r"\varnothing isn't \emptyset",
    "Markdown and wrappers": "they stay on, and so do lead-ins in Chinese; full-width digits aren't read",
    "Unicode": "², ½ and · aren't read",
    "roots, pi, infinity": "√ and π aren't read side by side",
    "rounded decimals": "⅓ isn't read",
    "percentages": "½ isn't read",
    "units": "units are dropped: 5 cm is 5 m is 5 kg",
    "spelt numbers": "words aren't read",
    "functions without brackets": "a function's letters without a backslash are a product",
    "degrees": "units are dropped: 30 m is 30°",
    "words": "capitals count in words",
}


def math_verify(answer, gold):
    """As its own documentation calls it, but for the clock."""
    sides = [parse(text if re.search(r"\$|\\boxed", text) else f"${text}$", parsing_timeout=None) for text in (gold,
    answer)]
    return all(sides) and bool(verify(*sides, timeout_seconds=None))


@pytest.mark.slow
def test_math_verify_differs_where_we_say(caplog):
    caplog.set_level(logging.CRITICAL)
    differs = set()
    for kind, (gold, right, wrong) in MATH.items():
        told = [math_verify(answer, gold) for answer in right + wrong]
        if told != [True] * len(right) + [False] * len(wrong):
            differs.add(kind)
    assert differs == set(MATH_VERIFY)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("2x=9", "9", False),
        ("3x-y+13=0", "0", False),
        (r"(1,2)", r"\{1,2\}", False),
        ("5 cm", "5 m", False),
        ("1/2^{99}", "1/2^{98}", False),
        ("y=2x+1", "f(x)=2x+1", True),
        ("2x>6", "x>3", True),
        ("2 1/4", r"\frac{9}{4}", True),
        ("**73**", "73", True),
        ("x²", "x^2", True),
        ("1.6e-19", r"1.6\times10^{-19}", True),
        (r"\varnothing", r"\emptyset", True),
    ],
)
def test_one_difference_of_each_class(answer, gold, right, caplog):
    caplog.set_level(logging.CRITICAL)
    sample = Sample("id", "stage1", "train", "what", "?", gold, "math")
    assert math_verify(answer, gold) != right
    assert grade(sample, f"<answer>{answer}</answer>")["correct"] == right


# ---- lmms-eval 0.7.3 -------------------------------------------------------------------------------------------

# What its shared reader of choices (extract_mcq_answer) reads in the untagged replies where it differs, by reason.
LMMS_EVAL = {
    "texts of choices aren't read": [("The answer is a guitar.", ""), ("guitar", "")],
    "a capital at the head or end wins, whatever the sentence says": [
        ("A violin plays", "A"),
        ("Let me think about A.\n\n**B**", "A"),
        ("The answer is **B**. (A) is a distractor.", "A"),
        ("My answer: B\nExplanation: (A) piano is wrong", "A"),
        ("A quiet scene", "A"),
    ],
    "of several letters one is taken": [
        ("The answer is A or B", "B"),
        ("Either A or B", "B"),
        ("A. piano\nB. guitar\nC. drum\nD. violin", "A"),
        ("(A) piano or (B) guitar", "B"),
    ],
    "denials aren't read": [("The answer is not A", "A")],
    "a box is read like other words": [(r"(A)? No: \boxed{C}", "A")],
}
TASKS = Path(spec.origin).parent / "tasks" if (spec := importlib.util.find_spec("lmms_eval")) and spec.origin else None
installed = pytest.mark.skipif(TASKS is None,
reason="needs lmms-eval: pip install --no-deps -r requirements-lmms.txt")


def test_lmms_eval_differs_where_we_say():
    theirs = {reply: letter for cases in LMMS_EVAL.values() for reply, letter in cases}
    ours = dict(UNTAGGED)
    sample = Sample("id", "stage1", "train", "what", "?", "B", "multiple_choice", INSTRUMENTS)
    for reply, letter in theirs.items():
        assert read_answer(reply, sample) == ours[reply] != (letter or None)


@installed
def test_lmms_evals_reader_of_choices_is_as_recorded():
    extract = _functions(TASKS / "_task_utils" / "mcq_extract.py")["extract_mcq_answer"]
    theirs = {reply: letter for cases in LMMS_EVAL.values() for reply, letter in cases}
    for reply, letter in UNTAGGED:
        assert extract(reply, list("ABCD")) == theirs.get(reply, letter or ""), reply


@installed
def test_mmmus_reader_of_choices_guesses_where_ours_reads_nothing():
    """MMMU's own rules, which lmms-eval keeps, draw a letter at random where they read none."""
    reader = _functions(TASKS / "_task_utils" / "mmmu_mcq_utils.py")["parse_mmmu_multi_choice_response"]
    for reply in ("The answer is a guitar.", "I am not sure", "答案是（C）"):
        letters = set()
        for seed in range(20):
            random.seed(seed)
            letters.add(reader(reply, list("ABCD"), dict(zip("ABCD", INSTRUMENTS, strict=True))))
        assert len(letters) > 1


OPEN = [
    ("The result is 12,000 dollars", "12000"), ("So x = 4.0", "4"), ("x = 5, so it is 4", "5"), ("1.5e3", "1500"),
    ("a\nThe answer is 7\nx = 8", "7"), ("in D minor, I think", "d minor"), ("The key is C Major.", "c major"),
    ("0.333", "0.33"), ("0.336", "0.33"), ("-3.5 or 2", "2"), ("1.5.5e3", "5500"), ("12e", "12"), ("1,234,5", "1234"),
    (".5 kg", "0.5"), ("nothing", "no"), ("it has 3", "3"), ("is :", "3"),
]  # fmt: skip


@installed
def test_open_answers_are_compared_as_lmms_eval_compares_them():
    theirs = _functions(TASKS / "videommmu" / "utils.py", "parse_open_response", "extract_numbers", "check_is_number",
                        "normalize_str", "eval_open")  # fmt: skip
    for reply, gold in OPEN:
        assert same(reply, gold) == theirs["eval_open"](gold, theirs["parse_open_response"](reply)), (reply, gold)


def _functions(path, *names):
    """A file's functions, without what the package around them imports."""
    tree = ast.parse(path.read_text())
    kept = (ast.Assign, ast.AnnAssign) if not names else ()
    body = [node for node in tree.body if isinstance(node, kept) or _wanted(node, names)]
    space = {"re": re, "random": random}
    exec("import numpy as np\nfrom typing import *", space)
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space


def _wanted(node, names):
    return isinstance(node, ast.FunctionDef) and (not names or node.name in names)
