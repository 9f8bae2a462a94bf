"""A profile (slurm/profiles/NAME.yaml) with its {placeholders} filled in: paths that the command line, the environment
or the site's file names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_avatar.config import load_config
from megatron_avatar.config.paths import MODELS, NAMES, fetch, given, refuse, variable

PROFILES = Path(__file__).parent / "profiles"


def read_profile(
    name: str, out: Path, settings: list[str], *, outlined: bool = False
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The profile, the settings that are left, and what is missing, in lines that say how to give it.

    Entries of `models` whose placeholder (`{name?}`) isn't given are left out. Raises ValueError with everything that
    is missing, unless the graph is only `outlined`: then stand-ins of the same names are filled in.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        choices = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ValueError(f"profile={name}: choose one of {choices}")
    text = path.read_text()
    wanted = {*re.findall(r'"[^"\n]*{(\w+)}', text)} - {"out"}
    optional = {*re.findall(r'"[^"\n]*{(\w+)\?}', text)}
    own = {k: v for k, _, v in (item.partition("=") for item in settings) if k in wanted | optional}
    found = {k: own.get(k) or given(k, site_paths(settings)) for k in wanted | optional} if wanted else dict(own)
    missing = [f"{key} is not given: {_ways(key)}" for key in sorted(wanted) if not found.get(key)]
    missing += [f"{key}={value} doesn't exist: correct it" for key, value in sorted(found.items())
                if value and not Path(value).exists()]  # fmt: skip
    if not outlined:
        refuse(missing)
    filled = {key: value for key, value in found.items() if value} | {"out": str(out)}
    filled |= {key: key.upper() for key in wanted - filled.keys()}
    profile = _filled(OmegaConf.to_container(OmegaConf.create(text)), filled)
    for parts in profile["families"].values():
        parts["models"] = {name: folder for name, folder in parts.get("models", {}).items() if "?}" not in folder}
    return profile, [s for s in settings if s.partition("=")[0] not in own], missing


def _filled(part: Any, values: dict[str, str]) -> Any:
    """A part of a profile with its placeholders filled in, whatever signs a path holds."""
    if isinstance(part, dict):
        return {name: _filled(value, values) for name, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, values) for value in part]
    if not isinstance(part, str):
        return part
    return re.sub(r"\{(\w+)\??\}", lambda found: values.get(found[1], found[0]), part)


def site_paths(settings: list[str]) -> dict[str, str]:
    """cluster.paths of the site that the settings name."""
    site = [item for item in settings if item.startswith("cluster")]
    return load_config(["recipe=tiny_sft", "model.path=-", "data.manifest=-", *site]).cluster.paths


def _ways(key: str) -> str:
    """What a name stands for, how to give it, and where it comes from: the command on a line of its own."""
    ways = f"{NAMES.get(key, 'a folder')}: write {key}=PATH, export {variable(key)}=PATH, or put it into cluster.paths"
    for model in MODELS.values():
        if model.key == key:
            return f"{ways}. To fetch it ({model.gigabytes} GB):\n    {fetch(model.hub)}"
    how = {"data": "data_tools.prepare --sources", "data_vl": "data_tools.prepare --sources",
           "benchmarks": "eval.run --benchmarks"}  # fmt: skip
    return f"{ways}. Where it comes from:\n    .venv/bin/python -m {how[key]}" if key in how else ways
