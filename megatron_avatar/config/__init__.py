"""Typed settings: the schema, the YAML groups, loading and validation. Needs neither torch nor Megatron."""

from megatron_avatar.config.load import differing_keys, load_config, save_config
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
    "differing_keys",
    "load_config",
    "save_config",
    "validate",
]
