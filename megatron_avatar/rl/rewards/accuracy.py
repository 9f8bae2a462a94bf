"""The accuracy reward, by problem type (paper, rewards)."""

from __future__ import annotations

import re
import unicodedata

from rapidfuzz.distance import Levenshtein

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import algebra
from megatron_avatar.rl.rewards.bounded import bounded
from megatron_avatar.rl.rewards.numbers import quantity, readings
from megatron_avatar.rl.rewards.symbolic import latex_equal, rouge

_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:)]?(?:\s+(.*))?", re.DOTALL)
_WRAPPED = re.compile(
    r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\*\*(.+?)\*\*|`([^`]+)`|\$([^$]+)\$", re.DOTALL
)
_LEAD = re.compile(
    r"\A\s*(?:(?:so|thus|therefore|hence)\b[,:]?\s+)?(?:(?:i\s+(?:choose|pick|select)|it\s+is|it's)\s+|"
    r"(?:the\s+|my\s+)?(?:(?:correct|right|final|best)\s+)*(?:answer|choice|option)\b(?:\s+is\b)?\s*[:=]?\s*)"
    r"(?:(?:the\s+)?(?:option|choice|letter)\s+)?",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^\s*```[^\n]*\n(.*?)\n?```\s*$", re.DOTALL)


def accuracy_reward(answer: str | None, sample: Sample, *, numerical: str = "graded") -> float:
    """Score in [0, 1] of an answer against `sample.answer`; an answer that was not parsed (None) scores 0.

    multiple_choice: the letter, case-folded. numerical: 1 - min(1, |x - gold| / |gold|), for gold 0 whether
    |x| < 1e-5, x in the gold's unit; with `numerical` "exact" (the released trainer's rule) 1 within a relative 1e-3,
    else 0. math: equality as expressions, sets, intervals, matrices. ocr: 1 - word error rate, not below 0. free_form:
    mean F1 of ROUGE-1, -2 and -L. code: equality after normalising. other: exact text.
    """
    if answer is None:
        return 0.0
    match sample.problem_type:
        case "numerical":
            closeness = _closeness(answer, sample.answer)
            return closeness if numerical == "graded" else float(closeness >= 1 - 1e-3)
        case "math":
            same = answer.split() == sample.answer.split() or algebra.equal(answer, sample.answer)
            short = max(len(answer), len(sample.answer)) <= algebra.MAX_LENGTH
            return float(same or (short and bool(bounded(latex_equal, answer, sample.answer))))
        case "ocr":
            words, gold = (unicodedata.normalize("NFKC", text).split() for text in (answer, sample.answer))
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


def choice_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    r"""The capital letter of `B`, `(b)`, `B. second choice`, `The answer is **B**`, `\boxed{B}` or `second choice`;
    None for anything else.

    A lone letter that numbers a choice is that choice, even where another choice's text is this letter. One that
    is followed by other words than its own choice's text, or by a second choice, names none.
    """
    answer = _WRAPPED.sub(lambda match: next(g for g in match.groups() if g is not None), answer).strip()
    return _bare_letter(answer, choices) or _bare_letter(_LEAD.sub("", answer, count=1), choices)


def _bare_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    texts = [normalise(choice) for choice in choices]
    match = _LETTER.fullmatch(answer.strip().strip("*\"'"))
    letter, text = (match.group(1).upper(), match.group(2)) if match else (None, None)
    index = ord(letter) - ord("A") if letter else len(texts)
    if letter and text is None and (index < len(texts) or not texts):
        return letter
    if normalise(answer) in texts:
        return chr(ord("A") + texts.index(normalise(answer)))
    if text is None or index >= len(texts):
        return None
    said, own = normalise(text), texts[index]
    if said == own:
        return letter
    rest = said.removeprefix(own)
    if not own or rest == said or re.match(r"\w", rest):  # `B. blue squares` is not `blue square`
        return None
    others = [other for k, other in enumerate(texts) if k != index and other]
    named = [other for other in others if re.search(rf"(?<!\w){re.escape(other)}(?!\w)", rest)]
    letters = {chr(ord("a") + k) for k in range(len(texts)) if k != index} - {"a", "i"}  # an article, a pronoun
    return None if named or letters & set(re.findall(r"\b[a-z]\b", rest)) else letter


def normalise(text: str) -> str:
    """Case-folded, compatibility-composed, single-spaced, without punctuation at either end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`()[]*") or text


def _closeness(answer: str, gold: str) -> float:
    """1 - relative error in [0, 1], of the reading that is closest; 0 for what is no number or of another unit."""
    value, target = quantity(answer), quantity(gold)
    if value is None or target is None:
        return 0.0
    if target.value == 0:
        return float(any(abs(x) < 1e-5 for x in readings(value, target)))
    errors = (abs(x - target.value) / abs(target.value) for x in readings(value, target))
    return max((1.0 - min(1.0, error) for error in errors), default=0.0)
