"""The accuracy reward, by problem type (paper, rewards)."""

from __future__ import annotations

import re
import unicodedata

from rapidfuzz.distance import Levenshtein

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import algebra
from megatron_avatar.rl.rewards.bounded import bounded
from megatron_avatar.rl.rewards.choices import choice_letter, normalise
from megatron_avatar.rl.rewards.numbers import quantity, readings
from megatron_avatar.rl.rewards.plain import CJK
from megatron_avatar.rl.rewards.symbolic import latex_equal, rouge

# Of scripts without blanks (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is a word, with its marks.
_NO_BLANKS = f"{CJK}\u3001-\u3003\u3008-\u301f\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"
_MARK = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3\u3099\u309a"
_WORD = re.compile(rf"[{_NO_BLANKS}][{_MARK}]*|[^\s{_NO_BLANKS}]+")
_FENCE = re.compile(r"^\s*```[^\n]*\n(.*?)\n?```\s*$", re.DOTALL)


def accuracy_reward(answer: str | None, sample: Sample, *, numerical: str = "graded") -> float:
    """Score in [0, 1] of an answer against `sample.answer`; an answer that was not parsed (None) scores 0.

    multiple_choice: the letter, case-folded. numerical: 1 - min(1, |x - gold| / |gold|), for gold 0 whether
    |x| < 1e-5, x in the gold's unit; with `numerical` "exact" (the released trainer's rule) 1 within a relative 1e-3,
    else 0. math: equality as expressions, statements, sets, intervals, matrices. ocr: 1 - word error rate, not below 0
    (each character is a word in scripts without blanks). free_form: mean F1 of ROUGE-1, -2 and -L. code: equality
    after normalising. other: exact text.
    """
    if answer is None:
        return 0.0
    match sample.problem_type:
        case "numerical":
            closeness = _closeness(answer, sample.answer)
            return closeness if numerical == "graded" else float(closeness >= 1 - 1e-3)
        case "math":
            return float(_same_mathematics(answer, sample.answer))
        case "ocr":
            words, gold = (_WORD.findall(unicodedata.normalize("NFKC", text)) for text in (answer, sample.answer))
            return max(0.0, 1.0 - Levenshtein.distance(words, gold) / len(gold)) if gold else float(not words)
        case "free_form":
            return bounded(rouge, answer, sample.answer) or 0.0
        case _:
            return float(canonical(answer, sample) == canonical(sample.answer, sample))


def canonical(answer: str, sample: Sample) -> str:
    """The form under which two answers to one question are the same answer (for equality and for voting)."""
    match sample.problem_type:
        case "multiple_choice":
            return choice_letter(answer, sample.choices) or normalise(answer)
        case "numerical":
            found, gold = quantity(answer), quantity(sample.answer)
            values = [] if found is None else [found.value] if gold is None else readings(found, gold)
            if not values:
                return normalise(answer)
            return f"{values[0] if gold is None else min(values, key=lambda x: abs(x - gold.value)):.12g}"
        case "math":
            return algebra.key(answer) or normalise(answer)
        case "code":
            fenced = _FENCE.match(answer)
            lines = (fenced.group(1) if fenced else answer).splitlines()
            return "\n".join(line.rstrip() for line in lines if line.strip())
        case _:
            return normalise(answer)


def _same_mathematics(answer: str, gold: str) -> bool:
    """By our own reading where both sides are understood, else by math-verify; words by their text."""
    if answer.split() == gold.split():
        return True
    if max(len(answer), len(gold)) > algebra.MAX_LENGTH:
        return False
    said, wanted = normalise(answer), normalise(gold)
    if said == wanted and wanted.replace(" ", "").isalpha():  # words, a choice's letter
        return True
    verdict = algebra.verdict(answer, gold)
    return bool(bounded(latex_equal, answer, gold)) if verdict is None else verdict


def _closeness(answer: str, gold: str) -> float:
    """1 - relative error in [0, 1], of the reading that is closest; 0 for what is no number or of another unit."""
    value, target = quantity(answer), quantity(gold)
    if value is None or target is None:
        return 0.0
    if target.value == 0:
        return float(any(abs(x) < 1e-5 for x in readings(value, target)))
    errors = (abs(x - target.value) / abs(target.value) for x in readings(value, target))
    return max((1.0 - min(1.0, error) for error in errors), default=0.0)
