"""A reward of one's own: short completions earn more. Train with it, without touching the package:

    .venv/bin/python -m megatron_avatar.train recipe=tiny_avatar model.path=FOLDER data.manifest=FILE \\
        +rl.rewards.short=examples/own_reward.py:short +stages.visual.rewards.short=0.2

The weights of a stage are shares of their sum. The function is called once for each completion, in a process that is
ended when it computes for too long; docs/rewards.md says what it may do.
"""

from __future__ import annotations

from megatron_avatar.records import Sample

ENOUGH = 40  # words


def short(text: str, sample: Sample) -> float:
    """1 up to ENOUGH words, falling to 0 at twice as many. `sample` has the question, the answer, media, choices."""
    return min(1.0, max(0.0, 2 - len(text.split()) / ENOUGH))


def names_what_is_asked(text: str, sample: Sample) -> float:
    """The share of the question's longer words that the reasoning names; nan, no verdict, where it has none."""
    words = {word.strip("?.,").casefold() for word in sample.question.split() if len(word) > 4}
    said = text.casefold()
    return sum(word in said for word in words) / len(words) if words else float("nan")


if __name__ == "__main__":
    example = Sample("id", "visual", "train", "colour", "Which colour is the circle?", "red", "free_form")
    for text in ("<think>The circle is red.</think><answer>red</answer>", "word " * 60):
        print(f"{text[:50]!r}: short {short(text, example):.2f}, named {names_what_is_asked(text, example):.2f}")
