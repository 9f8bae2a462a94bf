"""The words that stand in every prompt, noted beside a model that was trained on them: it expects them again."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_avatar.config.schema import DataConfig

FILE = "training_prompt.json"  # in a folder that a run has exported


def asked(data: DataConfig) -> dict[str, str]:
    """What checkpoints, exports and evaluations note."""
    return {"instruction": data.instruction, "system": data.system}


def read_asked(folder: str | Path) -> dict[str, str] | None:
    """The note of an exported folder; None where there is none, as in published folders.

    Raises ValueError naming the file where it can't be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(found[key]) for key in ("instruction", "system")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error!r}): export the model again, or remove the file") from None


def other_words(trained: dict[str, str] | None, data: DataConfig) -> str:
    """In what today's words differ from those of a note, for a warning; empty where they don't, or nothing is noted."""
    if trained is None:
        return ""
    now = asked(data)
    different = [key for key in now if trained[key] != now[key]]
    return "; ".join(f"data.{key}={now[key]!r}, but it was trained with {trained[key]!r}" for key in different)
