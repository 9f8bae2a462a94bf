"""Grading a completion for evaluation: one rule for every system, also for those that don't know the tags."""

from __future__ import annotations

import re
from typing import Any

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.accuracy import accuracy_reward, choice_letter, normalise
from megatron_avatar.rl.rewards.format import format_reward, parse
from megatron_avatar.rl.rewards.numbers import quantity

# An answer that scores this much is correct. Graded numbers count when they are right to three digits.
THRESHOLD = {"free_form": 0.5, "ocr": 0.5}
_EXACT = 1 - 1e-3
_NAMED_LETTER = re.compile(r"\(([A-Za-z])\)|(?:answer|option)(?: is)?:? ([A-Za-z])\b")


def grade(sample: Sample, text: str) -> dict[str, Any]:
    """What evaluation keeps of a completion: `text`, `answer` as read (None: unreadable), `accuracy` in
    [0, 1], `correct` (0 or 1) and `format` (0 or 1)."""
    answer = read_answer(text, sample)
    accuracy = accuracy_reward(answer, sample)
    correct = float(is_right(accuracy, sample))
    return {"text": text, "answer": answer, "accuracy": accuracy, "correct": correct, "format": format_reward(text)}


def is_right(accuracy: float, sample: Sample) -> bool:
    """Whether an answer that scores so much is right."""
    return accuracy >= THRESHOLD.get(sample.problem_type, _EXACT)


def read_answer(text: str, sample: Sample) -> str | None:
    """The answer between the tags; without an answer tag, what the reply plainly says.

    Plainly: the only choice that it names, by text or as `(B)` or `answer is B`; the only number in it; for
    the other types the whole reply. Rewards don't use this: in training the format has to be learnt.
    """
    if "<answer>" in text:
        return parse(text)[1]
    text = text.strip()
    match sample.problem_type:
        case "multiple_choice":
            named = {choice for choice in sample.choices if _says(text, choice)}
            named |= {letter for groups in _NAMED_LETTER.findall(text) for letter in groups if letter}
            letters = {choice_letter(name, sample.choices) for name in named}
            return letters.pop() if len(letters) == 1 else choice_letter(text, sample.choices)
        case "numerical":
            return text if quantity(text) is not None else None
        case _:
            return text or None


def _says(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(normalise(phrase))}(?!\w)", normalise(text)) is not None
