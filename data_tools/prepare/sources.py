"""Datasets in their owners' form: what a row of each says, as a `Draft` of our sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.prepare.cells import (
    Row,
    as_text,
    bare_answer,
    bare_choices,
    media_of,
    text_of,
    without_placeholders,
)
from data_tools.prepare.damage import Refused
from data_tools.prepare.store import Source
from megatron_avatar.files import unwritable

PROBLEM_TYPES = {
    "multiple_choice": "multiple_choice", "multiplechoice": "multiple_choice", "mcq": "multiple_choice",
    "mc": "multiple_choice", "numerical": "numerical", "number": "numerical", "numeric": "numerical",
    "regression": "numerical", "math": "math", "ocr": "ocr", "text_recognition": "ocr", "free_form": "free_form",
    "freeform": "free_form", "descriptive": "free_form", "open_ended": "free_form", "code": "code", "other": "other",
}  # fmt: skip
STAGES = ("sft", "visual", "audio_visual", "localisation")  # of AVATAR's stages 0 to 3


@dataclass(frozen=True)
class Draft:
    """A row in our words; its media are not looked at yet. `id` "": none of its own."""

    question: str
    answer: str
    problem_type: str
    stage: str
    family: str
    id: str = ""
    choices: tuple[str, ...] = ()
    media: tuple[Source, ...] = ()
    trace: str | None = None
    hint: str | None = None
    audio_caption: str | None = None


@dataclass(frozen=True)
class Dataset:
    """One way to read rows. `columns`: one of each of these groups must be there."""

    columns: tuple[tuple[str, ...], ...]
    draft: Callable[[Row, str, str], Draft]  # (row, origin, the stage that the user named)

    def lacks(self, row: Row) -> str:
        """Why a row is one of another dataset; empty for one of this."""
        lacking = [" or ".join(group) for group in self.columns if not set(group) & set(row)]
        remedy = "Choose another source=, or name the columns yourself with source=mapping mapping=FILE.yaml"
        return f"has the columns {', '.join(sorted(row))}, and lacks {'; '.join(lacking)}. {remedy}" if lacking else ""

    def read(self, row: Row, origin: str, stage: str) -> Draft:
        """The row's draft. Refused with a reason for everything that a row can hold and a sample can't."""
        try:
            draft = self.draft(row, origin, stage)
        except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise Refused("form", f"the row has another form ({type(error).__name__}: {error})") from None
        for name, value in vars(draft).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (reason := unwritable(text)):
                    raise Refused("text", f"{name} {text[:80]!r} can't be kept: {reason}")
        return draft


def problem_type(text: str) -> str:
    name = re.sub(r"[\s/-]+", "_", text.strip().lower())
    known = PROBLEM_TYPES.get(name) or PROBLEM_TYPES.get(name.partition("_")[0])
    return known or "other"  # scored by equality, as the released trainer does


def all_media(row: Row) -> tuple[Source, ...]:
    """Media in columns of the usual names, clips first."""
    return tuple(
        source
        for kind in ("video", "image", "audio")
        for name in (f"{kind}s", kind)
        for source in media_of(row.get(name), kind)
    )


def as_trace(thinking: str, answer: str) -> str:
    """`<think>…</think><answer>…</answer>` out of reasoning with or without its tags."""
    thinking = thinking.strip()
    if "<answer>" in thinking:
        return thinking
    thought = thinking if "<think>" in thinking else f"<think>{thinking}</think>"
    return f"{thought}<answer>{answer}</answer>"


def avatar_rl(row: Row, origin: str, stage: str) -> Draft:
    turns = _turns(row.get("messages"))
    solution = text_of(row, "solution") or turns.get("assistant", "")
    stage = _named_stage(row, origin) or stage
    if not stage:
        raise Refused("stage", f"neither row nor file names a stage; write stage= one of {', '.join(STAGES)}")
    hint = row.get("hint")
    parts = hint if isinstance(hint, list) else [hint]
    trace = turns.get("assistant") or (solution if "<think>" in solution else None)
    return Draft(
        id=text_of(row, "prompt_id"),
        question=without_placeholders(text_of(row, "question") or turns.get("user", "")),
        answer=bare_answer(solution),
        problem_type=problem_type(text_of(row, "problem_type")),
        choices=bare_choices(row.get("options") or row.get("choices")),
        stage=stage,
        family="avatar_rl",
        media=all_media(row),
        trace=trace if stage == "sft" else None,
        hint="\n".join(as_text(part, "hint") for part in parts) or None,
        audio_caption=text_of(row, "audio_cues") or None,
    )


def _turns(messages: Any) -> dict[str, str]:
    """Role -> what it says, as text: the last turn of each."""
    if messages is None:
        return {}
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        raise Refused("column", f"messages holds {str(messages)[:80]!r}, not a list of turns with role and content")
    return {str(turn.get("role")): as_text(turn.get("content"), "messages") for turn in messages}


def _named_stage(row: Row, origin: str) -> str:
    """The stage by the row's own column, else by a file name that holds `stage2`; "" without either."""
    value = text_of(row, "stage")
    named = re.search(r"stage[ _-]?([0-3])", f"stage{value}" if value.isdecimal() else value or origin)
    return STAGES[int(named[1])] if named else value


def vision_r1_rl(row: Row, origin: str, stage: str) -> Draft:
    answer = bare_answer(text_of(row, "answer"))
    return Draft(
        id=text_of(row, "id"),
        question=without_placeholders(text_of(row, "problem")),
        answer=answer,
        problem_type="multiple_choice" if re.fullmatch(r"\(?[A-Z]\)?\.?", answer) else "math",
        stage=stage or "math",
        family="vision_r1_rl",
        media=all_media(row),
    )


def video_r1(row: Row, origin: str, stage: str) -> Draft:
    kind = text_of(row, "data_type")
    if kind not in ("image", "video"):
        raise Refused("media_column", f"data_type is {kind!r}, not image or video")
    answer = bare_answer(text_of(row, "solution"))
    process = text_of(row, "process")
    own = text_of(row, "problem_id")
    return Draft(
        id=f"video_r1-{own}" if own else "",
        question=without_placeholders(text_of(row, "problem")),
        answer=answer,
        problem_type=problem_type(text_of(row, "problem_type")),
        choices=bare_choices(row.get("options")),
        stage=stage or "visual",
        family=text_of(row, "data_source") or "video_r1",
        media=media_of(row.get("path"), kind),
        trace=as_trace(process, answer) if process else None,
    )


DATASETS = {
    "avatar_rl": Dataset((("videos", "images", "audios"), ("solution", "messages"), ("question", "messages"),
                          ("problem_type",)), avatar_rl),
    "vision_r1_rl": Dataset((("images", "image"), ("problem",), ("answer",)), vision_r1_rl),
    "video_r1": Dataset((("problem",), ("data_type",), ("problem_type",), ("solution",), ("path",)), video_r1),
}  # fmt: skip
