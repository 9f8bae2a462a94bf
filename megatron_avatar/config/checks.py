"""What is refused before a model is built or a job submitted: folders that hold something else, or can't be written.

Reads configuration files alone, in a second, on any host.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_avatar.config.families import FAMILIES, NAMES, Family, check_quantized, family_of
from megatron_avatar.config.load import CONFIG_DIR, differences
from megatron_avatar.config.schema import Config
from megatron_avatar.config.validate import check_pixels
from megatron_avatar.files import step_folders

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
OWN_SIZES = tuple(dict.fromkeys(name for family in FAMILIES for name in family.text_sizes))  # 0 where there are none


def check_same_run(config: Config) -> dict[str, Any]:
    """The settings that differ from those of the run in output_dir: key -> (saved, now).

    Raises ValueError naming them, unless continue_changed=true says that they may.
    """
    path = Path(config.output_dir) / "config.yaml"
    changed = differences(path, config) if path.exists() else {}
    if changed and not config.continue_changed:
        listed = "; ".join(f"{key} was {saved!r}, now {now!r}" for key, (saved, now) in changed.items())
        raise ValueError(
            f"{path}: this folder holds a run of other settings: {listed}. Choose another output_dir, remove the "
            "folder to start anew, or write continue_changed=true to go on with the new ones"
        )
    return changed


def check_same_model(config: Config) -> None:
    """Raise ValueError where output_dir's newest checkpoint is of a model of other sizes than model.path's."""
    newest = next(reversed(step_folders(Path(config.output_dir) / "checkpoints").values()), None)
    if newest is None:
        return
    try:
        saved = json.loads((newest / "state.json").read_text())["model"]
    except (OSError, ValueError, KeyError):
        return  # a damaged one, which is named and passed over when it is loaded
    if different := _difference(model_sizes(config), saved):
        raise ValueError(
            f"{newest} is a checkpoint of another model than {config.model.path} ({different}): correct "
            "model.path, or choose another output_dir"
        )


def check_family(config: Config) -> None:
    """Raise ValueError where the folder at model.path, if there is one, is of another family than the recipe's model,
    or of none that can be trained: pixels, sound and stages are a family's. Without one the recipe's model counts."""
    path = Path(config.model.path) / "config.json"
    shape = CONFIG_DIR / "shapes" / config.model.shape / "config.json" if config.model.shape else path
    if not (path.is_file() or shape.is_file()):
        return
    wanted = _family(shape)
    family = _family(path) if path.is_file() else wanted
    if family is not wanted:
        raise ValueError(
            f"model.path={config.model.path} is a {family.name}, but the recipe (model.shape={config.model.shape}) is "
            f"for {wanted.name}: point model.path to one, take a recipe whose model.shape is of {family.name}, or "
            "write model.shape='' parallel=single to use this one's settings all the same"
        )
    if config.rl.routing_replay and "num_experts" not in family.text_sizes:
        raise ValueError(f"rl.routing_replay=true, but {family.name} is dense, without experts: leave it out")
    check_pixels(config.data, family)


def _family(path: Path) -> Family:
    """Of a config.json, whose weights aren't quantized."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        family = family_of(found.get("model_type"))
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    check_quantized(found, path)
    return family


def check_folder(folder: Path) -> None:
    """Raise ValueError where files can't be written into `folder`, which need not exist yet; nothing is left there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"output_dir={folder}: nothing can be written into {there} ({error.strerror}): choose another output_dir, "
            "or correct its permissions or quota"
        ) from None


def model_sizes(config: Config) -> dict[str, int]:
    """The sizes of the language model at model.path that a checkpoint has to share.

    Raises ValueError where that folder holds no configuration of a known kind.
    """
    return _sizes(Path(config.model.path))


def other_shape(config: Config) -> str:
    """In what the folder at model.path differs from model.shape, in words; empty where it doesn't."""
    shape = config.model.shape
    return _difference(model_sizes(config), _sizes(CONFIG_DIR / "shapes" / shape)) if shape else ""


def _sizes(folder: Path) -> dict[str, int]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("thinker_config", found)  # of the full Omni class
        found = found.get("text_config", found)  # VL's older files have the sizes at their top
        sizes = {name: int(found[name]) for name in SIZES} | {name: int(found.get(name, 0)) for name in OWN_SIZES}
        return sizes | {"head_dim": int(found.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"])}
    except OSError as error:
        raise ValueError(
            f"{path} can't be read ({error.strerror}): point model.path to a Hugging Face folder of {NAMES}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of {NAMES} ({error!r})") from None


def _difference(now: dict[str, int], wanted: dict[str, int]) -> str:
    """Of what `wanted` says: a checkpoint of an earlier release knows fewer sizes."""
    pairs = {name: (size, wanted[name]) for name, size in now.items() if name in wanted}
    return ", ".join(f"{name} {size} instead of {other}" for name, (size, other) in pairs.items() if size != other)
