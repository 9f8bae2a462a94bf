"""What a medium's placeholder becomes in a prompt: a token for each of its embeddings, and positions on three axes.

Shapes: K tokens of a medium, V of its pictures, A of its sound. Positions are float64, relative to the placeholder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import numpy as np

from megatron_avatar.config.families import MERGE, Family
from megatron_avatar.data.plan import MediaPlan
from megatron_avatar.records import MediaKind

Expanded = tuple[np.ndarray, np.ndarray, float]


class Expander:
    """The rules of a family and the token ids of a configuration. `placeholders`: the token of each kind of medium."""

    def __init__(self, config: Any, family: Family, placeholders: Mapping[MediaKind, int]) -> None:
        self.family, self.placeholders = family, dict(placeholders)
        # Without a time axis every pair of frames lies at time 0 of its own.
        self.rate = attrgetter(family.position_rate)(config) if family.position_rate else 0
        if family.hears:
            self.audio_start, self.audio_end = config.audio_start_token_id, config.audio_end_token_id
            self.chunk = 0 if family.continuous else int(self.rate * config.seconds_per_chunk)

    def __call__(self, plan: MediaPlan) -> Expanded:
        """Tokens [K] of one placeholder, positions [3, K] relative to its own, and how far the text after it moves."""
        sound = line(self.family.audio_tokens(plan.mel_frames) if plan.mel_frames else 0)
        if plan.kind == "audio":
            return np.full(sound.shape[1], self.placeholders["audio"]), sound, sound.shape[1]
        t, h, w = plan.grid[0], plan.grid[1] // MERGE, plan.grid[2] // MERGE
        # float32 like transformers: at a chunk's border the rounding decides
        seconds = np.arange(t, dtype=np.float32) * np.float32(plan.seconds_per_grid)
        times = (seconds * np.float32(self.rate)).astype(np.float64 if self.family.continuous else np.int64)
        axes = np.meshgrid(times, np.arange(h), np.arange(w), indexing="ij")
        picture = np.stack([axis.ravel() for axis in axes]).astype(np.float64)
        if plan.mel_frames:
            return (self._merge if self.family.continuous else self._interleave)(plan, picture, sound)
        end = (picture if self.family.time_ends else picture[1:]).max() + 1
        return np.full(picture.shape[1], self.placeholders[plan.kind]), picture, float(end)

    def _interleave(self, plan: MediaPlan, picture: np.ndarray, sound: np.ndarray) -> Expanded:
        """Audio in video: chunk after chunk of time, the picture's tokens [3, V], then the sound's [3, A].

        The audio begin token shares the position of the vision begin token before it, the audio end token that of the
        vision end token after it, and the text goes on after the last chunk's last position, as in transformers.
        """
        video, audio = self.placeholders["video"], self.placeholders["audio"]
        chunks = zip_longest(*(_chunks(stream, self.chunk) for stream in (picture, sound)))
        pieces = [(token, piece) for pair in chunks for token, piece in zip((video, audio), pair, strict=True)]
        pieces = [(token, piece) for token, piece in pieces if piece is not None]
        end = float(pieces[-1][1].max()) + 1
        ids = [np.full(piece.shape[1], token) for token, piece in pieces]
        ids = [np.array([self.audio_start]), *ids, np.array([self.audio_end])]
        positions = [line(1) - 1, *(piece for _, piece in pieces), line(1) + end]
        return np.concatenate(ids), np.concatenate(positions, axis=1), end

    def _merge(self, plan: MediaPlan, picture: np.ndarray, sound: np.ndarray) -> Expanded:
        """Audio in video, token by token by time; of equal times the picture's [3, V] come before the sound's [3, A].

        The audio begin and end tokens have positions of their own. As in transformers' processor times are compared in
        float64, and what follows begins after the last position of what is left when picture or sound is through.
        """
        ticks = sound[0]
        times = np.repeat(np.arange(plan.grid[0]) * plan.seconds_per_grid * self.rate, picture.shape[1] // plan.grid[0])
        left = picture[:, times > ticks[-1]] if times[-1] > ticks[-1] else sound[:, ticks >= times[-1]]
        end = float(left.max()) + 2
        order = np.argsort(np.concatenate([times, ticks]), kind="stable")
        kinds = np.repeat([self.placeholders["video"], self.placeholders["audio"]], [len(times), len(ticks)])
        ids = np.concatenate([[self.audio_start], kinds[order], [self.audio_end]])
        merged = np.concatenate([picture, sound], axis=1)[:, order] + 1
        return ids, np.concatenate([line(1), merged, line(1) + end], axis=1), end + 1


def line(count: int) -> np.ndarray:
    """Positions [3, count] of text or sound that begins at 0."""
    return np.tile(np.arange(count, dtype=np.float64), (3, 1))


def _chunks(positions: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts positions [3, K] where their time reaches the next multiple of `size`.

    As in transformers a token makes at most one cut: where frames are further apart than a chunk, the cuts lag behind.
    """
    cuts: list[int] = []
    for index, time in enumerate(positions[0].tolist()):
        if time >= size * (len(cuts) + 1):
            cuts.append(index)
    return np.split(positions, cuts, axis=1)
