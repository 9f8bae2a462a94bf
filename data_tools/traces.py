"""Reasoning traces for the cold start, written by a teacher and kept where its answer is right.

    python -m data_tools.traces data/manifest.jsonl --endpoint http://HOST:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

The teacher sees what the policy will see and not the answer. A trace that lacks the format, or ends in a wrong answer,
is refused and drawn again, up to four times. Reasoning that the server sends in a field of its own belongs to it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from data_tools.teacher import arguments, clip_pictures, run, sound_parts
from megatron_avatar.endpoint import Endpoint, Messages, question
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import format_reward, grade

VERSION = "trace-1"  # raised when the prompt below changes
SECONDS = 30.0  # sound in one part of a message
SYSTEM = """You answer a question about a video clip with sound. Think first, in two to six sentences: what is seen,
what is heard, when it happens, and what follows from it. Then answer in as few words as the question allows; of a
question with choices, the letter alone.

Reply in exactly this form and write nothing before or after it:
<think>your reasoning</think><answer>your answer</answer>"""


class Traces:
    """One trace for each sample of split sft that has none, and for a share of split train, which then moves to sft."""

    field, attempts = "trace", 4

    def __init__(self, frames: int, sound: bool, share: float) -> None:
        self._frames, self._sound, self._share = frames, sound, share

    def wants(self, sample: Sample) -> bool:
        if sample.trace or sample.split not in ("sft", "train"):
            return False
        return sample.split == "sft" or keyed_rng("trace", sample.id).random() < self._share

    def messages(self, sample: Sample, root: Path, refused: str | None) -> list[Messages]:
        choices = "".join(f"\n{chr(ord('A') + k)}. {choice}" for k, choice in enumerate(sample.choices))
        heard = "" if self._sound or not sample.audio_caption else f"\n\nWhat is heard: {sample.audio_caption}"
        messages = question(SYSTEM, sample.question + choices + heard, clip_pictures(sample, root, self._frames))
        if self._sound and (parts := sound_parts(sample, root, SECONDS)):
            content = messages[1]["content"]
            text = content if isinstance(content, list) else [{"type": "text", "text": content}]
            messages[1]["content"] = [*parts, *text]
        return [messages]

    def accept(self, sample: Sample, answers: list[str]) -> tuple[str | None, str]:
        trace = answers[0].strip()
        if not format_reward(trace):
            return None, "not in the format"
        return (trace, "accepted") if grade(sample, trace)["correct"] else (None, "wrong answer")

    def fill(self, sample: Sample, value: str) -> Sample:
        return replace(sample, trace=value, split="sft")


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "Qwen/Qwen2.5-VL-72B-Instruct")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.0, help="of split train, to be moved to split sft")
    parser.add_argument("--sound", action="store_true", help="send the sound too, to a teacher that hears")
    parser.add_argument("--temperature", type=float, default=0.7, help="so that another attempt is another trace")
    args = parser.parse_args(argv)
    try:
        endpoint = Endpoint(
            args.endpoint, args.model, str, max_tokens=1024, temperature=args.temperature,
            concurrency=args.concurrency, deadline_s=args.deadline, thinking=True,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: --endpoint: {error}", file=sys.stderr)
        return 2
    return run(args, Traces(args.frames, args.sound, args.share), endpoint, VERSION, _in_format)


def _in_format(reply: str) -> None:
    if not format_reward(reply):
        raise ValueError("a reply that is not <think>...</think><answer>...</answer>")


if __name__ == "__main__":
    sys.exit(main())
