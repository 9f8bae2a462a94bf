"""Grading a completion for evaluation: one rule for every system, also for those that don't know the tags."""

from __future__ import annotations

import re
from typing import Any

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.accuracy import accuracy_reward
from megatron_avatar.rl.rewards.choices import stated_letter
from megatron_avatar.rl.rewards.format import format_reward, parse
from megatron_avatar.rl.rewards.numbers import quantity
from megatron_avatar.rl.rewards.plain import last_box

# An answer that scores this much is correct. Graded numbers count when they are right to three digits.
THRESHOLD = {"free_form": 0.5, "ocr": 0.5}
_EXACT = 1 - 1e-3
_STATEMENT = re.compile(
    r"(?:\b(?:answer|solution)(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b\s*+:?|\s*+[:=])|答案(?:应该?)?[是为:：])"
    r"[\s*_]*+",
    re.IGNORECASE,
)


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

    Plainly: the last `\\boxed{}` or statement (`the answer is B`, `Answer: 3`), else the only choice that it names, by
    text or as `(B)`; the only number in it; for the other types the whole reply. Rewards don't use this: in training
    the format has to be learnt.
    """
    if "<answer>" in text:
        return parse(text)[1]
    text = text.strip()
    match sample.problem_type:
        case "multiple_choice":
            return stated_letter(text, sample.choices)
        case "numerical":
            return next((said for said in (*_stated(text), text) if quantity(said) is not None), None)
        case "math" | "other":
            return next((said for said in _stated(text) if said), text) or None
        case _:
            return text or None


def _stated(text: str) -> list[str]:
    """What stands in the last box, and behind the last statement that isn't denied."""
    box = last_box(text)
    ends = [found.end() for found in _STATEMENT.finditer(text)]
    stated = text[ends[-1] :].partition("\n")[0].strip() if ends else ""
    denied = re.match(r"(?:not|n't)\b", stated, re.IGNORECASE)
    return ([] if box is None else [box.strip()]) + ([] if denied else [stated.rstrip(". ")])
