"""Hints for hard prompts, written offline by a vision-language teacher and checked for leaks (paper, "Hints").

    python -m data_tools.hints data/manifest.jsonl --endpoint http://HOST:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

A hint is one short sentence of strategy. One that gives the answer away is refused, with a second and a third try.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from data_tools.leaks import leak
from data_tools.teacher import arguments, clip_pictures, json_field, run, text_schema
from megatron_avatar.endpoint import Endpoint, Messages, question
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards.http_judge import gold_text

VERSION = "hint-1"  # raised when the prompt below changes
SYSTEM = """You help a student who answers questions about video clips with sound and is stuck on this one. You see
frames of the clip in order of time, and you are told the question, what is heard, and the correct answer, which the
student must not learn from you.

Write one short sentence (at most 30 words) that tells the student where to look, what to listen to, or what to compare
first. Never name, spell, paraphrase or count out the answer, never name a choice or its letter, and never say which
choices are wrong.

Reply with one JSON object: {"hint": "your sentence"}"""


class Hints:
    """One hint for each sample that trains and has none."""

    field, attempts = "hint", 3

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def wants(self, sample: Sample) -> bool:
        return sample.split == "train" and not sample.hint

    def messages(self, sample: Sample, root: Path, refused: str | None) -> list[Messages]:
        choices = "".join(f"\n{chr(ord('A') + k)}. {choice}" for k, choice in enumerate(sample.choices))
        text = (
            f"Question: {sample.question}{choices}\n\nWhat is heard: {sample.audio_caption or 'not described'}\n\n"
            f"Correct answer (secret): {gold_text(sample)}"
        )
        if refused:
            text += f"\n\nAn earlier hint was refused: it {refused}. Write one that stays further from the answer."
        return [question(SYSTEM, text, clip_pictures(sample, root, self._frames))]

    def accept(self, sample: Sample, answers: list[str]) -> tuple[str | None, str]:
        reason = leak(answers[0], sample)
        return (None, reason) if reason else (answers[0], "accepted")

    def fill(self, sample: Sample, value: str) -> Sample:
        return replace(sample, hint=value)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "Qwen/Qwen2.5-VL-72B-Instruct")
    parser.add_argument("--frames", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        endpoint = Endpoint(
            args.endpoint, args.model, json_field("hint"), schema=text_schema("hint"), max_tokens=120,
            concurrency=args.concurrency, deadline_s=args.deadline,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: --endpoint: {error}", file=sys.stderr)
        return 2
    return run(args, Hints(args.frames), endpoint, VERSION)


if __name__ == "__main__":
    sys.exit(main())
