"""A dataset of any form, by a YAML file that says which column is what; see mapping_example.yaml."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_tools.prepare.cells import (
    Row,
    bare_answer,
    bare_choices,
    columns_of,
    filled,
    media_of,
    without_placeholders,
)
from data_tools.prepare.sources import Dataset, Draft, problem_type

MEDIA = {"videos": "video", "images": "image", "audios": "audio"}
TEXTS = ("id", "question", "answer", "problem_type", "stage", "family", "trace", "hint", "audio_caption")
FIELDS = (*TEXTS, "choices", *MEDIA)
SECTIONS = ("columns", "constants", "problem_types")


def load_mapping(path: str) -> Dataset:
    """The dataset that a mapping file describes; ValueError naming file, key and remedy."""
    if not path or not Path(path).is_file():
        raise ValueError(f"mapping={path}: there is no such file; copy data_tools/prepare/mapping_example.yaml")
    try:
        sections: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path}: no YAML ({error})") from None
    if not isinstance(sections, dict) or not sections.get("columns"):
        raise ValueError(f"{path}: has no section `columns`; see data_tools/prepare/mapping_example.yaml")
    _known(path, sections, SECTIONS)
    columns, constants, types = ({**(sections.get(name) or {})} for name in SECTIONS)
    _known(f"{path}, columns", columns, FIELDS)
    _known(f"{path}, constants", constants, TEXTS)
    if lacking := [name for name in ("question", "answer") if name not in columns]:
        raise ValueError(f"{path}: columns lacks {' and '.join(lacking)}; name the column of each")
    wanted = {name for value in columns.values() for name in columns_of(str(value))}

    def draft(row: Row, origin: str, stage: str) -> Draft:
        values = {name: filled(row, str(columns[name])) for name in TEXTS if name in columns} | {
            name: str(value) for name, value in constants.items()
        }
        kind = values.get("problem_type", "")
        return Draft(
            id=values.get("id", ""),
            question=without_placeholders(values["question"]),
            answer=bare_answer(values["answer"]),
            problem_type=problem_type(str(types.get(kind, kind))),
            stage=values.get("stage") or stage or "visual",
            family=values.get("family") or Path(path).stem,
            choices=bare_choices(row.get(str(columns.get("choices", "")))),
            media=tuple(
                source for name, kind in MEDIA.items() if name in columns
                for source in _media(row, str(columns[name]), kind)
            ),
            trace=values.get("trace") or None,
            hint=values.get("hint") or None,
            audio_caption=values.get("audio_caption") or None,
        )  # fmt: skip

    return Dataset(tuple((name,) for name in sorted(wanted)), draft)


def _known(where: str, keys: dict[Any, Any], names: tuple[str, ...]) -> None:
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            raise ValueError(f"{where}: unknown key `{key}`; use {f'`{near[0]}`' if near else ', '.join(names)}")


def _media(row: Row, value: str, kind: str) -> tuple[Any, ...]:
    return media_of(filled(row, value) if "{" in value else row.get(value), kind)
