"""Sound of one's own making, in every container, and what may go wrong with it."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from av.stream import Disposition

RATE = 16_000
CODECS = {".m4a": "aac", ".mka": "flac", ".mp3": "libmp3lame", ".opus": "libopus", ".webm": "libopus",
          ".mov": "pcm_s16le"}  # fmt: skip


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def mux(path: Path, *tracks: np.ndarray, rate: int = RATE, codec: str = "", times: Sequence[float] = (),
        film: Sequence[float] = (), default: int | None = None, options: dict | None = None) -> Path:  # fmt: skip
    """Tracks [n] or [c, n]. `times`: seconds at which each 0.1 s of them is due (default: one behind the other);
    `film`: seconds of the frames of a video stream beside them; `default`: the track that a player takes."""
    codec = codec or CODECS[path.suffix]
    with av.open(str(path), "w", options=options or {}) as sink:
        video = None
        if len(film):
            video = sink.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
        streams = []
        for wave in tracks:
            layouts = {1: "mono", 2: "stereo", 6: "5.1"}
            stream = sink.add_stream(codec, rate=rate, layout=layouts[len(np.atleast_2d(wave))])
            stream.codec_context.time_base = Fraction(1, rate)
            if default is not None:
                stream.disposition = Disposition.default if len(streams) == default else Disposition(0)
            streams.append(stream)
        for time in film:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            sink.mux(video.encode(frame.reformat(format="yuv420p")))
        for stream, wave in zip(streams, tracks, strict=True):
            context = stream.codec_context
            size = round(0.1 * rate) if codec.startswith(("pcm", "flac")) else context.frame_size or 960
            form = context.format.name
            for first in range(0, np.atleast_2d(wave).shape[1], size):
                piece = np.ascontiguousarray(np.atleast_2d(wave)[:, first : first + size], np.float32)
                given = av.AudioFrame.from_ndarray(piece, format="fltp", layout=context.layout.name)
                given.sample_rate = rate
                (frame,) = av.AudioResampler(format=form, layout=context.layout.name, rate=rate).resample(given)
                due = times[first // size] if len(times) else first / rate
                frame.pts, frame.time_base = round(due * rate), Fraction(1, rate)
                sink.mux(stream.encode(frame))
            sink.mux(stream.encode(None))
        if video is not None:
            sink.mux(video.encode(None))
    return path


def wav(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", form: str = "WAV") -> Path:
    soundfile.write(path, wave.T, rate, subtype=subtype, format=form)
    return path


def patched(path: Path, name: bytes, offset: int, value: bytes) -> Path:
    """Bytes behind the first `name` in a file replaced."""
    data = bytearray(path.read_bytes())
    place = data.index(name) + offset
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def piped_wav(path: Path, length: int) -> Path:
    """A WAV as a program writes it that can't go back to its header."""
    wav(path, tone(1.0))
    patched(path, b"RIFF", 4, (min(length + 36, 2**32 - 1)).to_bytes(4, "little"))
    return patched(path, b"data", 4, length.to_bytes(4, "little"))


def piped_flac(path: Path) -> Path:
    """The 36 bits of the count of samples are 0, as is the checksum of them all."""
    soundfile.write(path, tone(3.0), RATE)
    data = bytearray(path.read_bytes())
    assert data[:4] == b"fLaC" and data[4] & 0x7F == 0  # STREAMINFO comes first
    data[21] &= 0xF0
    data[22:42] = bytes(20)
    path.write_bytes(data)
    return path


def without(path: Path, first: float, share: float, *, zeros: bool = False) -> Path:
    """A part of a file taken out, or overwritten by zeros."""
    data = path.read_bytes()
    start, length = int(first * len(data)), int(share * len(data))
    path.write_bytes(data[:start] + (bytes(length) if zeros else b"") + data[start + length :])
    return path


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
