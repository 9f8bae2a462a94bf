"""The manifest: one JSON object a line, one line a sample. Media paths are relative to its folder."""

from __future__ import annotations

import difflib
import json
import logging
import os
import string
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from megatron_avatar.files import repaired, replacing, unwritable
from megatron_avatar.records import Media, MediaKind, ProblemType, Sample

log = logging.getLogger(__name__)
MIN_AUDIO_SAMPLES = 321  # less makes no audio token
MEASURED: dict[MediaKind, tuple[str, ...]] = {
    "video": ("frame_count", "fps", "height", "width"),
    "image": ("height", "width"),
    "audio": (),
}
# JSON types of each key; every other key is text.
TYPES: dict[str, tuple[type, ...]] = {
    "choices": (list,),
    "media": (list,),
    "scene": (dict, type(None)),
    "trace": (str, type(None)),
    "hint": (str, type(None)),
    "audio_caption": (str, type(None)),
    "audio_path": (str, type(None)),
    "frame_count": (int,),
    "height": (int,),
    "width": (int,),
    "audio_samples": (int,),
    "fps": (int, float),
    "pts": (list, type(None)),
    "audio_in_video": (bool,),
}


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """The JSON object of a sample, keys at their default left out."""

    def written(record: Sample | Media) -> dict[str, Any]:
        return {f.name: value for f in fields(record) if (value := getattr(record, f.name)) != f.default}

    return written(sample) | ({"media": [written(media) for media in sample.media]} if sample.media else {})


def sample_from_dict(entry: dict[str, Any]) -> Sample:
    """The sample of a JSON object. Raises ValueError naming the key and the remedy."""
    values = _checked(entry, Sample, "sample")
    media = tuple(_media(item, f"media[{i}]") for i, item in enumerate(values.pop("media", [])))
    choices = tuple(values.pop("choices", []))
    _allowed(values["problem_type"], "problem_type", get_args(ProblemType))
    if not all(isinstance(choice, str) for choice in choices) or len(choices) > len(string.ascii_uppercase):
        raise ValueError("`choices` must be at most 26 texts")
    if not values["id"]:
        raise ValueError("`id` is empty; give every sample a name of its own")
    return Sample(**values, choices=choices, media=media)


def write_manifest(path: Path, samples: Iterable[Sample]) -> None:
    """Writes the manifest beside its final name and renames it, so that no reader meets half of it."""
    with replacing(Path(path)) as file:
        file.writelines(json.dumps(sample_to_dict(sample), ensure_ascii=False) + "\n" for sample in samples)


def load_manifest(
    path: Path, *, stages: Collection[str] | None = None, split: str | None = None, check_media: bool = True
) -> list[Sample]:
    """Samples of the manifest in its order, those of `stages` and `split` where given.

    Raises ValueError naming file, line, key and remedy for a line that is no JSON object, a missing, unknown or
    ill-typed key, a duplicate id, and a media path outside the manifest's folder; with `check_media` also for a media
    file of a chosen sample that is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; set data.manifest to a JSONL file")
    chosen: list[Sample] = []
    lines_of: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                sample = sample_from_dict(parsed(line, f"{path}, line {number}"))
                if sample.id in lines_of:
                    raise ValueError(f"`id` {sample.id!r} is also on line {lines_of[sample.id]}; rename one of them")
                lines_of[sample.id] = number
                if (stages is None or sample.stage in stages) and split in (None, sample.split):
                    if check_media:
                        _require_media(sample, path.parent)
                    chosen.append(sample)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return chosen


def parsed(line: bytes, where: str) -> Any:
    """A manifest's line as JSON, with U+FFFD, and a warning, for what no file can hold. ValueError for one that isn't
    JSON."""
    try:
        text = line.decode("utf-8-sig")
        entry = json.loads(text)
        written = json.dumps(entry, ensure_ascii=False) if "\\ud" in text.lower() else ""
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deep"
        raise ValueError(f"not JSON ({reason}); write one JSON object a line, as UTF-8") from None
    if reason := unwritable(written):
        log.warning("%s: a text is broken (%s); U+FFFD stands there now", where, reason)
        return json.loads(repaired(written))
    return entry


def _checked(entry: Any, record: type, what: str) -> dict[str, Any]:
    """A copy of `entry` with the keys and JSON types of `record`, or ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"a {what} must be a JSON object, not {type(entry).__name__}")
    known = {f.name: f for f in fields(record)}
    for key, value in entry.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"{what} has the unknown key `{key}`; " + (f"use `{near[0]}`" if near else "remove it"))
        types = TYPES.get(key, (str,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{what} has `{key}` of type {type(value).__name__}; write {names}")
    for key, f in known.items():
        if key not in entry and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{what} lacks the key `{key}`; add it")
    return dict(entry)


def _allowed(value: str, key: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"`{key}` is {value!r}; write one of {', '.join(names)}")


def _media(entry: Any, what: str) -> Media:
    values = _checked(entry, Media, what)
    _allowed(values["kind"], f"{what}.kind", get_args(MediaKind))
    if values.get("pts") is not None:
        if not all(isinstance(second, int | float) for second in values["pts"]):
            raise ValueError(f"{what}.pts must be numbers, one time in seconds a frame; measure {values['path']} again")
        values["pts"] = tuple(float(second) for second in values["pts"])
    media = Media(**values)
    for key in ("path", "audio_path"):
        location = getattr(media, key)
        if location is not None:
            inside = PurePosixPath(os.path.normpath(location))
            if not location or inside.is_absolute() or ".." in inside.parts:
                raise ValueError(f"{what}.{key} {location!r} lies outside the manifest's folder; move the file there")
    for key in MEASURED[media.kind]:
        if not getattr(media, key) > 0:
            raise ValueError(f"{what}.{key} must be above 0; measure {media.path} again")
    if media.pts is not None and (
        len(media.pts) != media.frame_count or not all(a < b for a, b in pairwise(media.pts))
    ):
        raise ValueError(f"{what}.pts must be one rising time in seconds a frame; measure {media.path} again")
    if (media.kind == "audio" or media.audio_path is not None) and media.audio_samples < MIN_AUDIO_SAMPLES:
        raise ValueError(
            f"{what}.audio_samples is {media.audio_samples}, too short to hear (at least {MIN_AUDIO_SAMPLES}); "
            "leave audio_path out of a mute clip"
        )
    return media


def _require_media(sample: Sample, root: Path) -> None:
    for index, media in enumerate(sample.media):
        for key in ("path", "audio_path"):
            location = getattr(media, key)
            file = root / location if location is not None else None
            if file is not None and not os.path.isfile(file):
                raise ValueError(f"media[{index}].{key}: the file {file} is missing; restore it or remove the line")
            if file is not None and file.stat().st_size == 0:
                raise ValueError(f"media[{index}].{key}: the file {file} is empty; make it again or remove the line")
