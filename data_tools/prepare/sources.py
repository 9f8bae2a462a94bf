"""Datasets in their owners' form: what a row of each says, as a `Draft` of our sample."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.prepare.damage import Refused
from data_tools.prepare.store import Source

Row = Mapping[str, Any]
PROBLEM_TYPES = {
    "multiple_choice": "multiple_choice", "multiplechoice": "multiple_choice", "mcq": "multiple_choice",
    "mc": "multiple_choice", "numerical": "numerical", "number": "numerical", "numeric": "numerical",
    "regression": "numerical", "math": "math", "ocr": "ocr", "text_recognition": "ocr", "free_form": "free_form",
    "freeform": "free_form", "descriptive": "free_form", "open_ended": "free_form", "code": "code", "other": "other",
}  # fmt: skip
STAGES = ("sft", "visual", "audio_visual", "localisation")  # of AVATAR's stages 0 to 3
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PLACEHOLDER = re.compile(r"<(?:video|image|audio)>\s?")
_LETTERED = re.compile(r"^\s*\(?([A-Z])\s*[.):]\s*", re.DOTALL)


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

    def check(self, row: Row, origin: str) -> None:
        """ValueError for a first row of another form."""
        lacking = [" or ".join(group) for group in self.columns if not set(group) & set(row)]
        if lacking:
            raise ValueError(
                f"{origin}: has the columns {', '.join(sorted(row))}, and lacks {'; '.join(lacking)}. Choose another "
                "source=, or name the columns yourself with source=mapping mapping=FILE.yaml"
            )


def text_of(row: Row, *names: str) -> str:
    """The first of the columns that holds text or a number, as text; "" without one."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return ""


def bare_answer(text: str) -> str:
    """What stands between the last answer tags, or the text itself."""
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()


def problem_type(text: str) -> str:
    name = re.sub(r"[\s/-]+", "_", text.strip().lower())
    known = PROBLEM_TYPES.get(name) or PROBLEM_TYPES.get(name.partition("_")[0])
    return known or "other"  # scored by equality, as the released trainer does


def bare_choices(options: Any) -> tuple[str, ...]:
    """Choices without their letters, where they bring the right ones: the prompt puts them in front."""
    if isinstance(options, Mapping):
        options = [options[key] for key in sorted(options)]
    if isinstance(options, str):
        raise Refused("choices", f"the choices are a text, not a list: {options[:80]!r}")
    texts = [str(option).strip() for option in (options if options is not None else [])]
    letters = [match[1] if (match := _LETTERED.match(text)) else None for text in texts]
    if texts and letters == list(string.ascii_uppercase[: len(texts)]):
        texts = [_LETTERED.sub("", text, count=1) for text in texts]
    return tuple(texts)


def without_placeholders(text: str) -> str:
    return _PLACEHOLDER.sub("", text).strip()


def media_of(value: Any, kind: str) -> tuple[Source, ...]:
    """Media of a column: a path, {"bytes", "path"}, or a list of these."""
    if value is None or value == "":
        return ()
    if isinstance(value, list | tuple):
        return tuple(source for item in value for source in media_of(item, kind))
    if isinstance(value, Mapping) and value.get("bytes"):
        return (Source(kind, str(value.get("path") or ""), value["bytes"]),)
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not path:
        raise Refused("media_column", f"a {kind} is {str(value)[:80]!r}, not a path or bytes")
    return (Source(kind, path),)


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
    turns = {turn.get("role"): str(turn.get("content") or "") for turn in row.get("messages") or []}
    solution = text_of(row, "solution") or turns.get("assistant", "")
    stage = _avatar_stage(text_of(row, "stage"), origin, stage)
    hint = row.get("hint")
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
        hint="\n".join(str(part).strip() for part in (hint if isinstance(hint, list) else [hint or ""])) or None,
        audio_caption=text_of(row, "audio_cues") or None,
    )


def _avatar_stage(value: str, origin: str, given: str) -> str:
    """By the row's own column, else by a file name that holds `stage2`, else as the user says."""
    named = re.search(r"stage[ _-]?([0-3])", f"stage{value}" if value.isdecimal() else value or origin)
    stage = STAGES[int(named[1])] if named else value or given
    if not stage:
        raise ValueError(f"{origin}: neither row nor file names a stage; write stage= one of {', '.join(STAGES)}")
    return stage


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
