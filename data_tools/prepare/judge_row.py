"""From a draft and its stored media to a sample, or to a reason to refuse it."""

from __future__ import annotations

import hashlib
import json
import re
import string
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.prepare.damage import Refused
from data_tools.prepare.sources import Draft
from data_tools.prepare.store import read_card
from megatron_avatar.config import Config
from megatron_avatar.data.manifest import sample_from_dict, sample_to_dict
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.records import Media, Sample
from megatron_avatar.rl.rewards import accuracy_reward, format_reward, grade, parse
from megatron_avatar.rl.rewards.accuracy import choice_letter, normalise

_INLINE = re.compile(r"(?:^|[\s(])\(?([A-Z])[.):]\s", re.MULTILINE)


@dataclass(frozen=True)
class Judged:
    """A sample, the tokens of its longest prompt, its media's contents and what the report tells of them."""

    sample: Sample
    tokens: int
    contents: tuple[str, ...]
    facts: tuple[dict[str, Any], ...]


class RowJudge:
    """Decides with the trainer's own rules: its prompts, its rewards, its manifest."""

    def __init__(self, model: str, config: Config, out: Path, eval_share: float):
        from megatron_avatar.policy.architecture import read_config

        self.builder = PromptBuilder(load_tokenizer(model), read_config(model), config.data, config.model.context)
        self.room, self.context = config.rl.sampling.max_new_tokens, config.model.context
        self.out, self.eval_share = out, eval_share

    def judge(self, draft: Draft, contents: tuple[str, ...]) -> Judged:
        """Raises Refused with the reason."""
        media, facts = [], []
        for source, content in zip(draft.media, contents, strict=True):
            card = read_card(self.out, content, source.kind)
            if "refused" in card:
                raise Refused(card["refused"], f"{source.path or 'embedded ' + source.kind}: {card['detail']}")
            pts = card["media"].pop("pts", None)
            media.append(Media(**card["media"], pts=tuple(pts) if pts else None))
            facts.append(card["facts"] | {"kind": source.kind, "sound": media[-1].audio_path is not None})
        sample = Sample(
            id=draft.id or row_key(draft, contents),
            stage=draft.stage,
            split=self._split(draft, contents),
            family=draft.family,
            question=draft.question,
            answer=draft.answer,
            problem_type=draft.problem_type,  # type: ignore[arg-type]
            choices=draft.choices,
            media=tuple(media),
            trace=draft.trace,
            hint=draft.hint,
            audio_caption=draft.audio_caption,
        )
        sample = scorable(sample)
        if sample.stage == "sft" or sample.trace:
            _require_trace(sample)
        try:
            sample_from_dict(json.loads(json.dumps(sample_to_dict(sample))))
        except ValueError as error:
            raise Refused("manifest", str(error)) from None
        return Judged(sample, self._tokens(sample), contents, tuple(facts))

    def _tokens(self, sample: Sample) -> int:
        """Prompt tokens, with the hint where there is one; what follows must have room as well."""
        try:
            tokens = self.builder.length(sample, "hinted" if sample.hint else "plain")
        except ValueError as error:
            kind = "too_long" if "the context" in str(error) else "prompt"
            raise Refused(kind, str(error).partition(": ")[2] or str(error)) from None
        room = len(self.builder.completion_ids(sample.trace)) if sample.trace else self.room
        if tokens + room > self.context:
            what = "trace" if sample.trace else "completion"
            raise Refused("too_long", f"{tokens} tokens and {room} for the {what} exceed the context {self.context}")
        return tokens

    def _split(self, draft: Draft, contents: tuple[str, ...]) -> str:
        """By the media's contents alone, so that no clip is on both sides."""
        keys = contents or (normal_text(draft.question),)
        held = {_fraction(key) < self.eval_share for key in keys}
        if len(held) > 1:
            raise Refused("both_splits", "one of its media is held out, another is not; eval_share=0 keeps such rows")
        return "eval" if held.pop() else "sft" if draft.trace else "train"


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(b"held out" + text.encode()).digest()[:8]) / 2**64


def normal_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def row_key(draft: Draft, contents: tuple[str, ...]) -> str:
    """The same for rows that ask the same about the same media and want the same answer, in one stage."""
    texts = [draft.stage, normal_text(draft.question), *map(normal_text, draft.choices), normal_text(draft.answer)]
    return hashlib.sha256(json.dumps([contents, texts]).encode()).hexdigest()[:24]


def scorable(sample: Sample) -> Sample:
    """The sample, the letter of its choice written plainly; refused where its own answer would earn no reward."""
    if not sample.question:
        raise Refused("no_question", "the question is empty")
    if not sample.answer.strip():
        raise Refused("unscorable", "the answer is empty")
    if sample.problem_type == "multiple_choice":
        if len(sample.choices) > 26:
            raise Refused("unscorable", f"{len(sample.choices)} choices, and 26 letters")
        letter = choice_letter(sample.answer, sample.choices)
        named = "".join(sorted(set(_INLINE.findall(sample.question)))) if not sample.choices else ""
        listed = len(named) > 1 and string.ascii_uppercase.startswith(named)  # choices within the question
        if letter is None or (listed and letter not in named):
            raise Refused("unscorable", f"the answer {sample.answer[:80]!r} is none of its choices")
        sample = replace(sample, answer=letter)
    # ROUGE, the reward of free form, would need a process of its own for every row: words are what it compares.
    free = sample.problem_type == "free_form"
    if not (re.search(r"[^\W_]", sample.answer) if free else accuracy_reward(sample.answer, sample) > 1 - 1e-6):
        what = f"the {sample.problem_type} answer {sample.answer[:80]!r}"
        raise Refused("unscorable", f"{what} would not earn its own reward")
    return sample


def _require_trace(sample: Sample) -> None:
    if not sample.trace:
        raise Refused("trace", "no trace to learn from in stage sft")
    if not format_reward(sample.trace):
        raise Refused("trace", "the trace is not <think>…</think><answer>…</answer>")
    answer = str(parse(sample.trace)[1])
    if normalise(answer) != normalise(sample.answer) and not grade(sample, sample.trace)["correct"]:
        raise Refused("trace", f"the trace ends in {answer[:80]!r}, and the answer is {sample.answer[:80]!r}")
