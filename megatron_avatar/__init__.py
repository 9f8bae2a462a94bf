"""Megatron-AVATAR: reinforcement learning for models that see, hear and reason over video."""

from megatron_avatar import first_words

__version__ = "0.1.0"
first_words.say()
