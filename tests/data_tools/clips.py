"""Clips with sound in the codecs that datasets bring, and a model folder to count tokens with."""

from __future__ import annotations

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_tools.prepare.store import Handling, Source, store
from tests.data.media import make_config, make_tokenizer

RATE = 48_000
FORMATS = {  # name: container, video encoder, sound encoder
    "vp9_opus": (".webm", "libvpx-vp9", "libopus"),
    "h264_aac": (".mp4", "libx264", "aac"),
    "h264_mp3": (".mkv", "libx264", "libmp3lame"),
    "mjpeg_mp3": (".avi", "mjpeg", "libmp3lame"),
    "mpeg4_aac": (".mp4", "mpeg4", "aac"),
    "vp8_opus": (".webm", "libvpx", "libopus"),
    "av1_opus": (".mkv", "libsvtav1", "libopus"),
    "mpeg2_mp3": (".mkv", "mpeg2video", "libmp3lame"),
}


def make_clip(folder: Path, name: str = "clip", form: str = "h264_aac", *, frames: int = 24, fps: int = 8,
              size: tuple[int, int] = (84, 84), sound: float | None = None, pts: list[int] | None = None,
              seed: int = 0, options: dict[str, str] | None = None) -> Path:  # fmt: skip
    """A moving square with a beep; `sound`: seconds of the track (0: mute, None: as long as the picture); `pts`: ms."""
    suffix, video, audio = FORMATS[form]
    path = folder / (name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = frames / fps if sound is None else sound
    fast = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libvpx": {"deadline": "realtime"},
            "libsvtav1": {"preset": "12"}}  # fmt: skip
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video, rate=fps, options=fast.get(video, {}) | (options or {}))
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(audio, rate=RATE, layout="stereo") if seconds else None
        for i in range(frames):
            picture = np.full((*size, 3), 30 + i % 100 + seed, np.uint8)
            picture[10:40, (2 * i) % 40 : (2 * i) % 40 + 30] = [200, 30 + (9 * i) % 200, 60]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            fifo = av.AudioFifo()
            fifo.write(_beep(seconds, track.codec_context.format.name))
            while (chunk := fifo.read(track.codec_context.frame_size or 960, partial=True)) is not None:
                container.mux(track.encode(chunk))
            container.mux(track.encode())
    return path


def _beep(seconds: float, form: str) -> av.AudioFrame:
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE)
    frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]).astype(np.float32), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = RATE, 0
    (converted,) = av.AudioResampler(format=form, layout="stereo", rate=RATE).resample(frame)
    return converted


def misbehave(source: Source, handling: Handling) -> str:
    """A worker that hangs or crashes on media of such names."""
    if "hang" in source.path:
        time.sleep(10_000)  # for ever
    if "crash" in source.path:
        os._exit(3)
    return store(source, handling)


def make_model(folder: Path) -> Path:
    """Tokenizer and configuration of a Thinker, without weights."""
    make_tokenizer().save_pretrained(folder)
    config = make_config()
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
