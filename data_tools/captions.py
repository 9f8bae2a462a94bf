"""Captions of what is heard, by an audio model (paper: Kimi-Audio); hints and the judge read them.

    python -m data_tools.captions data/manifest.jsonl --endpoint http://HOST:8000/v1

Long sound is captioned in pieces, each with its time; nothing is cut off.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from data_tools.teacher import arguments, json_field, run, sound_parts, text_schema
from megatron_avatar.endpoint import Endpoint, Messages
from megatron_avatar.records import Sample

VERSION = "caption-1"  # raised when the prompt below changes
MAX_WORDS = 120
SYSTEM = """You describe sound for people who cannot hear it. Say in at most three sentences what is heard, in order
of time: speech (quote what is said, where it is clear), music, and other sounds, how often, how loud, and from which
side if it can be told. Describe, and don't guess what is seen.

Reply with one JSON object: {"caption": "your description"}"""


class Captions:
    """One caption for each sample that has sound and no caption."""

    field, attempts = "audio_caption", 2

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def wants(self, sample: Sample) -> bool:
        heard = any(media.kind == "audio" or media.audio_path is not None for media in sample.media)
        return heard and not sample.audio_caption

    def messages(self, sample: Sample, root: Path, refused: str | None) -> list[Messages]:
        ask = "Describe this sound." + (f" An earlier description was refused: {refused}." if refused else "")
        return [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": [part, {"type": "text", "text": ask}]}]
            for part in sound_parts(sample, root, self._seconds)
        ]

    def accept(self, sample: Sample, answers: list[str]) -> tuple[str | None, str]:
        if not all(answers):
            return None, "empty"
        if any(len(answer.split()) > MAX_WORDS for answer in answers):
            return None, "too long"
        if any(character in answer for answer in answers for character in "<>"):
            return None, "markup"
        if len(answers) == 1:
            return answers[0], "accepted"
        starts = (int(k * self._seconds) for k in range(len(answers)))
        return " ".join(f"From {start} s: {answer}" for start, answer in zip(starts, answers, strict=False)), "accepted"

    def fill(self, sample: Sample, value: str) -> Sample:
        return replace(sample, audio_caption=value)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "moonshotai/Kimi-Audio-7B-Instruct")
    parser.add_argument("--seconds", type=float, default=30.0, help="sound in one question at most")
    args = parser.parse_args(argv)
    try:
        endpoint = Endpoint(
            args.endpoint, args.model, json_field("caption"), schema=text_schema("caption"), max_tokens=300,
            concurrency=args.concurrency, deadline_s=args.deadline,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: --endpoint: {error}", file=sys.stderr)
        return 2
    return run(args, Captions(args.seconds), endpoint, VERSION)


if __name__ == "__main__":
    sys.exit(main())
