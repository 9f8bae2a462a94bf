"""Does a hint give the answer away? (paper, "Hints": a strategy, not the solution.)"""

from __future__ import annotations

import re
import string
from functools import lru_cache

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.accuracy import choice_letter, normalise
from megatron_avatar.rl.rewards.http_judge import gold_text
from megatron_avatar.rl.rewards.numbers import number_words, quantity

MAX_WORDS = 45
PARAPHRASE = 0.6  # share of a long answer's content words that tells it
_EMPTY = set("a an the of to in on at is are was were be it its and or with by for from as that this there".split())
_TIMES = {"once": 1, "single": 1, "twice": 2, "pair": 2, "both": 2, "double": 2, "couple": 2, "thrice": 3, "triple": 3}
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def leak(hint: str, sample: Sample) -> str | None:
    """Why the hint may not be used, in few words; None for one that may.

    Refused: the answer in its own words, normalised, or by most of its content words (stems, in any order); the correct
    choice's letter; every choice but the correct one; a number's value in digits or words. Also more than one short
    sentence, and markup.
    """
    words = hint.split()
    if not words:
        return "empty"
    if len(words) > MAX_WORDS or len(re.findall(r"[.!?](?=\s+\S)", hint)) > 1:
        return "not one short sentence"
    if re.search(r"[<>{}|]|```", hint):
        return "markup"
    if sample.problem_type == "multiple_choice":
        return _names_choice(hint, sample)
    if sample.problem_type in ("numerical", "math") and (gold := quantity(sample.answer)) is not None:
        return "names the number" if gold.value in _values(hint) else None
    return "names the answer" if _tells(hint, sample.answer) else None


def _names_choice(hint: str, sample: Sample) -> str | None:
    letter = choice_letter(sample.answer, sample.choices)
    letters = string.ascii_uppercase[: max(len(sample.choices), 2)]
    # As a letter: in brackets, after `option`, or alone in capitals, where it is no article or pronoun.
    named = set(re.findall(r"[(\[]([A-Z])[)\]]|\b(?:option|choice|answer|letter)s?\s+(?:is\s+)?([A-Za-z])\b", hint))
    alone = set(re.findall(r"\b([A-Z])\b(?!')", hint))
    named = {(a or b).upper() for a, b in named} | (alone - {"A", "I"})
    named &= set(letters)
    if letter in named and named | alone < set(letters):
        return "names the correct letter"
    told = {k for k, choice in zip(letters, sample.choices, strict=False) if _tells(hint, choice)}
    if not sample.choices:
        return "names the answer" if _tells(hint, gold_text(sample)) and len(sample.answer) > 1 else None
    told |= named
    if letter in told and told | alone < set(letters):
        return "names the correct choice"
    if len(letters) > 2 and told == set(letters) - {letter}:
        return "names every choice but the correct one"
    return None


def _tells(hint: str, answer: str) -> bool:
    """The answer's words stand in the hint, as they are or most of the content words in any order."""
    said, gold = normalise(hint), normalise(answer)
    if not gold:
        return False
    if re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", said):
        return True
    value = quantity(answer)
    if value is not None and re.fullmatch(r"[\W\d]*|[a-z-]+", gold) and value.value in _values(hint):
        return True
    content = {_stem(word) for word in re.findall(r"\w+", gold) if word not in _EMPTY}
    found = content & {_stem(word) for word in re.findall(r"\w+", said)}
    return bool(content) and len(found) >= (len(content) if len(content) < 3 else PARAPHRASE * len(content))


def _values(hint: str) -> set[float]:
    """Every number that the hint names: digits, number words, ordinals, `twice`."""
    values = {float(_TIMES[word]) for word in re.findall(r"[a-z]+", hint.casefold()) if word in _TIMES}
    values |= {float(k) for k, word in enumerate(_ORDINALS) if re.search(rf"\b{word}\b", hint, re.IGNORECASE)}
    values |= {float(k) for k, pattern in enumerate(_number_patterns()) if pattern.search(hint)}
    for token in re.findall(r"[-+]?\d[\d,./]*(?:\s?[x×]\s?10\^?-?\d+|e-?\d+)?%?|\d+(?:st|nd|rd|th)\b", hint):
        found = quantity(re.sub(r"(?:st|nd|rd|th)$", "", token.rstrip(".,/")))
        if found is not None:
            values |= {found.value, found.value / 100} if found.unit == "%" else {found.value}
    return values


@lru_cache(maxsize=1)
def _number_patterns() -> list[re.Pattern[str]]:
    spelled = [number_words(k).replace("-", "[- ]") for k in range(101)]
    return [re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE) for words in spelled]


@lru_cache(maxsize=4096)
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem(word)
