"""What runs in the workers of bounded.py: LaTeX mathematics by math-verify, summaries by rouge_score."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def latex_equal(answer: str, gold: str) -> bool:
    """math-verify's verdict on two answers in LaTeX or plain notation: sets, intervals, matrices, inequalities too."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no clock of its own: ours kills
    sides = [parse(text if "$" in text else f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return all(sides) and bool(verify(*sides, timeout_seconds=None))


def rouge(answer: str, gold: str) -> float:
    """Mean F1 in [0, 1] of ROUGE-1, -2 and -L, stemmed; of text beyond ASCII by words, of Chinese and Japanese by
    characters. Without ROUGE-2 for a gold of one word, which has no pair of words to find."""
    scorer = _scorer(answer.isascii() and gold.isascii())
    scores = scorer.score(gold, answer)
    if len(scorer._tokenizer.tokenize(gold)) == 1:
        del scores["rouge2"]
    return min(1.0, sum(score.fmeasure for score in scores.values()) / len(scores))


class _Tokenizer:
    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.casefold())


@lru_cache(maxsize=2)
def _scorer(ascii_only: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = None if ascii_only else _Tokenizer()
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True, tokenizer=tokenizer)
