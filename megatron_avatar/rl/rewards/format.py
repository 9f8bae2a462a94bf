"""The format reward, and the parser that every other reward reads a completion through (paper, rewards)."""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parse(text: str) -> tuple[str | None, str | None]:
    """The contents of `<think>…</think>` and of `<answer>…</answer>`, stripped.

    A block that is missing, unclosed, repeated, empty, or that holds another tag is None: a completion
    that offers two answers has given none.
    """
    return _block(text, "think"), _block(text, "answer")


def format_reward(text: str) -> float:
    """1 if the whole completion is one think block and then one answer block, else 0.

    White space around and between the two blocks is allowed, and nothing else is.
    """
    think, answer = parse(text)
    if think is None or answer is None:
        return 0.0
    before, rest = text.split("<think>")
    between, after = rest.split("</think>")[1].partition("<answer>")[0], text.split("</answer>")[1]
    in_order = text.index("</think>") < text.index("<answer>")
    return float(in_order and not (before.strip() or between.strip() or after.strip()))


def content_spans(text: str) -> list[tuple[int, int]]:
    """Where the contents of the two blocks begin and end in `text`; empty unless it has both of them."""
    spans = [_span(text, name) for name in ("think", "answer")]
    return [span for span in spans if span is not None] if all(spans) else []


def _block(text: str, name: str) -> str | None:
    span = _span(text, name)
    return text[slice(*span)].strip() if span is not None else None


def _span(text: str, name: str) -> tuple[int, int] | None:
    """Beginning and end of a block's content; None where there is no block that counts."""
    opening, closing = f"<{name}>", f"</{name}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    content = text[start:end].strip() if start <= end else ""
    return (start, end) if content and not any(tag in content for tag in TAGS) else None
