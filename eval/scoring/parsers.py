"""From a reply's text to an answer. Which parser reads what is said in eval/benchmarks; None: no answer found.

A parser gets the reply and the line that it belongs to: `kind`, `letters` (that may be answered), `choices`, `keep`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from eval.asking.items import sample_of
from megatron_avatar.rl.rewards.choices import choice_letter, normalise
from megatron_avatar.rl.rewards.format import parse
from megatron_avatar.rl.rewards.grade import read_answer
from megatron_avatar.rl.rewards.plain import last_box

Line = dict[str, Any]
Parser = Callable[[str, Line], str | None]
_LEAD_IN = re.compile(
    r"[Tt]he answer is|The (?:(?:correct|best) )?(?:answer|option) is|(?:Best )?(?:[Aa]nswer|[Oo]ption):|The answer|"
    r"[Tt]he final answer is|### Final Answer:|\\boxed"
)
_LETTERS = re.compile(r"(?<![A-Za-z])(?!and(?![A-Za-z]))[A-Za-z]+")
_TAG = re.compile("<(/?)answer>", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b(?:not(?!\s+only\b)|nor|except)\b|不是|而非)[^,;.，；。\n]*?(?=[,;.，；。\n]|\bbut\b|$)", re.IGNORECASE
)


def tagged(text: str, line: Line) -> str | None:
    """The answer between the tags as training's rewards read it; without a tag, what the reply plainly says behind its
    reasoning. Where the options stand in the question alone, their texts aren't known: `B. It stops` is B."""
    answer = read_answer(text if "<answer>" in text else text.rpartition("</think>")[2], sample_of(line))
    if answer is not None and line["kind"] == "choice" and not line["choices"]:
        letter = choice_letter(answer, ())
        return letter if letter and letter in line["letters"] else answer
    return answer


def tagged_yes_no(text: str, line: Line) -> str | None:
    """Yes or no, whichever stands between the tags (without a tag, in the reply); with both, or neither, none."""
    return says_yes_no(tagged(text, line) or "", line)


def tagged_letters(text: str, line: Line) -> str | None:
    """The letters between the answer tags, sorted: `A,C`, side by side too (`AC`); of words between them the capitals
    that stand alone; `A, not C` is A. Without a tag, a reply that is nothing but letters, or states them: `The answers
    are A and C`."""
    inside = parse(text)[1] if "<answer>" in text else text.rpartition("</think>")[2]
    if inside is None:
        return None
    inside = inside.translate({full + 0xFEE0: full for full in range(0x21, 0x7F)})  # full-width forms
    inside = _DENIED.sub(" ", re.sub(r"\\[A-Za-z]+", " ", inside))  # \boxed, \text
    *stated, behind = re.split(r"(?i)\banswers?\s(?:is|are)\b|\banswers?\s?:|答案[是为:]|选", inside)
    said = only_letters(behind.partition("\n")[0] if stated else inside, line["letters"])
    if said is None and "<answer>" in text:
        said = set(re.findall(r"(?<![A-Za-z0-9_])[A-Z](?![A-Za-z0-9_])", inside)) & set(line["letters"])
    return ",".join(sorted(said or ())) or None


def only_letters(text: str, letters: str) -> set[str] | None:
    """The letters of a text that is nothing but letters which may be answered (single ones that may not are left out),
    or one run of such, capitals or small ones in their order, which are no word; None for other words."""
    runs = _LETTERS.findall(text)
    if all(len(run) == 1 for run in runs):
        return set("".join(runs).upper()) & set(letters)
    alike = runs[0].isupper() or (runs[0].islower() and list(runs[0]) == sorted(runs[0]))
    said = set(runs[0].upper())
    return said if len(runs) == 1 and alike and len(said) == len(runs[0]) and said <= set(letters) else None


def last_capital(text: str, line: Line) -> str | None:
    """Published scripts: what stands between answer tags, untouched; else the last stand-alone capital of A to Z, the
    first capital, or the first letter in range. In prose the article `A` and the pronoun `I` count."""
    opened, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1] and opened is None:
            opened = tag.end()
        elif tag[1] and opened is not None:
            found, opened = text[opened : tag.start()], None
    return found.strip() if found is not None else last_capital_untagged(text, line)


def last_capital_untagged(text: str, line: Line) -> str | None:
    """The same without looking at tags (MMVU)."""
    alone = re.findall(r"\b[A-Z]\b", text)
    if alone:
        return alone[-1]
    first = re.search(r"[A-Z]", text) or re.search(f"[{line['letters']}]", text, re.IGNORECASE)
    return first[0].upper() if first else None


def last_capital_a_d(text: str, line: Line) -> str | None:
    """The same without tags, of A to D alone (WorldSense)."""
    alone = re.findall(r"\b[A-D]\b", text)
    first = re.search(r"[A-D]", text)
    return alone[-1] if alone else first[0] if first else None


def capitals_a_f(text: str, line: Line) -> str | None:
    """Every character A to F of the reply in capitals (IntentBench's published script)."""
    return ",".join(sorted(set(re.findall(r"[A-F]", text.upper())))) or None


def first_integer(text: str, line: Line) -> str | None:
    """The first integer of the reply, 0 without one."""
    found = re.search(r"-?\d+", text)
    return found[0] if found else "0"


def says_yes_no(text: str, line: Line) -> str | None:
    """`yes` or `no`, whichever the reply holds; with both, or neither, none."""
    said = {word for word in ("yes", "no") if re.search(rf"\b{word}\b", text.lower())}
    return said.pop() if len(said) == 1 else None


def first_capital(text: str, line: Line) -> str | None:
    """The first capital that may be answered, behind phrases like `The answer is` (Video-MME's owners, and others after
    them); any word's capital counts."""
    found = re.search(f"[{line['letters']}]", _LEAD_IN.sub("", text))
    return found[0] if found else None


def boxed(text: str, line: Line) -> str | None:
    """What stands in the last \\boxed{}; without one, what the reply plainly says."""
    box = last_box(text)
    return tagged(text if box is None else f"<answer>{box}</answer>", line)


def first_token(text: str, line: Line) -> str | None:
    """The first word, without its full stop; where a number is asked, if it is one in digits (VSI-Bench's owners)."""
    word = next(iter(text.split()), "").rstrip(".")
    if line["kind"] == "number":
        try:
            float(word)
        except ValueError:
            return None
    return word or None


def whole(text: str, line: Line) -> str | None:
    """The whole reply."""
    return text.strip() or None


def extracted(text: str, line: Line) -> str | None:
    """What a language model read out of the reply (eval/scoring/ask.py)."""
    return line.get("extracted")


def cascade(text: str, line: Line) -> str | None:
    """Letter in brackets, letter and space, letter and full stop, option's text: the last place of the first form that
    is there (OmniBench's and MMMU's owners)."""
    text = f" {text.strip(' ,.!?;:' + chr(39))} "
    letters = line["letters"]
    for form in (r"\(({})\)", r"({})(?= )", r"({})\."):
        if found := re.findall(form.format(f"[{letters}]"), text):
            return found[-1]
    said = normalise(text)
    named = [(said.rfind(normalise(choice)), letter) for letter, choice in zip(letters, line["choices"], strict=False)]
    place, letter = max(named, default=(-1, ""))
    return letter if place >= 0 else None


PARSERS: dict[str, Parser] = {
    parser.__name__: parser
    for parser in (
        tagged, tagged_letters, tagged_yes_no, last_capital, last_capital_untagged, last_capital_a_d, capitals_a_f,
        first_integer, says_yes_no, first_capital, first_token, boxed, whole, extracted,
        cascade,
    )
}  # fmt: skip
