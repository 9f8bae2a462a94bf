"""An item as the sample that the engine answers: the question's text as a protocol writes it, and its media."""

from __future__ import annotations

import string

from eval.asking.benchmark import Protocol
from eval.asking.items import Item, problem_type
from megatron_avatar.data.prompt import MEDIUM
from megatron_avatar.records import Media, Sample


def render(item: Item, protocol: Protocol) -> str:
    """The text of the user's turn, without data.instruction; with MEDIUM before the first mark of each medium where the
    protocol interleaves."""
    if protocol.option == "list":
        lettered = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, item.choices, strict=False)]
        options = str(lettered) if lettered else ""
    else:
        lines = [protocol.option.format(letter=letter, text=text)
                 for letter, text in zip(string.ascii_uppercase, item.choices, strict=False)]  # fmt: skip
        options = "\n".join(lines)
    parts = {"question": item.question, "options": options, "instruction": protocol.instruction.get(item.kind, "")}
    text = protocol.prompt.format(**parts)
    text = "\n".join(line for line in text.splitlines() if line.strip())
    if protocol.interleaved:
        for mark in filter(None, item.places):
            text = text.replace(mark, MEDIUM + mark, 1)
        text = MEDIUM * item.places.count("") + text
    return text


def as_sample(item: Item, protocol: Protocol, benchmark: str) -> Sample:
    """The sample that the engine answers; it is scored from the item, not from the sample."""
    return Sample(
        id=item.id, stage="", split="eval", family=benchmark, question=render(item, protocol), answer=item.gold,
        problem_type=problem_type(item.kind, item.keep), media=item.media if protocol.interleaved else _by_kind(item),
    )  # fmt: skip


def _by_kind(item: Item) -> tuple[Media, ...]:
    """Pictures, clips, sounds, as published scripts hand them over."""
    return tuple(sorted(item.media, key=lambda medium: ("image", "video", "audio").index(medium.kind)))
