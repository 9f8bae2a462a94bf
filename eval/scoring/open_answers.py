"""Open answers as MMMU's and Video-MMMU's owners compare them: phrases of the reply that may hold the answer, numbers
to two decimals, texts in small letters."""

from __future__ import annotations

import ast
import re

# A line's answer is what follows the last of one of these: the shortest such tail.
_LEADS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total ", "total ",
    "identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as ",
    "found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has ",
)  # fmt: skip
_NUMBERS = (  # the owners', each digit looked at once: a match begins and ends where its digits do
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++",
    r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])",
)


def same(reply: str, gold: str) -> bool:
    """Whether the reply holds the gold, or one of several that are written as a Python list: a number as a number, a
    text as a part of a phrase."""
    golds = {form for one in _golds(gold) for form in _forms(one)}
    said = {form for phrase in candidates(reply) for form in _forms(phrase)}
    return any(
        form in golds if isinstance(form, float) else any(isinstance(g, str) and g in form for g in golds)
        for form in said
    )


def candidates(reply: str) -> list[str]:
    """The tail of each line behind a word that leads to an answer (`=` too in the last line), without such words the
    whole reply; and every number in these."""
    lines = reply.strip().strip(".").lower().split("\n")
    tails = []
    for number, line in enumerate(lines):
        leads = (*_LEADS, "=") if number == len(lines) - 1 else _LEADS
        found = [line.rpartition(lead)[2].strip() for lead in leads if lead in line]
        tail = min(filter(None, found), key=len, default="")
        if tail and tail not in tuple(":,.!?;'"):
            tails.append(tail)
    tails = tails or ["\n".join(lines)]
    return tails + [number for tail in tails for pattern in _NUMBERS for number in re.findall(pattern, tail)]


def _golds(gold: str) -> list[str]:
    if gold.startswith("["):
        try:
            return [str(one) for one in ast.literal_eval(gold)]
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            pass  # a text that begins with a bracket
    return [gold]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or the text in small letters; a single character only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
