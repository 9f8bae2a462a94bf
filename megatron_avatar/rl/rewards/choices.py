"""Which choice does an answer name: by its letter, by its text, or by both?"""

from __future__ import annotations

import re

from megatron_avatar.rl.rewards.plain import compose, last_box, unwrap, without_lead

_ALONE = r"(?<![A-Za-z0-9_])([{}])(?![A-Za-z0-9_'])"  # beside ideographs too, where \b sees no border
_LETTER = re.compile(
    r"[(\[{]?\s?([A-Za-z])\s?[)\]}]?(?:(\s*+[-.,:;)]++\s*+|\s++|(?=[^\x00-\u02ff]))(\S.*))?", re.DOTALL
)
_IS_RIGHT = re.compile(
    r"(?<=[A-Za-z)\]])\s*+(?:is\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:answer|choice|option|one))?|"
    r"选?项?(?:是?(?:正确|对)的?)|选项|项|です|だ|입니다|번)[.!\s]*+\Z",
    re.IGNORECASE,
)
_BEHIND = re.compile(r"(?<![\s,:;-])[\s,:;-]*+[(\[]([A-Za-z])[)\]][.\s]*+\Z")
_SECOND = re.compile(r"(?:\b(?:or|and)\s+|[,/&]\s*+|[(\[])[(\[]?([A-Z])(?![A-Za-z0-9_'])")
_ARTICLE = re.compile(r"\A(?:an?|the)\s+")
_DENIED = re.compile(r"\W*+(?:is|are|was|were)\s+(?:not|wrong|incorrect|false)\b")
_CLOSERS = {"(": ")", "[": "]"}


def normalise(text: str) -> str:
    """Composed, undressed, case-folded, single-spaced, without punctuation or brackets around the whole."""
    return " ".join(_bare(text).casefold().split())


def _bare(text: str) -> str:
    text = " ".join(unwrap(compose(text)).split())
    for _ in range(3):
        bare = text.strip(" .,;:!?\"'`*") or text
        if len(bare) > 2 and _CLOSERS.get(bare[0]) == bare[-1] and not re.search(r"[()\[\]]", bare[1:-1]):
            bare = bare[1:-1]  # `(1,2]` and `(a) or (b)` keep theirs
        if bare == text:
            break
        text = bare
    return text


def choice_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    r"""The capital letter of `B`, `(b)`, `B. second choice`, `The answer is **B**`, `\boxed{\text{B}}`, `答案是B。` or
    `second choice`; None for anything else.

    A lone letter that numbers a choice is that choice, even where another choice's text is this letter. One that
    is followed by other words than its own choice's text, or by a second choice, names none. Without `choices` (they
    stand in the question) a capital and a full stop, a colon or a bracket are a letter whatever follows.
    """
    answer = unwrap(compose(answer))
    return _named(answer, choices) or _named(without_lead(answer), choices)


def _named(answer: str, choices: tuple[str, ...]) -> str | None:
    texts = [normalise(choice) for choice in choices]
    bare = answer.strip(" \n\t.,;:!?\"'")
    match = _LETTER.fullmatch(_IS_RIGHT.sub("", bare))
    letter, text = (match[1].upper(), match[3]) if match else (None, None)
    index = ord(letter) - ord("A") if letter else len(texts)
    if letter and text is None and (index < len(texts) or not texts):
        return letter
    if (place := _place(answer, choices, texts)) is not None:
        return chr(ord("A") + place)
    if not texts and match:
        return letter if match[1].isupper() and _unknown_text(bare, match) else None
    if (behind := _BEHIND.search(bare)) and behind[1].isupper():  # `blue square (B)`
        letter, text, index = behind[1], bare[: behind.start()], ord(behind[1]) - ord("A")
    if text is None or index >= len(texts):
        return None
    return letter if _is_own(text, index, choices, texts) else None


def _unknown_text(answer: str, match: re.Match[str]) -> bool:
    """Whether a letter stands apart from its text, which isn't known, and no second letter offers itself."""
    apart = re.search(r"[.:)]", answer[: match.start(3)])
    return apart is not None and set(_SECOND.findall(answer, match.end(1))) <= {match[1]}


def _place(answer: str, choices: tuple[str, ...], texts: list[str]) -> int | None:
    """Of the choice that is the answer: letter by letter if there is one, else normalised, else but for an article."""
    said = normalise(answer)
    if said in texts:
        exact = _bare(answer)
        return next((k for k, choice in enumerate(choices) if _bare(choice) == exact), texts.index(said))
    same = [k for k, text in enumerate(texts) if _ARTICLE.sub("", text) == _ARTICLE.sub("", said)]
    return same[0] if len(same) == 1 else None


def _is_own(text: str, index: int, choices: tuple[str, ...], texts: list[str]) -> bool:
    """Whether what stands beside a letter is its choice's text, with or without more that names no other choice."""
    said, own = normalise(text), texts[index]
    if not said.startswith(own):
        said = _ARTICLE.sub("", said)
    if said == own:
        return True
    rest = said.removeprefix(own)
    if not own or rest == said or re.match(r"\w", rest):  # `B. blue squares` is not `blue square`
        return False
    others = [other for k, other in enumerate(texts) if k != index and other]
    if _DENIED.match(rest) or any(says(rest, other) for other in others):
        return False
    letters = letters_alone(text) - letters_alone(choices[index])
    small = set(re.findall(r"\b[a-z]\b", rest)) - {"a", "i"}  # an article, a pronoun
    numbered = {chr(ord("A") + k) for k in range(len(texts)) if k != index}
    return not numbered & (letters | {letter.upper() for letter in small})


def letters_alone(text: str) -> set[str]:
    """Capitals that stand alone; A and I only where no word follows: else they are article and pronoun."""
    closed = re.findall(_ALONE.format("AI") + r"(?=\s*+(?:[^\w\s]|\Z))", text)
    return set(re.findall(_ALONE.format("B-HJ-Z"), text)) | set(closed)


def says(text: str, phrase: str) -> bool:
    """Whether a normalised phrase stands in a normalised text, as whole words."""
    return re.search(rf"(?<![^\W_]){re.escape(phrase)}(?![^\W_])", text) is not None


# ---- a reply without tags --------------------------------------------------------------------------------------

_STATEMENT = re.compile(
    r"(?<![A-Za-z])(?:(?:answer|choice|option|solution)(?:'?s?\s+(?:is|would\s+be|should\s+be|must\s+be)\b|s?(?=\s*+[:=]))"
    r"|(?:correct|right|final|best)\s+(?:answer|choice|option)\b|i(?:\s+would|\s+will|'d|'ll)?\s+(?:choose|pick|select)\s)"
    r"\s*+[:=]?\s*+(?:(?:the\s+)?(?:option|choice|letter)\s+)?"
    r"|(?:答案(?:应该?)?[是为选:]|(?<!不)选(?!项)择?|正解は|答えは|정답은|답은)\s*+[:=]?\s*+",
    re.IGNORECASE,
)
_STATED = re.compile(r"[(\[{\"']*+([A-Za-z])(?![A-Za-z0-9_'])[)\]}\"']*+")
_OR = re.compile(r"\s*+(?:,|/|\bor\b|\band\b|&|或|和|与)\s*+(?:or\s+)?[(\[\"']?([A-Za-z])(?![A-Za-z0-9_'])", re.I)
_GOES_ON = re.compile(r"\s++(?!(?:because|since|as|for|and|or|which|so|with|due|is)\b)[a-z]")  # behind an article
_NAMED = re.compile(r"\(([A-Za-z])\)|\b(?:[Aa]nswer|[Oo]ption)(?: is)?:? ([A-Za-z])(?![A-Za-z0-9_'])")
_STATEMENTS = 64  # that are looked at, from the last back
_REACH = 300  # characters of a statement, and of the longest choice in it


def stated_letter(reply: str, choices: tuple[str, ...]) -> str | None:
    """What an untagged reply plainly says: its last statement (`the answer is B`, `Final answer: B`, a last line that
    is a choice and nothing else), else the only choice that it names, by text or as `(B)`."""
    box = last_box(reply)
    text = unwrap(compose(reply))
    for plain in (box or "", text if choices else "", _last_line(text, choices)):
        if letter := choice_letter(plain, choices):
            return letter
    for found in reversed(list(_STATEMENT.finditer(text))[-_STATEMENTS:]):
        if (stated := _stated(text, found.end(), choices)) is not None:
            return stated or None
    said = normalise(text)
    named = {choice for choice in choices if says(said, normalise(choice))}
    for found in _NAMED.finditer(text):
        if letter := found[1] or _letter(found[2], text[found.end() :][:_REACH]):
            named.add(letter)
    letters = {choice_letter(name, choices) for name in named}
    if len(letters) == 1:
        return letters.pop()
    return choice_letter(text, choices) if not letters and "\n" not in text else None


def _last_line(text: str, choices: tuple[str, ...]) -> str:
    """The last line, unless the line before is another choice (then they are listed), or its choice's text unknown."""
    lines = [line for line in text[-2 * _REACH :].split("\n") if line.strip()][-2:] or [""]
    if not choices:
        return lines[-1] if len(lines[-1].strip(" .()[]")) == 1 else ""
    before, last = (choice_letter(line, choices) for line in (lines[0], lines[-1]))
    return lines[-1] if before in (None, last) else ""


def _stated(text: str, start: int, choices: tuple[str, ...]) -> str | None:
    """The letter of the choice that a statement goes on with; none ('') where it names two, None where no choice."""
    said = text[start : start + _REACH].partition("\n")[0]
    words = normalise(said)
    for head in (words, _ARTICLE.sub("", words)):
        at_head = [(k, own) for k, own in enumerate(map(normalise, choices)) if own and _begins(head, own)]
        if at_head:
            place, own = max(at_head, key=lambda pair: len(pair[1]))
            joined = re.match(r"\W*+(?:or|and|/|,)\s+(?:an?\s+|the\s+)?(.*)", head[len(own) :])
            hedged = joined and any(_begins(joined[1], normalise(other)) for other in choices)
            return "" if hedged else chr(ord("A") + place)
    found = _STATED.match(said)
    letter = _letter(found[1], said[found.end() :]) if found else None
    if found is None or letter is None or said.startswith("?", found.end()):
        return None
    if choices and ord(letter) - ord("A") >= len(choices):
        return None
    second = _OR.match(said, found.end())
    return "" if second and _letter(second[1], said[second.end() :]) not in (None, letter) else letter


def _letter(letter: str, rest: str) -> str | None:
    """A letter as a capital; None for the article and the pronoun, which a word follows."""
    return None if letter in "aAiI" and _GOES_ON.match(rest) else letter.upper()


def _begins(text: str, phrase: str) -> bool:
    return bool(phrase) and text.startswith(phrase) and not re.match(r"[^\W_]", text[len(phrase) :])
