"""Numbers that are spelt, in English or Chinese, as digits: cardinals, fractions, multiples, signs."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_WORDS = 16  # of one number
_CARDINALS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES = _CARDINALS | {
    "dozen": 12, "lakh": 10**5, "crore": 10**7, "k": 1000, "mn": 10**6, "mln": 10**6, "bn": 10**9, "tn": 10**12,
    "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20, "hundredth": 100,
    "thousandth": 1000, "millionth": 10**6,
}  # fmt: skip
_LARGE = "hundred|thousand|million|billion|trillion"
_PART = "|".join(_PARTS)

_PRONOUN = re.compile(
    r"\b(no|the|this|that|which|each|every|any|another|some|other|either|neither)[\s-]one\b"
    rf"(?![\s-](?:{_LARGE}|{_PART})\b)", re.IGNORECASE,
)  # fmt: skip
_HALF_A = re.compile(rf"(?<!and\sa\s)\bhalf(?:\san?)?\s(?=(?:{_LARGE}|dozen|lakh|crore)\b)", re.IGNORECASE)
_A_MULTIPLE = re.compile(r"\ban?\s(?=(?:dozen|lakh|crore)\b)", re.IGNORECASE)
_ONE_PART = re.compile(  # `a third` is none where a noun follows
    rf"(?<![\d.,/])\b(?:1|one|an?)[\s-]+(half|quarter|(?:{_PART})\b(?!\s(?!of\b|an?\b)[a-z]))\b", re.IGNORECASE
)
_PARTS_OF = re.compile(rf"(?<![\d.,/])(\d{{1,9}})[\s-]+({_PART})s\b", re.IGNORECASE)
_HALF = re.compile(r"\bhalf\b(?!\spast)", re.IGNORECASE)
_WHICH_HALF = re.compile(r"\b(?:first|second|other|top|bottom|left|right|upper|lower)\s\Z", re.IGNORECASE)
_POINT = re.compile(r"(?<![\d.,/])(\d{1,15}+)\spoint\s(\d{1,15}+(?:\s\d\b){0,15}+)", re.IGNORECASE)
_TIMES = re.compile(r"\b(twice|thrice)\b(?!\s(?:as|the|that)\b)|\A(?:(?:only|just)\s)?once[.!]?\Z", re.IGNORECASE)
_COMPOUND = re.compile(r"(?<=\d)\s?-(?=[A-Za-z])")  # a five-minute clip
_AND = re.compile(r"(?<![\d.,/])(\d++)\sand\s(?=\d++/\d)")
_NUMBER = r"(?:\d{1,15}\s\d{1,9}/\d{1,9}|\d{1,9}/\d{1,9}|\d{1,15}(?:\.\d{1,15})?)"
_SCALE = rf"(?:(?:{_LARGE}|dozen|lakh|crore)s?\b|(?:mn|mln|bn|tn|(?-i:k))\b|[百万萬亿億]|千(?![米克瓦卡]))"
_SCALED = re.compile(
    rf"(?<![\d.,/])(?P<terms>{_NUMBER}[\s-]?{_SCALE}(?:(?:\s(?:and\s)?|,\s)?{_NUMBER}\s?{_SCALE}){{0,4}})"
    rf"(?:\s?(?:and\s)?(?P<last>\d{{1,4}})(?![\d.,/]|\s?{_SCALE}))?", re.IGNORECASE,
)  # fmt: skip
_TERM = re.compile(rf"({_NUMBER})[\s-]?({_SCALE})", re.IGNORECASE)
_SIGN = re.compile(r"\b(?:minus|negative)\s(?=\d|\.\d)|(?:负|負|零下)\s?(?=\d)", re.IGNORECASE)
_BELOW_ZERO = re.compile(r"(?<![\d.,/-])(\d[^\d]{0,24}?)\s?\bbelow\s(?:zero|0)\b", re.IGNORECASE)


def number_words(value: int) -> str:
    """The English words of a whole number: 21 is `twenty-one`."""
    from num2words import num2words

    return num2words(value)


def in_digits(text: str) -> str:
    """The text with its spelt numbers in digits: `minus two and three quarters` is `-2 3/4`, `two dozen` 24, `三分之二`
    2/3. Blanks become single.

    `one` beside digits is left alone, and so are `no one` and `the one`. Words that are several numbers become several.
    """
    alone = not any(character.isdigit() for character in text)
    if not text.isascii():
        text = _chinese(text)
    if re.search(r"[A-Za-z]", text):
        text = _A_MULTIPLE.sub("1 ", _HALF_A.sub("0.5 ", _PRONOUN.sub(r"\1", text)))
        text = _words()[1].sub(lambda found: _cardinal(found.group(), alone), text)
        text = _fractions(" ".join(text.split()), alone)
        text = _POINT.sub(lambda found: f"{found[1]}.{found[2].replace(' ', '')}", _COMPOUND.sub(" ", text))
        if alone:
            text = _TIMES.sub(lambda found: {"twice": "2", "thrice": "3"}.get((found[1] or "").casefold(), "1"), text)
    text = _AND.sub(r"\1 ", " ".join(text.split()))
    for _ in range(2):  # `3 thousand million`
        text = " ".join(_SCALED.sub(_scaled, text).split())
    return _BELOW_ZERO.sub(r"-\1", _SIGN.sub("-", text))


def _fractions(text: str, alone: bool) -> str:
    def parts(found: re.Match[str]) -> str:
        count, part = found.groups() if found.re is _PARTS_OF else ("1", found[1])
        if not alone and found[0][0].isdigit() and part.casefold() in ("half", "halve", "quarter"):
            return found[0]  # `3 quarters` in digits may be quarters of a game
        return f"{count}/{_PARTS[part.casefold()]}"

    text = _ONE_PART.sub(parts, _PARTS_OF.sub(parts, text))
    return _HALF.sub(lambda half: half[0] if _WHICH_HALF.search(text[: half.start()][-8:]) else "1/2", text)


def _scaled(found: re.Match[str]) -> str:
    """The value of `1.5 million` or `3 thousand 2 hundred and 5`, whose terms must become smaller."""
    total, limit = Fraction(0), None
    terms = [(number, _SCALES[scale.casefold().removesuffix("s")]) for number, scale in _TERM.findall(found["terms"])]
    for number, factor in [*terms, *([(found["last"], 1)] if found["last"] else [])]:
        try:
            value = sum(map(Fraction, number.split()), Fraction(0)) * factor
        except ZeroDivisionError:
            return found.group()
        if limit is not None and value >= limit:
            return found.group()
        total, limit = total + value, factor
    return f" {total if total.denominator == 1 else float(total)!s} "


# ---- English cardinals -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _words() -> tuple[dict[str, int], re.Pattern[str]]:
    """The words of the numbers below 20 and of the tens, and a pattern of the words that may be one number."""
    values = {number_words(n): n for n in (*range(20), *range(20, 100, 10))}
    word = "|".join(map(re.escape, sorted([*values, *_CARDINALS], key=len, reverse=True)))
    behind = "|".join(f"(?<={scale})" for scale in _CARDINALS)
    joint = rf"[\s-]|(?:{behind})\sand\s|(?:{behind.partition('|')[2]}),\s"
    ordinal = rf"-(?:first|second|{_PART})\b"  # twenty-fifth is no 20
    return values, re.compile(
        rf"\b(?:a\s(?={_LARGE}))?(?:{word})(?:(?:{joint})(?:{word})\b){{0,{MAX_WORDS}}}+\b(?!{ordinal})", re.IGNORECASE
    )


def _cardinal(spelt: str, alone: bool) -> str:
    """The digits of words that spell one number, or each word's own: then they are several."""
    values, _ = _words()
    words = [word for word in re.split(r"[\s,-]+", spelt.casefold()) if word != "and"]
    if words == ["one"] and not alone:
        return spelt
    words = ["one" if word == "a" else word for word in words]
    total = part = 0
    for word in words:
        if word == "hundred":
            part *= 100
        elif word in _CARDINALS:
            total, part = total + part * _CARDINALS[word], 0
        else:
            part += values[word]
    plain = [word for word in re.split(r"[\s,-]+", number_words(total + part)) if word != "and"]
    if plain == words:
        return f" {total + part} "
    if _CARDINALS.keys() & words:
        return spelt  # `nineteen hundred` is not 19
    return f" {' '.join(str(values[word]) for word in words)} "


# ---- Chinese numerals ------------------------------------------------------------------------------------------

_DIGIT = "零〇一二两兩三四五六七八九"
_NUMERAL = f"[{_DIGIT}十百千万萬亿億]{{1,30}}+(?:点[{_DIGIT}]{{1,30}}+)?"
_COUNTED = "个個只隻次人名位条條张張辆輛把本块塊种種件座棵朵头頭匹双雙对對段首声聲下步台架层層艘根支枝片颗顆份"
_MEASURED = "秒分钟鐘小时時天年月日岁歲米厘毫千公克斤里度元升つ回匹枚冊羽歳階円点"
_SPELT = re.compile(rf"(?<![第期周初\d])(?<!\d\s)(?!零下)({_NUMERAL})(?=[{_COUNTED}{_MEASURED}]|\Z|\W)")
_PERCENT = re.compile(rf"百分之\s?({_NUMERAL}|\d{{1,15}}(?:\.\d{{1,15}})?)")
_SHARE = re.compile(rf"({_NUMERAL}|\d{{1,9}})分之({_NUMERAL}|\d{{1,9}})")
_AND_A_HALF = re.compile(f"([{_COUNTED}])半")
_HALVES = re.compile(r"一半|(?<!\d)半(?=小时|小時|个|個|天|年|\W|\Z)")


def _chinese(text: str) -> str:
    text = _PERCENT.sub(lambda found: f" {_read(found[1])}% ", text)
    text = _SHARE.sub(lambda found: f" {_read(found[2])}/{_read(found[1])} ", text)
    text = _AND_A_HALF.sub(r" 1/2 \1", text)
    text = _HALVES.sub(" 1/2 ", text)
    return _SPELT.sub(lambda found: f" {_read(found[1])} ", text)


def _read(numeral: str) -> str:
    """一百零五 is 105, 二〇二四 2024, 三点五 3.5; digits stay."""
    whole, _, decimals = numeral.partition("点")
    if numeral[0] in "0123456789":
        return numeral
    decimals = "." + "".join(map(str, map(_value, decimals))) if decimals else ""
    if not re.search("[十百千万萬亿億]", whole):
        return f"{int(''.join(map(str, map(_value, whole))))}{decimals}"
    total = section = digit = 0
    for value in map(_value, whole):
        if value < 10:
            digit = value
        elif value < 10**4:
            section, digit = section + (digit or 1) * value, 0
        else:
            total, section, digit = (total + section + digit or 1) * value, 0, 0
    return f"{total + section + digit}{decimals}"


def _value(character: str) -> int:
    return 2 if character == "两" else int(unicodedata.numeric(character))
