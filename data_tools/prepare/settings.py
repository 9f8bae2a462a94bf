"""The command's settings: key=value, typed; keys with a dot are the recipe's."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.prepare.mapping import load_mapping
from data_tools.prepare.rows import Input, find_input
from data_tools.prepare.sources import DATASETS, Dataset
from megatron_avatar.config import Config, load_config
from megatron_avatar.config.paths import check_model, home, refuse
from megatron_avatar.config.schema import HOW_DECODED
from megatron_avatar.files import replacing
from megatron_avatar.locks import held

HOW = ("processes", "shard", "merge", "deadline_s")  # change how fast a result comes, not what it is
ONE_OF = {"check": ("packets", "decode"), "transcode": ("none", "needed", "h264", "vp9")}


@dataclass
class Settings:
    source: str = ""  # avatar_rl | vision_r1_rl | video_r1 | mapping
    input: str = ""  # a file of rows, a folder with such files, or OWNER/NAME of the hub
    out: str = ""  # gets manifest.jsonl, media/, report.md, rejected.jsonl
    model: str = ""  # Hugging Face folder: its tokenizer and configuration tell the prompts' lengths
    recipe: str = "avatar_7b"  # what the data are for: frames, pixels, context, room for a completion
    mapping: str = ""  # YAML file of source=mapping
    media: str = ""  # folder that media paths are relative to; default: the input's
    stage: str = ""  # of rows that name none
    name: str = ""  # configuration of a dataset of the hub
    split: str = "train"  # the dataset's own split, where there are several
    revision: str = ""  # commit of a dataset of the hub
    check: str = "packets"  # packets | decode: read every frame
    transcode: str = "none"  # none | needed: clips that the decoder can't show as they are | h264 | vp9: all clips
    max_side: int = 1280  # pixels, of clips that are encoded anew
    eval_share: float = 0.02  # of the media, chosen by their content, is held out
    processes: int = 0  # 0: one a CPU
    deadline_s: float = 600.0  # for one medium
    shards: int = 1
    shard: int = 0
    merge: bool = False  # only merge shards that are done


def parse(arguments: list[str]) -> tuple[Settings, Config]:
    """Settings and recipe of a command line. Raises ValueError naming the key and the remedy."""
    own, overrides = [], []
    names = [f.name for f in fields(Settings)]
    for item in map(home, arguments):
        key, equals, _ = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} is not key=value")
        if "." in key:
            overrides.append(item)
        elif key in names:
            own.append(item)
        else:
            near = difflib.get_close_matches(key, names, 1)
            raise ValueError(f"unknown key '{key}'; " + (f"the nearest is '{near[0]}'" if near else ", ".join(names)))
    given = dict(item.split("=", 1) for item in own)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), _array() | given)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    assert isinstance(settings, Settings)
    _check(settings)
    # A plan needs neither weights nor a manifest, and there are none yet.
    return settings, load_config([f"recipe={settings.recipe}", "dry_run=true", *overrides])


def _array() -> dict[str, str]:
    """The shard of a Slurm array's task, and how many there are."""
    task, last = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_MAX")
    return {"shard": task, "shards": str(int(last) + 1)} if task and last else {}


def _check(settings: Settings) -> None:
    for key in ("source", "input", "out", "model"):
        if not getattr(settings, key):
            raise ValueError(f"{key} is missing: write {key}=...")
    if settings.source not in (*DATASETS, "mapping"):
        raise ValueError(f"source={settings.source}: choose one of {', '.join((*DATASETS, 'mapping'))}")
    for key, values in ONE_OF.items():
        if getattr(settings, key) not in values:
            raise ValueError(f"{key}={getattr(settings, key)}: choose one of {', '.join(values)}")
    if not 0 <= settings.eval_share < 1:
        raise ValueError(f"eval_share={settings.eval_share}: write a share from 0 to below 1")
    if settings.shards < 1 or not 0 <= settings.shard < settings.shards:
        raise ValueError(f"shard={settings.shard} shards={settings.shards}: shards count from 0; an array is 0-15, say")
    if settings.processes < 0 or settings.deadline_s <= 0 or settings.max_side < 56:
        raise ValueError("processes may not be below 0, deadline_s must be above 0, max_side at least 56")
    refuse(check_model(settings.model, "model", ("config.json", "tokenizer")))
    if settings.media and not Path(settings.media).is_dir():
        raise ValueError(f"media={settings.media}: there is no such folder")


def dataset_of(settings: Settings) -> Dataset:
    return load_mapping(settings.mapping) if settings.source == "mapping" else DATASETS[settings.source]


def input_of(settings: Settings) -> Input:
    return find_input(settings.input, split=settings.split, media=settings.media, name=settings.name,
                      revision=settings.revision)  # fmt: skip


def claim(settings: Settings, config: Config, source: Input) -> Path:
    """The output folder, made or recognised. Raises ValueError where it holds something else."""
    mapping = Path(settings.mapping).read_text(encoding="utf-8") if settings.mapping else ""
    identity: dict[str, Any] = {key: value for key, value in asdict(settings).items() if key not in HOW}
    identity |= {
        "input": source.fingerprint(),
        "mapping": mapping,
        "data": {key: value for key, value in asdict(config.data).items() if key not in HOW_DECODED},
        "context": config.model.context,
        "max_new_tokens": config.rl.sampling.max_new_tokens,
        "model": _model_fingerprint(settings.model),
    }
    del identity["out"], identity["recipe"], identity["media"]
    out = Path(settings.out)
    marker = out / "settings.json"
    if not marker.exists():
        with held(out / "shards" / "settings.lock", "the start of a shard", wait=True):
            if any(path.name not in ("shards", marker.name, marker.name + ".part") for path in out.iterdir()):
                raise ValueError(f"out={out}: holds other files; write an empty folder")
            if not marker.exists():
                with replacing(marker) as file:
                    file.write(json.dumps(identity, indent=1))
    before = json.loads(marker.read_text(encoding="utf-8"))
    changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
    if changed:
        raise ValueError(f"{marker}: out was begun with another {', '.join(changed)}; write another out=")
    return out


def _model_fingerprint(folder: str) -> str:
    """Of what prompts are counted with; the weights don't matter."""
    path, digest = Path(folder), hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    return digest.hexdigest()[:32]
