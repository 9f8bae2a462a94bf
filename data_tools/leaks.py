"""Does a hint give the answer away? (paper, "Hints": a strategy, not the solution.)"""

from __future__ import annotations

import math
import re
import string
from functools import lru_cache

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.choices import choice_letter, normalise
from megatron_avatar.rl.rewards.http_judge import gold_text
from megatron_avatar.rl.rewards.numbers import number_words, quantity, values
from megatron_avatar.rl.rewards.plain import compose, unwrap

MAX_WORDS = 45
MAX_CHARACTERS = 600
PARAPHRASE = 0.6  # share of a long answer's content words that tells it
_EMPTY = set("a an the of to in on at is are was were be it its and or with by for from as that this there".split())
_TIMES = {
    "once": 1, "single": 1, "twice": 2, "pair": 2, "both": 2, "double": 2, "duo": 2, "couple": 2, "thrice": 3,
    "trio": 3, "triple": 3, "quartet": 4, "dozen": 12, "half a dozen": 6, "half": 0.5, "quarter": 0.25, "none": 0,
    "nothing": 0, "never": 0,
}  # fmt: skip
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_NAMED = re.compile(  # in brackets or quotes, or after `option`
    r"[(\[\"']([A-Za-z])[)\]\"']|(?:\b(?:option|choice|answer|letter)s?\b[\s:=]*(?:is\b\s*)?|答案[是为:]?|选项?)"
    r"[\"'(\[]?([A-Za-z])(?![A-Za-z0-9_])"
)
_ALONE = re.compile(r"(?<![A-Za-z0-9_])([A-Z])(?![A-Za-z0-9_'])")  # beside ideographs too
_CLOSED = re.compile(r"(?<![A-Za-z0-9_])([AI])(?=\s*(?:[^\w\s']|$))")  # no word follows: neither article nor pronoun
_CARDINALS = "|".join(map(number_words, range(1, 13)))
_PLACED = re.compile(
    rf"\b(last|{'|'.join(_ORDINALS[1:])}|\d+(?:st|nd|rd|th))\s+(?:option|choice|answer|alternative)\b|"
    rf"\b(?:option|choice|answer|alternative)\s+(?:number\s+|no\.?\s*|#\s*)?(\d+|{_CARDINALS})\b|"
    r"第([一二三四五六七八九十]|\d+)个?(?:选项|答案)"
)
_IN_TEXT = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s+(.*?)(?=\s+\(?[A-Z][.):]\s|\s*$)", re.DOTALL)


def leak(hint: str, sample: Sample) -> str | None:
    """Why the hint may not be used, in few words; None for one that may.

    Refused: the answer in its own words, normalised, or by most of its content words (stems, in any order); the correct
    choice's letter or place; every choice but the correct one; a number's value in digits or words. Also more than one
    short sentence, and markup. Other words of the same meaning are left to the teacher's prompt.
    """
    hint = compose(hint)
    words = hint.split()
    if not words:
        return "empty"
    if len(words) > MAX_WORDS or len(hint) > MAX_CHARACTERS or len(re.findall(r"[.!?](?=\s+\S)", hint)) > 1:
        return "not one short sentence"
    if re.search(r"[<>{}|]|```", hint):
        return "markup"
    hint = unwrap(hint)
    if sample.problem_type == "multiple_choice":
        return _names_choice(hint, sample)
    if sample.problem_type in ("numerical", "math") and (gold := quantity(sample.answer)) is not None:
        return "names the number" if _named(gold.value, hint) or _spells(hint, gold.value) else None
    return "names the answer" if _tells(hint, sample.answer) else None


def _names_choice(hint: str, sample: Sample) -> str | None:
    choices = sample.choices or _choices_in(sample.question)
    letter = choice_letter(sample.answer, choices)
    letters = string.ascii_uppercase[: len(choices) or 26]
    named = {(a or b).upper() for a, b in _NAMED.findall(hint)} | _placed(hint, len(choices)) & set(letters)
    alone = set(_ALONE.findall(hint))
    named |= (alone - {"A", "I"}) | set(_CLOSED.findall(hint))
    named &= set(letters)
    if letter in named and named | alone < set(letters):
        return "names the correct letter"
    told = {k for k, choice in zip(letters, choices, strict=False) if _tells(hint, choice)}
    if not choices:
        return "names the answer" if _tells(hint, gold_text(sample)) and len(sample.answer) > 1 else None
    told |= named
    if letter in told and told | alone < set(letters):
        return "names the correct choice"
    if len(letters) > 2 and told == set(letters) - {letter}:
        return "names every choice but the correct one"
    return None


def _choices_in(question: str) -> tuple[str, ...]:
    """The choices that a question brings in its own text, lettered from A on; () without such."""
    found = _IN_TEXT.findall(question)
    letters = "".join(letter for letter, _ in found)
    return tuple(text for _, text in found) if len(found) > 1 and string.ascii_uppercase.startswith(letters) else ()


def _placed(hint: str, count: int) -> set[str]:
    """Letters of the choices that a hint names by their place: `the second option`, `choice 2`."""
    places = set()
    for ordinal, number, numeral in _PLACED.findall(hint.casefold()):
        if ordinal == "last":
            places.add(count)
        elif ordinal in _ORDINALS:
            places.add(_ORDINALS.index(ordinal))
        elif found := quantity(numeral or number or ordinal[:-2]):
            places.add(int(found.value))
    return {string.ascii_uppercase[place - 1] for place in places if 0 < place <= 26}


def _tells(hint: str, answer: str) -> bool:
    """The answer's words stand in the hint, as they are or most of the content words in any order."""
    said, gold = normalise(hint), normalise(answer)
    if not gold:
        return False
    letter_by_letter = re.sub(r"(?<=\b\w)[\W_]+(?=\w\b)", "", said)  # v-i-o-l-i-n
    if any(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text) for text in (said, letter_by_letter)):
        return True
    value = quantity(answer)
    if value is not None and re.fullmatch(r"[\W\d]*|[a-z-]+", gold) and _named(value.value, hint):
        return True
    content = {_stem(word) for word in re.findall(r"\w+", gold) if word not in _EMPTY}
    found = content & {_stem(word) for word in re.findall(r"\w+", said)}
    return bool(content) and len(found) >= (len(content) if len(content) < 3 else PARAPHRASE * len(content))


def _named(value: float, hint: str) -> bool:
    return any(math.isclose(value, named, rel_tol=1e-6) for named in _values(hint))


def _values(hint: str) -> set[float]:
    """Every number that the hint names: digits, number words (`two dozen`, `三个`), ordinals, `twice`."""
    found = values(hint)
    found |= {float(value) for word, value in _TIMES.items() if re.search(rf"\b{word}\b", hint, re.IGNORECASE)}
    found |= {float(k) for k, word in enumerate(_ORDINALS) if re.search(rf"\b{word}\b", hint, re.IGNORECASE)}
    found |= {float(k) for k, pattern in enumerate(_number_patterns()) if pattern.search(hint)}
    for token in re.findall(r"[-+]?\d[\d,./]*(?:\s?[x×]\s?10\^?-?\d+|e-?\d+)?%?|\d+(?:st|nd|rd|th)\b", hint):
        named = quantity(re.sub(r"(?:st|nd|rd|th)$", "", token.rstrip(".,/")))
        if named is not None:
            found |= {named.value, named.value / 100} if named.unit == "%" else {named.value}
    return found


@lru_cache(maxsize=1)
def _number_patterns() -> list[re.Pattern[str]]:
    return [_number_pattern(k) for k in range(101)]


def _spells(hint: str, value: float) -> bool:
    """Whether a whole number stands in the hint in words, however large."""
    return value.is_integer() and abs(value) < 1e15 and _number_pattern(int(value)).search(hint) is not None


def _number_pattern(value: int) -> re.Pattern[str]:
    words = number_words(value).replace(" and ", "(?: and)? ").replace("-", "[- ]").replace(",", ",?")
    return re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE)


@lru_cache(maxsize=4096)
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem(word)
