"""A preparation run in this process, and what came out."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from data_tools.prepare.settings import parse
from data_tools.prepare.work import prepare
from megatron_avatar.config import load_config
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.policy.architecture import read_config

RECIPE = ["recipe=tiny_avatar", "model.context=2048"]


def run(source: str, rows: Path | str, out: Path, model: Path, *more: str) -> Path:
    arguments = [f"source={source}", f"input={rows}", f"out={out}", f"model={model}", "processes=2", "eval_share=0"]
    prepare(*parse([*arguments, *RECIPE, *more]), Console(quiet=True))
    return out


def check_trains(out: Path, model: Path, *overrides: str) -> dict:
    """Loads the manifest and builds every prompt, whose length must be the measured one."""
    config = load_config([*RECIPE, "dry_run=true", *overrides])
    builder = PromptBuilder(load_tokenizer(model), read_config(model), config.data, config.model.context)
    samples = load_manifest(out / "manifest.jsonl")
    for sample in samples:
        assert len(builder.build(sample, out)) == builder.length(sample)
    return {sample.id: sample for sample in samples}


def rejected(out: Path) -> dict[int, str]:
    return {entry["row"]: entry["refused"] for entry in map(json.loads, (out / "rejected.jsonl").open())}
