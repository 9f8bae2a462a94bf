"""Features of pictures and sound as a family's encoders take them.

Shapes: T frames, H and W pixels, N patches, n audio samples, L log-mel frames.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.audio_utils import mel_filter_bank

from megatron_avatar.config.families import MERGE, TEMPORAL_PATCH, Family
from megatron_avatar.data.sound import SAMPLE_RATE

MAX_ASPECT_RATIO = 200

MEL_BINS = 128
N_FFT = 400
HOP = 160


def smart_resize(
    h: int, w: int, min_pixels: int, max_pixels: int, factor: int, frames: int = 1
) -> tuple[int, int]:
    """Nearest (height, width) in multiples of `factor` with the aspect ratio kept and min_pixels <= frames * area <=
    max_pixels. With several frames a side below `factor` is enlarged to it first, and an odd number of them counts as
    the nearer multiple of 4, as Qwen3-VL's processor does.

    Raises ValueError for an aspect ratio above 200.
    """
    if frames > 1 and min(h, w) < factor:
        grow = max(factor / h, factor / w)
        h, w = int(h * grow), int(w * grow)
    if max(h, w) > MAX_ASPECT_RATIO * min(h, w):
        raise ValueError(f"a picture of {w}x{h} has an aspect ratio above {MAX_ASPECT_RATIO}; crop it")
    height, width = (round(side / factor) * factor for side in (h, w))
    shown = round(frames / TEMPORAL_PATCH) * TEMPORAL_PATCH if frames > 1 else 1
    if shown * height * width > max_pixels:
        shrink = math.sqrt(frames * h * w / max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (h, w))
    elif shown * height * width < min_pixels:
        grow = math.sqrt(min_pixels / (frames * h * w))
        height, width = (math.ceil(side * grow / factor) * factor for side in (h, w))
    return height, width


def resize(frames: np.ndarray, h: int, w: int) -> np.ndarray:
    """Bicubic, antialiased resize of uint8 frames [T, H, W, 3] to [T, h, w, 3].

    Pillow's integer arithmetic gives the same bytes on every machine, and those of Qwen's image processor.
    """
    if frames.shape[1:3] == (h, w):
        return frames
    planes = frames.transpose(0, 3, 1, 2)
    if planes.flags.c_contiguous:  # as our decoder leaves them
        small = _resize_planes(planes.reshape(-1, *planes.shape[2:]), h, w)
        return small.reshape(len(frames), -1, h, w).transpose(0, 2, 3, 1)
    return np.stack([np.asarray(Image.fromarray(f).resize((w, h), Image.Resampling.BICUBIC)) for f in frames])


def _resize_planes(planes: np.ndarray, h: int, w: int) -> np.ndarray:
    """Planes [n, H, W] to [n, h, w], four at a time as one picture: Pillow treats each of its bands by itself."""
    small = np.empty((len(planes), h, w), np.uint8)
    for k in range(0, len(planes), 4):
        bands = [Image.fromarray(plane) for plane in planes[k : k + 4]]
        four = Image.merge("CMYK", (bands * 4)[:4])
        bytes_ = four.resize((w, h), Image.Resampling.BICUBIC).tobytes()
        small[k : k + 4] = np.frombuffer(bytes_, np.uint8).reshape(h, w, 4).transpose(2, 0, 1)[: len(bands)]
    return small


def with_colours(family: Family, folder: str | Path) -> Family:
    """The family, its colours as the folder's preprocessor_config.json says where there is one.

    Raises ValueError for a file that is no JSON, or whose image_mean and image_std are not three numbers each.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not str(folder) or not path.is_file():
        return family
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        told = {key: found[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in found}
        colours: dict[str, Any] = {key: tuple(map(float, three)) for key, three in told.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}): download it again") from None
    if any(len(three) != 3 for three in colours.values()) or 0.0 in colours.get("std", ()):
        raise ValueError(f"{path}: image_mean and image_std need three numbers each, not {told}: download it again")
    return replace(family, **colours)


@cache
def _normalised_pairs(family: Family) -> np.ndarray:
    """[3, 65536] complex64: what two neighbouring bytes of each channel become, as one number of eight bytes."""
    pairs = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    return np.take(_normalised_bytes(family), pairs, axis=1).view(np.complex64)


@cache
def _normalised_bytes(family: Family) -> np.ndarray:
    """[3, 256] float32: what each byte of each channel becomes, rounded in the order of Qwen's image processor."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (family.mean, family.std))
    return (scaled - mean) / std


def patchify(frames: np.ndarray, family: Family) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches [N, 6 * patch * patch] float32 of uint8 frames [T, H, W, 3], and their grid (t, h, w) int64.

    T is even (a picture is given twice), H and W are multiples of `family.factor`. Patches of one 2 x 2 token are
    neighbours.
    """
    t, h, w, channels = frames.shape
    patch, factor = family.patch, family.factor
    assert channels == 3 and t % TEMPORAL_PATCH == 0 and h % factor == 0 and w % factor == 0, frames.shape
    grid = (t // TEMPORAL_PATCH, h // patch, w // patch)
    rows, columns = grid[1] // MERGE, grid[2] // MERGE
    pixels = np.empty((grid[0], rows, columns, MERGE, MERGE, channels, TEMPORAL_PATCH, patch, patch // 2), np.complex64)
    for channel, pairs in enumerate(_normalised_pairs(family)):
        plane = np.ascontiguousarray(frames[..., channel]).view(np.uint16)
        blocks = pairs.take(plane, mode="clip")  # nothing to clip: any 16 bits are an index
        blocks = blocks.reshape(grid[0], TEMPORAL_PATCH, rows, MERGE, patch, columns, MERGE, patch // 2)
        pixels[:, :, :, :, :, channel] = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7)
    return torch.from_numpy(pixels.view(np.float32).reshape(math.prod(grid), -1)), torch.tensor(grid)


def unpatchify(pixels: torch.Tensor, grid: tuple[int, int, int], family: Family) -> np.ndarray:
    """The uint8 frames [2t, patch * h, patch * w, 3] of which `patchify` made patches [t * h * w, 6 * patch * patch]; a
    picture comes twice."""
    t, h, w = grid
    channels = pixels.reshape(len(pixels), 3, -1).numpy()
    tables, patch = _normalised_bytes(family), family.patch
    patches = np.stack([np.rint((channels[:, c] - tables[c, 0]) * (255 / (tables[c, 255] - tables[c, 0])))
                        for c in range(3)], axis=1).astype(np.uint8)  # fmt: skip
    blocks = patches.reshape(t, h // MERGE, w // MERGE, MERGE, MERGE, 3, TEMPORAL_PATCH, patch, patch)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(t * TEMPORAL_PATCH, h * patch, w * patch, 3)


@cache
def _mel_filters() -> torch.Tensor:
    """[128, 201] float32 triangular filters on the Slaney mel scale, 0 to 8000 Hz."""
    filters = mel_filter_bank(N_FFT // 2 + 1, MEL_BINS, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float().T


def log_mel(waveform: np.ndarray) -> torch.Tensor:
    """Whisper's log-mel spectrogram [128, L] float32 of a 16 kHz mono waveform [n] float32, L = ceil(n / 160)."""
    length = -(-len(waveform) // HOP)
    # Whisper pads with seconds of silence; the last window that still hears the signal ends within three hops.
    signal = torch.zeros((length + 3) * HOP)
    signal[: len(waveform)] = torch.from_numpy(waveform)
    spectrum = torch.stft(signal, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = (spectrum[:, :-1].abs() ** 2).contiguous()
    logs = (_mel_filters() @ power).clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8.0)
    return ((logs + 4.0) / 4.0)[:, :length].contiguous()
