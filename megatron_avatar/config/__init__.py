"""Typed settings: the schema, the YAML groups, loading and validation. Needs neither torch nor Megatron.

Hydra is imported when something is loaded or saved, so that a policy can be built where there is none.
"""

from typing import Any

from megatron_avatar.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HintConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReplayConfig,
    RLConfig,
    SamplingConfig,
    ShapingConfig,
    StageConfig,
)
from megatron_avatar.config.validate import check_world, validate

LOADING = ("differences", "load_config", "save_config")

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "HintConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RLConfig",
    "ReplayConfig",
    "SamplingConfig",
    "ShapingConfig",
    "StageConfig",
    "check_world",
    "differences",
    "load_config",
    "save_config",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in LOADING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_avatar.config import load

    return getattr(load, name)
