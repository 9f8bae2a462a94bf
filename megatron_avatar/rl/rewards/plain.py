r"""A text without its dress: Unicode's typography as ASCII, LaTeX wrappers and Markdown taken off, lead-ins cut.

Every reading of an answer begins here, in rewards as in evaluation. All of it is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Scripts that put no blank between words: ideographs, kana; Thai, Lao, Khmer and Burmese follow where texts are split.
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_RAISED = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+")
_APART = {ord(sign): f" {unicodedata.normalize('NFKC', sign)}" for sign in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"}
_APART |= {0xFDFA: " ", 0xFDFB: " "}  # whole phrases in one sign, which NFKC spells out
_SIGNS = str.maketrans(  # behind NFKC, which leaves these
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("⁄∕", "/"),
        **dict.fromkeys("‘’‚‛′", "'"),
        **dict.fromkeys("“”„‟″「」『』《》〈〉«»", '"'),
        **dict.fromkeys("【〔", "["),
        **dict.fromkeys("】〕", "]"),
        **dict.fromkeys("∙⋅•・", "·"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad"),
        "。": ".",
        "、": ",",
    }
)

_COMMAND = "boxed|fbox|framebox|text|textrm|textbf|textit|textsf|texttt|mathrm|mathbf|mathit|mathsf|emph|underline|bm"
_BRACES = re.compile(
    rf"(?P<wrapper>\\(?:{_COMMAND}|operatorname\*?)\s*+\{{)|"
    r"(?P<display>\\[()\[\]]|\\(?:displaystyle|textstyle|bf|rm|it)(?![A-Za-z]))|\\\\|\\.|[{}]",
    re.DOTALL,
)
_WORDS = {"text", "textrm", "textbf", "mathrm", "operatorname", "mathbf"}  # set apart from what stands beside it
# A pair; the one that is left of an echoed template, unless it is a price's.
_DOLLARS = re.compile(r"(?<!\\)\$\$?([^$]++)(?<!\\)\$\$?|(?<!\\)\$(?!\d)")
_MARKS = re.compile(
    r"(?<![\w*)\]}\\])\*{1,3}(?=[^\s*])([^*]++)(?<=\S)\*{1,3}(?![\w(*])"
    r"|(?<![\w)\]}\\])_{1,3}(?=[^\s_])([^_]++)(?<=\S)_{1,3}(?![\w(])"
    r"|(?<!`)`{1,3}([^`]++)`{1,3}"
)
_ROUNDS = 8  # of Markdown inside of Markdown

_SAYS = r"(?:s|'s|\s+(?:is|are|was|would\s+be|should\s+be|must\s+be))?\b\s*+(?:[:=]|-(?=\s))?\s*+"
LEAD = (
    r"(?:(?:the\s+|my\s+)?(?:(?:correct|right|final|best)\s+)*+(?:answer|choice|option|solution)" + _SAYS + "|"
    r"i(?:\s+would|\s+will|'d|'ll)?\s+(?:choose|pick|select|go\s+(?:with|for))\s+|(?:it\s+is|it's)\s+|"
    r"(?:(?:本|该|此)?题?的?(?:正确|最终|最佳)?的?(?:答案|选项)(?:应该?|应当)?[是为选]?|(?:本|该|此)?题?我?(?:应该?)?(?:选择|选)|"
    r"正解は|答えは|回答は?|정답은|정답|답은)\s*+[:=]?\s*+)"
    r"(?:(?:the\s+)?(?:option|choice|letter)\b\s*+:?\s*+|选项)?"
)
_HEADING = re.compile(r"\A\s*+#++\s++")
_LEAD = re.compile(
    r"\s*+(?:(?:(?:so|thus|therefore|hence)\b|所以|因此|故|综上(?:所述)?)[,:]?\s*+)?" + LEAD, re.IGNORECASE
)


@lru_cache(maxsize=64)
def compose(text: str) -> str:
    r"""Full-width forms, CJK punctuation, typographic dashes, quotes and blanks as ASCII; x² as x^2, 2½ as 2 1/2.

    `x²` isn't `x2` and `2½` isn't `21/2`: what NFKC alone would make of them.
    """
    if text.isascii():
        return text
    plainer = _RAISED.sub(lambda found: "^" + found.group().translate(_SUPERSCRIPTS), text.translate(_APART))
    plainer = unicodedata.normalize("NFKC", plainer).translate(_SIGNS)
    return plainer if len(plainer) <= 2 * len(text) + 64 else text  # nobody's answer: signs that become six


def unwrap(text: str) -> str:
    r"""Without `\boxed{}`, `\text{}` and their like at any depth, mathematics' delimiters, bold, italics and code.

    What is open and never closed stays as it is.
    """
    if "\\" in text:
        text = _without_commands(text)
    if "$" in text:
        text = _DOLLARS.sub(r"\1", text)
    for _ in range(_ROUNDS):
        plainer = _MARKS.sub(lambda found: next(filter(None, found.groups())), text)
        if plainer == text:
            break
        text = plainer
    return text.strip()


def _without_commands(text: str) -> str:
    """One pass with a stack: a wrapper's opening and its closing brace go together."""
    pieces: list[str] = []
    end = 0
    open_at: list[int | None] = []  # places in `pieces` of the braces that are open; None of a plain one
    for found in _BRACES.finditer(text):
        pieces.append(text[end : found.start()])
        end = found.end()
        token = found.group()
        if found["wrapper"]:
            open_at.append(len(pieces))
            pieces.append(token)
        elif token == "{":
            open_at.append(None)
            pieces.append(token)
        elif token == "}" and open_at:
            opened = open_at.pop()
            if opened is None:
                pieces.append(token)
            else:
                apart = pieces[opened].strip("\\{* \n\t") in _WORDS
                pieces[opened] = " " if apart else ""
                pieces.append(" " if apart else "")
        else:
            pieces.append("" if found["display"] else token)
    return "".join(pieces) + text[end:]


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{}`; None without one that is closed."""
    rest = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else ""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", rest):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return rest[: brace.start()]
    return None


def without_lead(text: str) -> str:
    """Behind `The answer is`, `Answer:`, `I choose`, `答案是` and the like, which may follow each other."""
    text = _HEADING.sub("", text)
    for _ in range(3):
        found = _LEAD.match(text)
        if found is None:
            break
        text = text[found.end() :]
    return text.strip()
