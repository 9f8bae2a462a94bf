"""What runs in the workers of bounded.py: LaTeX mathematics by math-verify, summaries by rouge_score."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
DECIMALS = 12  # to which math-verify rounds; its default of 6 makes all small constants 0
RELATIVE = 1e-6  # of numbers below those decimals
MAX_WORD = 64  # letters; a longer one has no stem
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def latex_equal(answer: str, gold: str) -> bool:
    """math-verify's verdict on two answers in LaTeX or plain notation: sets, intervals, matrices, inequalities too."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no clock of its own: ours kills
    sides = [parse(text if "$" in text else f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    equal = all(sides) and bool(
        verify(*sides, float_rounding=DECIMALS, allow_set_relation_comp=True, timeout_seconds=None)
    )
    return equal and not _differ_below(*(side[0] for side in sides))


def _differ_below(gold: Any, answer: Any) -> bool:
    """Whether two numbers that math-verify rounds to zero are different: 1/2004! and 1/2006! are."""
    numbers = [getattr(value, "is_number", False) for value in (gold, answer)]
    if not all(numbers) or gold == answer or not 0 < abs(gold) < 10**-DECIMALS:
        return False
    return bool(abs((answer / gold).evalf() - 1) > RELATIVE)


def rouge(answer: str, gold: str) -> float:
    """Mean F1 in [0, 1] of ROUGE-1, -2 and -L, stemmed; of text beyond ASCII by words, of Chinese and Japanese by
    characters. Without ROUGE-2 for a gold of one word, which has no pair of words to find."""
    from rapidfuzz.distance import LCSseq

    tokenize = _words if answer.isascii() and gold.isascii() else _characters
    said, wanted = tokenize(answer), tokenize(gold)
    scores = _scorer().score(" ".join(wanted), " ".join(said))
    f1 = [scores["rouge1"].fmeasure]
    if len(wanted) != 1:
        f1.append(scores["rouge2"].fmeasure)
    common = LCSseq.similarity(wanted, said)  # as ROUGE-L has it, without its table of all pairs
    f1.append(2 * common / (len(said) + len(wanted)) if said and wanted else 0.0)
    return min(1.0, sum(f1) / len(f1))


def _characters(text: str) -> list[str]:
    return _TOKEN.findall(text.casefold())


def _words(text: str) -> list[str]:
    """rouge_score's: small letters and digits, those of more than three letters stemmed."""
    return [_stem(word) if 3 < len(word) <= MAX_WORD else word for word in re.findall("[a-z0-9]+", text.lower())]


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class _Split:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2"], tokenizer=_Split())
