"""Megatron-AVATAR: reinforcement learning for models that see, hear and reason over video."""

__version__ = "0.1.0"
