"""The accuracy reward, by problem type (paper, rewards)."""

from __future__ import annotations

import math
import re
import unicodedata
from functools import lru_cache
from typing import Any

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import algebra

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:)]?(?:\s+(.*))?", re.DOTALL)
_FENCE = re.compile(r"^\s*```[^\n]*\n(.*?)\n?```\s*$", re.DOTALL)


def accuracy_reward(answer: str | None, sample: Sample, *, numerical: str = "graded") -> float:
    """Score in [0, 1] of an answer against `sample.answer`; an answer that was not parsed (None) scores 0.

    multiple_choice: the letter, case-folded. numerical: 1 - min(1, |x - gold| / |gold|), for gold 0 whether
    |x| < 1e-5; with `numerical` "exact" (the released trainer's rule) 1 within a relative 1e-3, else 0.
    math: equality as expressions. ocr: 1 - word error rate, not below 0. free_form: mean F1 of ROUGE-1, -2
    and -L. code: equality after normalising. other: exact text.
    """
    if answer is None:
        return 0.0
    match sample.problem_type:
        case "numerical":
            closeness = _relative(number(answer), number(sample.answer))
            return closeness if numerical == "graded" else float(closeness >= 1 - 1e-3)
        case "math":
            same_text = answer.split() == sample.answer.split()
            return float(same_text or algebra.equal(answer, sample.answer))
        case "ocr":
            return _word_accuracy(answer.split(), sample.answer.split())
        case "free_form":
            scores = _rouge().score(sample.answer, answer).values()
            return min(1.0, sum(score.fmeasure for score in scores) / 3)
        case _:
            return float(canonical(answer, sample) == canonical(sample.answer, sample))


def canonical(answer: str, sample: Sample) -> str:
    """The form under which two answers to one question are the same answer (for equality and for voting)."""
    match sample.problem_type:
        case "multiple_choice":
            return choice_letter(answer, sample.choices) or normalise(answer)
        case "numerical":
            value = number(answer)
            return normalise(answer) if value is None else f"{value:.12g}"
        case "code":
            fenced = _FENCE.match(answer)
            lines = (fenced.group(1) if fenced else answer).splitlines()
            return "\n".join(line.rstrip() for line in lines if line.strip())
        case _:
            return normalise(answer)


def choice_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    """The capital letter of `B`, `(b)`, `B.`, `B. second choice` or `second choice`; None for anything else.

    A lone letter that numbers a choice is that choice, even where another choice's text is this letter. One that
    is followed by the text of another choice names no choice.
    """
    texts = [normalise(choice) for choice in choices]
    match = _LETTER.fullmatch(answer.strip())
    letter, text = (match.group(1).upper(), match.group(2)) if match else (None, None)
    index = ord(letter) - ord("A") if letter else len(texts)
    if letter and text is None and (index < len(texts) or not texts):
        return letter
    if normalise(answer) in texts:
        return chr(ord("A") + texts.index(normalise(answer)))
    return letter if text is not None and index < len(texts) and texts[index] == normalise(text) else None


def number(answer: str) -> float | None:
    """The only number in the text (thousands separators dropped), or None: two numbers are no answer."""
    found = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer))
    value = float(found[0]) if len(found) == 1 else math.nan
    return value if math.isfinite(value) else None


def normalise(text: str) -> str:
    """Case-folded, compatibility-composed, single-spaced, without punctuation at either end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`()[]*") or text


def _relative(value: float | None, gold: float | None) -> float:
    if value is None or gold is None:
        return 0.0
    if gold == 0:
        return float(abs(value) < 1e-5)
    return 1.0 - min(1.0, abs(value - gold) / abs(gold))


def _word_accuracy(words: list[str], gold: list[str]) -> float:
    """1 - Levenshtein distance in words over the gold's length, not below 0."""
    if not gold:
        return float(not words)
    row = list(range(len(words) + 1))
    for i, expected in enumerate(gold, 1):
        diagonal, row[0] = row[0], i
        for j, word in enumerate(words, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != expected))
    return max(0.0, 1.0 - row[-1] / len(gold))


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import, and only free_form needs it

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
