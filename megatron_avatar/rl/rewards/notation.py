"""Reading mathematics, in LaTeX or plain notation, into trees. Foreign text is never executed.

A text is one or more items: expressions, and statements such as `x = 3` or `2x + y < 4`. What isn't understood whole
(matrices, integrals, unions) is not read at all.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_avatar.rl.rewards.plain import compose, unwrap, without_lead

MAX_LENGTH = 400  # characters; a longer answer is no expression
MAX_POWER = 400  # of ten
MAX_DEPTH = 40  # brackets inside of brackets


class Unread(ValueError):
    """The text isn't understood."""


@dataclass(frozen=True)
class Node:
    """`number` (value: a Fraction, places: of a decimal, -1 of a whole number), `name`, or an operation on `parts`:
    + - * / ^ negative, pm (plus or minus), call (value: the function), percent, degree, group (value: its brackets)."""

    kind: str
    parts: tuple[Node, ...] = ()
    value: Fraction | str = ""
    places: int = -1


@dataclass(frozen=True)
class Item:
    """An expression (`relation` is '': one side), an assignment (`label` names what the one side is), or a statement
    about two sides (`relation`: = ≠ < ≤)."""

    sides: tuple[Node, ...]
    relation: str = ""
    label: str = ""


FUNCTIONS = (
    "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "sec", "csc",
    "cot", "exp", "log", "ln", "lg", "sqrt", "abs",
)  # fmt: skip
_ANGLES = {"sin", "cos", "tan", "sec", "csc", "cot"}
_GREEK = {
    unicodedata.name(chr(code)).rsplit(" ", 1)[1].lower(): chr(code)
    for code in range(0x3B1, 0x3CA) if chr(code) != "ς"
} | {"varepsilon": "ε", "vartheta": "θ", "varphi": "φ", "lambda": "λ"}  # fmt: skip
_GREEK |= {name.capitalize(): letter.upper() for name, letter in _GREEK.items() if not name.startswith("var")}
_COMMANDS = {
    **dict.fromkeys(("cdot", "times", "ast", "cdotp"), "*"), "div": "/", "pm": "±", "mp": "∓", "infty": "∞",
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"), **dict.fromkeys(("ge", "geq", "geqslant"), "≥"), "lt": "<",
    "gt": ">", **dict.fromkeys(("ne", "neq"), "≠"), **dict.fromkeys(("approx", "simeq"), "="), "in": "∈",
    **dict.fromkeys(("emptyset", "varnothing"), "∅"), **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    "circ": "°", "degree": "°", "angle": "∠", "imath": "i", **dict.fromkeys(("land", "lor", "quad", "qquad"), ";"),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "frac"), "\\frac"), "sqrt": "\\sqrt", "lbrace": "\\{", "rbrace": "\\}",
    **dict.fromkeys(("left", "right", "big", "Big", "limits", "bigl", "bigr"), ""),
    **dict.fromkeys(("Rightarrow", "implies", "therefore", "to", "rightarrow", "Longrightarrow"), "⇒"),
}  # fmt: skip
_SIGNS = {"×": "*", "·": "*", "÷": "/", "√": "\\root", "∛": "\\cube", "⟹": "⇒", "→": "⇒", "∴": "⇒", "≈": "=", "⩽": "≤",
          "⩾": "≥", "∣": "|", "和": ";", "或": ";", "且": ";", "与": ";", "º": "°", "~": ""}  # fmt: skip
_TOKEN = re.compile(
    r"\s*+(?:(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+(?![\w.]))?|\.\d+)|(?P<word>[A-Za-z]+)|\\(?P<command>[A-Za-z]+)|"
    r"(?P<blank>\\[,;:! ]|&)|(?P<line>\\\\|\n)|(?P<brace>\\[{}%|])|(?P<pair><=|>=|!=|\*\*|==)|(?P<sign>\S))"
)
_PAIRS = {"<=": "≤", ">=": "≥", "!=": "≠", "**": "^", "==": "="}
_RELATIONS = "=≠<>≤≥∈"
_OPEN, _CLOSE = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
_LABEL = re.compile(
    r"(?:[A-Za-z]|[α-ωΑ-Ω])(?:_(?:\{\w+\}|\w))?'*(?:\([^()=]{1,12}\))?|∠?[A-Z]{1,4}|\|[A-Z]{2}\||[A-Za-z]{4,}[A-Za-z]*"
)

_THOUSANDS = re.compile(r"\\\{|\\\}|[(\[{)\]}]|(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_GROUPED = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:(?:\\[,; ]|~|\s)\d{3})+)(?![\d]|[.,]?\d|\s?/)")
_PRICE = re.compile(r"\\?\$")
_CASES = re.compile(r"\\(?:begin|end)\s?\{(?:cases|aligned|array|gathered)\}(?:\{[lcr|]*\})?")
_SUBSCRIPTS = re.compile("[₀-₉]+")
_CAN_BEGIN = {"(", "[", "{", "\\{", "\\frac", "\\sqrt", "\\root", "\\cube", "∞", "∅"}


def plain(text: str) -> str:
    """A mathematical text without its dress: wrappers, delimiters, lead-ins, the full stop; `10\\,000` as 10000."""
    text = _SUBSCRIPTS.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = without_lead(unwrap(compose(text)))
    text = unwrap(text.strip().rstrip(".,;").replace("{,}", ","))
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[1]), _PRICE.sub("", text))
    return _thousands(_CASES.sub(" ", text))


def _thousands(text: str) -> str:
    """1,234 as 1234, but (1,234) and {1,234} stay two numbers; the braces of LaTeX's arguments enclose one."""
    depth: list[bool] = []
    pieces, end = [], 0
    for found in _THOUSANDS.finditer(text):
        token = found[0]
        if token in _OPEN:
            depth.append(token != "{" or not re.search(r"(?:[}^_]|\\[A-Za-z]+)\Z", text[: found.start()][-12:]))
        elif token in _CLOSE:
            depth and depth.pop()
        elif not any(depth):
            pieces += [text[end : found.start()], token.replace(",", "")]
            end = found.end()
    return "".join(pieces) + text[end:]


def read(text: str) -> tuple[Item, ...]:
    """The items of a text. Raises Unread."""
    if len(text) > MAX_LENGTH:
        raise Unread("too long")
    tokens = _tokens(plain(text))
    tokens = tokens[_last(tokens, "⇒") + 1 :]
    items: list[Item] = []
    for piece in _split(tokens, (",", ";")):
        items += _items(piece)
    if not items:
        raise Unread("nothing")
    if len({item.label for item in items if item.label}) == 1 and items[0].label:  # x = 1, 2
        items = [item if item.relation else replace(item, relation="=", label=items[0].label) for item in items]
    return tuple(expanded for item in items for expanded in _both_signs(item))


def states(text: str) -> bool | None:
    """Whether a text says something about two sides (`3x - y = 0`), instead of naming a value; None for no tokens."""
    try:
        sides = [_split_relations(piece) for piece in _split(_tokens(plain(text)), (",", ";"))]
    except Unread:
        return None
    return any(relations and not _label(parts[0]) for parts, relations in sides)


# ---- tokens ----------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[str]:
    """Numbers, words of letters, signs; commands by their sign or with their backslash; ' ' where a blank stood."""
    tokens: list[str] = []
    end = 0
    text = text.strip()
    while end < len(text):
        found = _TOKEN.match(text, end)
        if found is None:
            break
        end = found.end()
        kind, token = found.lastgroup, found[found.lastgroup or ""]
        if kind == "blank":
            continue
        if kind == "command":
            token = _COMMANDS.get(token, _GREEK.get(token, token if token in FUNCTIONS else "\\" + token))
        elif kind == "word" and token.casefold() in ("and", "or"):
            token = ";"
        elif kind == "line":
            token = ";"
        elif kind == "pair":
            token = _PAIRS[token]
        elif kind == "sign":
            token = _SIGNS.get(token, token)
        elif kind == "brace" and token == "\\%":
            token = "%"
        if token:
            tokens.append(token)
    if tokens.count(":") > 1:
        raise Unread("a ratio of three")
    return ["/" if token == ":" else token for token in tokens]


def _last(tokens: list[str], token: str) -> int:
    return max((place for place, one in enumerate(tokens) if one == token), default=-1)


def _split(tokens: list[str], at: tuple[str, ...]) -> list[list[str]]:
    """The pieces between tokens outside of brackets, without empty ones."""
    return [piece for piece, _ in _pieces(tokens, at) if piece]


def _split_relations(tokens: list[str]) -> tuple[list[list[str]], list[str]]:
    pieces = _pieces(tokens, tuple(_RELATIONS))
    return [piece for piece, _ in pieces], [sign for _, sign in pieces[1:]]


def _pieces(tokens: list[str], at: tuple[str, ...]) -> list[tuple[list[str], str]]:
    """The pieces between tokens outside of brackets, each with the token before it."""
    pieces: list[tuple[list[str], str]] = [([], "")]
    depth = 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth > MAX_DEPTH:
            raise Unread("too deep")
        if depth == 0 and token in at:
            pieces.append(([], token))
        else:
            pieces[-1][0].append(token)
    return pieces


# ---- items -----------------------------------------------------------------------------------------------------


def _items(tokens: list[str]) -> list[Item]:
    sides, relations = _split_relations(tokens)
    if relations and not sides[0]:  # `= 5`
        sides, relations = sides[1:], relations[1:]
        tokens = sides[0]
    if not relations:
        return [Item((_parse(tokens),))]
    if set(relations) <= {"=", "∈"}:
        if label := _label(sides[0]):
            return [Item((_parse(sides[-1]),), "=", label)]
        if len(sides) == 2 and (label := _label(sides[1])):  # 9 = x
            return [Item((_parse(sides[0]),), "=", label)]
    nodes = [_parse(side) for side in sides]
    items = []
    for left, sign, right in zip(nodes, relations, nodes[1:], strict=False):
        if sign == "∈":
            raise Unread("a set's element that is no name")
        if sign in ">≥":
            left, right, sign = right, left, {">": "<", "≥": "≤"}[sign]
        items.append(Item((left, right), sign))
    return items


def _label(tokens: list[str]) -> str:
    """What an assignment names: `x`, `f(x)`, `AB`, `∠ABC`, `sin θ`, words; '' for what is more than a name."""
    text = "".join(tokens)
    if _LABEL.fullmatch(text) and tokens[0] not in FUNCTIONS:
        return text
    if tokens and tokens[0] in FUNCTIONS and len(text) <= 16 and re.fullmatch(r"[A-Za-z]+\(?[\wα-ω]+°?\)?", text):
        return text
    if len(tokens) > 1 and all(re.fullmatch("[A-Za-z]+", token) for token in tokens) and len(text) > 4:
        return text
    return ""


def _both_signs(item: Item) -> list[Item]:
    if not any(_has(side, "pm") for side in item.sides):
        return [item]
    return [replace(item, sides=tuple(_signed(side, sign) for side in item.sides)) for sign in (1, -1)]


def _has(node: Node, kind: str) -> bool:
    return node.kind == kind or any(_has(part, kind) for part in node.parts)


def _signed(node: Node, sign: int) -> Node:
    parts = tuple(_signed(part, sign) for part in node.parts)
    if node.kind == "pm":
        plus = (node.value == "±") == (sign > 0)
        return parts[0] if plus else Node("negative", parts)
    return replace(node, parts=parts)


# ---- expressions -----------------------------------------------------------------------------------------------


def _parse(tokens: list[str]) -> Node:
    parser = _Parser(list(tokens))
    node = parser.sum()
    if parser.tokens:
        raise Unread(f"{parser.tokens[0]} is left")
    return node


class _Parser:
    """Recursive descent; a product without a sign binds like one with it: 1/2x is x/2."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]  # a stack
        self.bars = 0

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        return self.tokens.pop() if self.tokens and (not wanted or self.peek() in wanted) else ""

    def sum(self) -> Node:
        node = self.signed(self.product)
        while sign := self.take("+", "-", "±", "∓"):
            right = self.product()
            node = Node("+", (node, right if sign == "+" else _with_sign(sign, right)))
        return node

    def signed(self, below) -> Node:
        sign = self.take("+", "-", "±", "∓")
        return _with_sign(sign, self.signed(below)) if sign else below()

    def product(self) -> Node:
        node = self.signed(self.power)
        while True:
            number = node.kind == "number"
            if self.take("*"):
                node = Node("*", (node, self.signed(self.power)))
            elif self.take("/"):
                node = Node("/", (node, self.signed(self.power)))
            elif self.begins() and not (number and self.peek()[0] in "0123456789."):
                node = Node("*", (node, self.power()))
            else:
                return node

    def begins(self) -> bool:
        token = self.peek()
        return token in _CAN_BEGIN or bool(re.match(r"[\w.]", token)) or (token == "|" and not self.bars)

    def power(self) -> Node:
        node = self.postfix(self.atom(mixed=True))
        if not self.take("^"):
            return node
        if self.tokens[-3:] == ["}", "°", "{"]:
            self.tokens[-3:] = ["°"]
        if self.take("°"):
            return Node("degree", (node,))
        return self.postfix(Node("^", (node, self.exponent())))

    def exponent(self) -> Node:
        if self.take("{"):
            node = self.sum()
            if not self.take("}"):
                raise Unread("an open brace")
            return node
        sign = self.take("-", "+")
        node = self.atom(mixed=False)
        if self.take("^"):
            node = Node("^", (node, self.exponent()))
        return _with_sign(sign, node) if sign else node

    def postfix(self, node: Node) -> Node:
        while sign := self.take("!", "%", "°"):
            node = Node("call", (node,), "!") if sign == "!" else Node("percent" if sign == "%" else "degree", (node,))
        return node

    def atom(self, mixed: bool) -> Node:
        token = self.take()
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return self.mixed(_number(token)) if mixed else _number(token)
        if token == "\\frac":
            return Node("/", (self.argument(), self.argument()))
        if token in ("\\sqrt", "\\root", "\\cube"):
            return self.root(token)
        if token in _OPEN:
            return self.group(token)
        if token == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            if not self.take("|"):
                raise Unread("an open bar")
            return Node("call", (node,), "abs")
        if token in ("∞", "∅"):
            return Node("name", value=token)
        if re.fullmatch(r"[A-Za-z]+|[α-ωΑ-Ω]", token):
            return self.word(token)
        raise Unread(token)

    def mixed(self, number: Node) -> Node:
        """2\\frac{1}{4} and 2 1/4: a sum where all three are bare whole numbers."""
        if number.places >= 0:
            return number
        ahead = self.tokens[::-1][:9]
        if ahead[:1] == ["\\frac"]:
            part = re.match(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", "".join(ahead))
            if part and (part[2] is None or part[4] is not None or part[3] is not None):
                return Node("+", (number, self.atom(mixed=False)))
        elif len(ahead) > 2 and ahead[0].isdigit() and ahead[1] == "/" and ahead[2].isdigit():
            top, _, bottom = self.take(), self.take(), self.take()
            return Node("+", (number, Node("/", (_number(top), _number(bottom)))))
        return number

    def argument(self) -> Node:
        """Of a command: what stands in braces, else one sign: \\frac12."""
        token = self.peek()
        if len(token) > 1 and token.isalnum() and token not in FUNCTIONS:
            self.tokens[-1:] = [token[1:], token[0]]
        return self.atom(mixed=False)

    def root(self, token: str) -> Node:
        index = Node("number", value=Fraction(3 if token == "\\cube" else 2))
        if token == "\\sqrt" and self.take("["):
            index = self.sum()
            if not self.take("]"):
                raise Unread("an open bracket")
        radicand = self.argument() if token == "\\sqrt" else self.atom(mixed=False)
        return Node("call", (radicand, index), "root")

    def group(self, opening: str) -> Node:
        """A bracket's one expression, or what stands between brackets: a tuple, a set, an interval."""
        parts = []
        bars, self.bars = self.bars, 0
        while self.peek() not in _CLOSE:
            parts.append(self.sum())
            if not self.take(",", ";"):
                break
        self.bars = bars
        closing = self.take(*_CLOSE)
        if not closing or ((opening in "([") != (closing in ")]")):
            raise Unread("brackets that don't match")
        if len(parts) == 1 and opening != "\\{" and (opening in "{[") == (closing in "}]"):
            return parts[0]
        if not parts:
            if opening in ("(", "["):
                raise Unread("empty brackets")
            return Node("name", value="∅")
        return Node("group", tuple(parts), (opening + closing).replace("\\", ""))

    def word(self, word: str) -> Node:
        """A function with its argument, a constant, a name, or a product of names."""
        if word.casefold() in FUNCTIONS:
            return self.call(word.casefold())
        if word.casefold() in ("inf", "infinity"):
            return Node("name", value="∞")
        if word in _GREEK and len(word) > 1:
            word = _GREEK[word]
        if len(word) > 1:
            head = next((name for name in FUNCTIONS if word.startswith(name) and len(word) == len(name) + 1), word[0])
            if len(word) > 3 and len(head) == 1:
                raise Unread(f"{word} is a word")
            self.tokens.append(word[len(head) :])
            return self.word(head)
        name = word
        if self.take("_"):
            name += "_" + self.subscript()
        while self.take("'"):
            name += "'"
        return Node("name", value=name)

    def subscript(self) -> str:
        if not self.take("{"):
            return self.take()
        text = ""
        while self.tokens and self.peek() != "}":
            text += self.take()
        self.take("}")
        return text

    def call(self, name: str) -> Node:
        base = power = None
        for _ in range(2):
            if name == "log" and base is None and self.take("_"):
                base = self.argument()
            elif power is None and self.take("^"):
                power = self.exponent()
        node = self.call_argument()
        if name in _ANGLES:
            node = _in_radians(node)
        if power == Node("negative", (Node("number", value=Fraction(1)),)) and name in ("sin", "cos", "tan"):
            return Node("call", (node,), "a" + name)
        if name == "sqrt":
            node = Node("call", (node, Node("number", value=Fraction(2))), "root")
        else:
            node = Node("call", (node,) if base is None else (node, base), name.replace("arc", "a"))
        return node if power is None else Node("^", (node, power))

    def call_argument(self) -> Node:
        """Of a function: a bracket, or the product that follows, up to a sign or another function."""
        if self.peek() in ("(", "{", "["):
            return self.atom(mixed=False)
        node = self.signed(self.power)
        while re.match(r"[A-Za-zα-ω]", self.peek()) and self.peek().casefold() not in FUNCTIONS:
            node = Node("*", (node, self.power()))
        return node


def _number(text: str) -> Node:
    mantissa, _, exponent = text.lower().partition("e")
    power = int(exponent or 0) if len(exponent) < 6 else MAX_POWER + 1
    if abs(power) > MAX_POWER:
        raise Unread("beyond a double")
    places = max(len(mantissa.partition(".")[2]) - power, 0) if "." in mantissa or exponent else -1
    return Node("number", value=Fraction(mantissa) * Fraction(10) ** power, places=places)


def _with_sign(sign: str, node: Node) -> Node:
    if sign == "+":
        return node
    return Node("negative", (node,)) if sign == "-" else Node("pm", (node,), sign)


def _in_radians(node: Node) -> Node:
    if node.kind == "degree":
        turned = Node("/", (Node("name", value="π"), Node("number", value=Fraction(180))))
        return Node("*", (node.parts[0], turned))
    return replace(node, parts=tuple(map(_in_radians, node.parts)))
