"""Where models and data are that the command line doesn't name: in the environment, or in the site's file.

One table of names serves all commands: AVATAR_MODEL_7B in the environment, cluster.paths.model_7b of a site, model_7b=
of slurm/reproduce.py. The command line comes first, then a cold start's export, then the environment, then the site.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_avatar.config.schema import Config

NAMES = {
    "model_7b": "the folder of Qwen2.5-Omni-7B",
    "model_3b": "the folder of Qwen2.5-Omni-3B",
    "model_vl_7b": "the folder of Qwen2.5-VL-7B-Instruct",
    "model_vl3_8b": "the folder of Qwen3-VL-8B-Instruct",
    "model_vl3_4b": "the folder of Qwen3-VL-4B-Instruct",
    "model_vl3_2b": "the folder of Qwen3-VL-2B-Instruct",
    "model_omni3": "the folder of Qwen3-Omni-30B-A3B-Instruct",
    "data": "the manifest of the audio-visual data",
    "data_vl": "the manifest of the mathematics on pictures",
    "benchmarks": "the folder of the benchmarks, one folder each",
}


@dataclass(frozen=True)
class Published:
    """A published model: its name on the hub, the gigabytes of its files, its key in NAMES and that of its data."""

    hub: str
    gigabytes: int
    key: str
    data: str


# By model.shape. Sizes: the published parameters at two bytes each, talker included.
MODELS = {
    "qwen2_5_omni_7b": Published("Qwen/Qwen2.5-Omni-7B", 22, "model_7b", "data"),
    "qwen2_5_omni_3b": Published("Qwen/Qwen2.5-Omni-3B", 12, "model_3b", "data"),
    "qwen2_5_vl_7b": Published("Qwen/Qwen2.5-VL-7B-Instruct", 17, "model_vl_7b", "data_vl"),
    "qwen3_vl_8b": Published("Qwen/Qwen3-VL-8B-Instruct", 18, "model_vl3_8b", "data"),
    "qwen3_vl_4b": Published("Qwen/Qwen3-VL-4B-Instruct", 9, "model_vl3_4b", "data"),
    "qwen3_vl_2b": Published("Qwen/Qwen3-VL-2B-Instruct", 5, "model_vl3_2b", "data"),
    "qwen3_omni_30b": Published("Qwen/Qwen3-Omni-30B-A3B-Instruct", 71, "model_omni3", "data"),
}


def variable(key: str) -> str:
    """The environment variable of a name."""
    return f"AVATAR_{key.upper()}"


def given(key: str, site: dict[str, str]) -> str:
    """The path of a name, from the environment or the site's cluster.paths; empty where neither has one."""
    return os.path.expanduser(os.environ.get(variable(key)) or site.get(key, ""))


def home(item: str) -> str:
    """A `key=value` of a command line with `~/` as the user's home: shells see it at the beginning of a word alone."""
    key, equals, value = item.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equals and (value == "~" or value.startswith("~/")) else item


def cold_start(config: Config) -> Path | None:
    """Where the recipe's cold start leaves the model that this one begins with; None: the recipe has none."""
    return Path("runs", config.model.cold_start, "export", "sft") if config.model.cold_start else None


def fill(config: Config) -> None:
    """Find model.path and data.manifest where they are empty. What isn't found stays empty.

    A run that has begun goes on with its model, though a cold start may have appeared since. Raises ValueError where a
    cold start has begun and not ended: its export is what the run should begin with.
    """
    published = MODELS.get(config.model.shape)
    if published is None:
        return
    config.data.manifest = config.data.manifest or given(published.data, config.cluster.paths)
    if config.model.path:
        return
    export = cold_start(config)
    config.model.path = _begun_with(Path(config.output_dir) / "config.yaml")
    if not config.model.path and export is not None:
        if (export / "config.json").is_file():
            config.model.path = str(export)
        elif (run := export.parents[1]).joinpath("config.yaml").is_file():
            raise ValueError(
                f"{run} has begun a cold start that isn't done: wait until {export} is there, or write "
                "model.path=FOLDER to begin with another model"
            )
    config.model.path = config.model.path or given(published.key, config.cluster.paths)


def _begun_with(saved: Path) -> str:
    """model.path of a run's config.yaml, empty where there is none. By its text: YAML takes a tenth of a second."""
    found = re.search(r"^model:\n  path: (.+)$", saved.read_text(encoding="utf-8"), re.M) if saved.is_file() else None
    return found[1].strip("'\"") if found else ""


def origin(config: Config) -> str:
    """Where model.path comes from, in words."""
    published = MODELS.get(config.model.shape)
    if config.model.path == str(cold_start(config)):
        return f"the cold start's export of {config.model.cold_start}"
    if published and config.model.path == given(published.key, config.cluster.paths):
        where = variable(published.key) if os.environ.get(variable(published.key)) else f"cluster.paths.{published.key}"
        return f"{where}, without a cold start" if config.model.cold_start else where
    return "as named"


def missing(config: Config) -> list[str]:
    """A line for each of model.path and data.manifest that is empty, with the ways to give it."""
    published, lines = MODELS.get(config.model.shape), []
    if not config.model.path:
        what, ways = "a Hugging Face folder with configuration, weights and tokenizer", "write model.path=FOLDER"
        if published:
            what = f"{NAMES[published.key]}, {published.gigabytes} GB"
            ways = f"{_ways('model.path=FOLDER', published.key)}. To fetch it: {fetch(published.hub)}"
        lines.append(f"model.path is empty ({what}): {ways}")
    if not config.data.manifest:
        what, ways = "a JSONL file with one sample a line", "write data.manifest=FILE"
        if published:
            what, ways = NAMES[published.data], _ways("data.manifest=FILE", published.data)
        lines.append(f"data.manifest is empty ({what}): {ways}. To make one: python -m data_tools.prepare --sources")
    return lines


def _ways(setting: str, key: str) -> str:
    return f"write {setting}, export {variable(key)}=PATH, or put {key} into your site's cluster.paths"


def refuse(lines: list[str]) -> None:
    """ValueError with everything that is missing or wrong at once; nothing where the list is empty."""
    if len(lines) == 1:
        raise ValueError(lines[0])
    if lines:
        raise ValueError("\n  ".join([f"{len(lines)} things are missing or wrong:", *lines]))


def fetch(hub: str, folder: str = "", *, dataset: bool = False) -> str:
    """The command that downloads a model or data set of the hub."""
    target = folder or f"{'data' if dataset else 'models'}/{hub.rpartition('/')[2]}"
    kind = " --repo-type dataset" if dataset else ""
    return f".venv/bin/hf download {shlex.quote(hub)}{kind} --local-dir {shlex.quote(target)}"


PARTS = ("config.json", "weights", "tokenizer")


def check_model(folder: str, key: str = "model.path", needs: tuple[str, ...] = PARTS) -> list[str]:
    """What is wrong with a Hugging Face folder, in lines that say what to do; nothing is read but names."""
    path = Path(folder)
    if not path.is_dir():
        published = next((model.hub for model in MODELS.values() if model.hub.endswith(f"/{path.name}")), "")
        if re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w.-]+", folder) and not path.parent.is_dir() or published:
            target = "" if published == folder or not published else folder
            command = fetch(published or folder, target)
            return [f"{key}={folder} is no folder here: models are read from disk alone. To fetch it: {command}, "
                    f"then {key}={target or f'models/{path.name}'}"]  # fmt: skip
        begins = "" if path.is_absolute() else f", which begins at {Path.cwd()}"
        return [f"{key}={folder} is no folder, seen from {os.uname().nodename}: correct the path{begins}"]
    there = {
        "config.json": (path / "config.json").is_file(),
        "weights": any(path.glob("*.safetensors")),
        "tokenizer": (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file(),
    }
    lacking = [part for part in needs if not there[part]]
    if not lacking:
        return []
    return [f"{key}={folder} lacks {', '.join(lacking)}: it is no Hugging Face folder, or its download was cut short; "
            f"download it again (the same command goes on), or correct {key}"]  # fmt: skip


def check_inputs(config: Config, made: str = "") -> list[str]:
    """What is wrong with model.path and data.manifest, as this host sees them. What lies below `made` need not be there
    yet."""
    model, manifest = Path(config.model.path), Path(config.data.manifest)
    coming = [path for path in (model, manifest) if made and path.is_relative_to(made) and not path.exists()]
    lines = check_model(config.model.path) if model not in coming else []
    if manifest in coming:
        return lines
    if not manifest.is_file():
        lines.append(f"data.manifest={manifest} doesn't exist, seen from {os.uname().nodename}: correct the path")
    elif not os.access(manifest, os.R_OK):
        lines.append(f"data.manifest={manifest} may not be read: correct its permissions")
    elif not manifest.stat().st_size:
        lines.append(f"data.manifest={manifest} is empty: prepare it again (python -m data_tools.prepare --sources)")
    return lines
