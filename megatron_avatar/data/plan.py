"""What one medium becomes in a prompt, known from its manifest line before any file is opened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_avatar.config.families import MERGE, TEMPORAL_PATCH, Family
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data import features
from megatron_avatar.data.container import Fit
from megatron_avatar.data.decode import clip_seconds, frame_seconds, plan_frames
from megatron_avatar.records import Media, MediaKind


@dataclass(frozen=True)
class MediaPlan:
    """What one medium becomes, known from its manifest line: `kind` is the placeholder that it fills.

    indices [T]: frames to decode; size (height, width) in pixels, grid (t, h, w) in patches, all 0 without a picture;
    mel_frames 0 without sound.
    """

    media: Media
    kind: MediaKind
    indices: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds_per_grid: float = 0.0
    mel_frames: int = 0

    @property
    def fit(self) -> Fit:
        """From the size in the manifest to that which is shown."""
        return Fit((self.media.height, self.media.width), self.size)

    @property
    def timestamps(self) -> list[str]:
        """The text before each pair of a video's frames: the mean of their times."""
        assert self.indices is not None
        seconds = frame_seconds(self.media, self.indices)
        return [f"<{mean:.1f} seconds>" for mean in (seconds[::2] + seconds[1::2]) / 2]


def plan_media(media: Media, data: DataConfig, family: Family) -> MediaPlan | None:
    """Plan for one medium; None where `data.mute` or `data.blind` leaves nothing of it.

    The sound of a video is heard where its manifest line says `audio_in_video` and names an `audio_path`.
    """
    heard = media.kind == "audio" or (media.kind == "video" and media.audio_in_video and media.audio_path is not None)
    mel_frames = -(-media.audio_samples // features.HOP) if heard and not data.mute else 0
    if media.kind == "audio" or data.blind:
        return MediaPlan(media, "audio", mel_frames=mel_frames) if mel_frames else None
    if media.kind == "image":
        least = min(family.image_min_pixels, data.image_max_pixels)
        h, w = features.smart_resize(media.height, media.width, least, data.image_max_pixels, family.factor)
        return MediaPlan(media, "image", size=(h, w), grid=(1, h // family.patch, w // family.patch))
    indices = plan_frames(media, data, family.odd_frames)
    together = len(indices) if family.whole_clip else 1
    room = family.clip_pixels if family.whole_clip else family.clip_pixels // len(indices) * TEMPORAL_PATCH
    most = min(data.frame_max_pixels * together, room)
    least = min(data.frame_min_pixels * together, most)
    h, w = features.smart_resize(media.height, media.width, least, most, family.factor, together)
    indices = np.append(indices, indices[-1:].repeat(len(indices) % TEMPORAL_PATCH))  # fills the last pair
    grid = (len(indices) // TEMPORAL_PATCH, h // family.patch, w // family.patch)
    return MediaPlan(media, "video", indices, (h, w), grid, clip_seconds(media) / grid[0], mel_frames)


def count_tokens(plan: MediaPlan, family: Family) -> dict[str, int]:
    """Tokens of a medium's pictures and of its sound, counted before there is an array of that size."""
    t, h, w = plan.grid
    sound = family.audio_tokens(plan.mel_frames) if plan.mel_frames else 0
    kind = "video" if plan.kind == "audio" else plan.kind
    between = 2 if plan.kind == "video" and plan.mel_frames else 0  # where audio in video begins and ends
    return {"image": 0, "video": 0, "audio": sound + between} | {kind: t * h * w // MERGE**2}
