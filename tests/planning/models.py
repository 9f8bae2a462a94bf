"""Small models, packed groups and plans that the tests of planning share."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_avatar.config.load import load_config
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.planning.plan import make_plan
from megatron_avatar.policy.backend import start, stop
from megatron_avatar.policy.build import build_policy
from tests.policy.tiny import tiny_config

SIZES = {  # model, groups (prompt, completions)
    "shallow": (dict(layers=2), [(40, [9, 3, 7])]),
    "deep": (dict(layers=5, tied=True), [(200, [30] * 4), (120, [40] * 3)]),
    "wide": (dict(layers=2, qwen=True), [(90, [60, 50])]),
}


def save(folder: Path, **kwargs) -> str:
    tiny_config(**kwargs).save_pretrained(folder)
    return str(folder)


@contextmanager
def one_rank(folder: str, model: ModelConfig, parallel: ParallelConfig):
    """A real policy with finite weights in this process."""
    backend = start(parallel)
    try:
        policy = build_policy(folder, backend, model, parallel)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.normal_(std=0.02)
        yield policy
    finally:
        stop()


def plan(*overrides: str, recipe: str = "avatar_7b"):
    return make_plan(load_config([f"recipe={recipe}", "dry_run=true", *overrides]))
