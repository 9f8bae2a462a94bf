"""What is refused, or said, before a model is built: folders that hold something else, or can't be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_avatar.config import differences
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import Config
from megatron_avatar.policy.architecture import read_config

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_same_run(folder: Path, config: Config) -> dict[str, Any]:
    """The settings that differ from those of the run in `folder`: key -> (saved, now).

    Raises ValueError naming them, unless continue_changed=true says that they may.
    """
    path = folder / "config.yaml"
    changed = differences(path, config) if path.exists() else {}
    if changed and not config.continue_changed:
        listed = "; ".join(f"{key} was {saved!r}, now {now!r}" for key, (saved, now) in changed.items())
        raise ValueError(
            f"{path}: this folder holds a run of other settings: {listed}. Choose another output_dir, remove the "
            "folder to start anew, or write continue_changed=true to go on with the new ones"
        )
    return changed


def check_folder(folder: Path) -> None:
    """Raise ValueError where the run's folder can't be written; nothing is made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir={folder}: {there} is {'not writable' if there.is_dir() else 'a file'}: choose another "
            "output_dir or correct its permissions"
        )


def check_same_model(folder: Path, config: Config) -> None:
    """Raise ValueError where the newest checkpoint in `folder` is of a model of other sizes than model.path's."""
    states = sorted(folder.glob("checkpoints/step_*/state.json"))
    if not states:
        return
    try:
        saved = json.loads(states[-1].read_text())["model"]
    except (OSError, ValueError, KeyError):
        return  # a damaged checkpoint is passed over later, and named there
    now = model_sizes(config)
    if different := [f"{name} {now[name]} instead of {saved[name]}" for name in SIZES if now[name] != saved[name]]:
        raise ValueError(
            f"{states[-1].parent} is a checkpoint of another model than {config.model.path} ({', '.join(different)}): "
            "correct model.path, or choose another output_dir"
        )


def model_sizes(config: Config) -> dict[str, int]:
    """The sizes of the language model at model.path that a checkpoint has to share."""
    text = read_config(config.model.path).text_config
    return {name: getattr(text, name) for name in SIZES}


def other_shape(config: Config) -> str:
    """In what the folder at model.path differs from model.shape, in words; empty where it doesn't."""
    if not config.model.shape:
        return ""
    own, wanted = (read_config(folder).text_config for folder in
                   (config.model.path, CONFIG_DIR / "shapes" / config.model.shape))
    return ", ".join(f"{name} {getattr(own, name)} instead of {getattr(wanted, name)}" for name in SIZES
                     if getattr(own, name) != getattr(wanted, name))
