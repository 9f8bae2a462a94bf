"""Clips that a benchmark names as a part of a file, or as a folder of frames, made into files of their own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import PICTURES, opened

OPTIONS = {"preset": "veryfast", "crf": "16", "threads": "1"}
TICK = Fraction(1, 90_000)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def cut(path: Path, target: Path, start: float, end: float | None) -> None:
    """Writes the frames and the sound of [start, end) seconds of a clip as H.264 and PCM in Matroska.

    Raises Refused where no frame lies there.
    """
    with opened(path) as source, av.open(str(target), "w", format="matroska") as sink:
        if not source.streams.video:
            raise Refused("no_picture", "holds no video track")
        stream = source.streams.video[0]
        stream.codec_context.thread_count = 1
        rate = stream.average_rate or Fraction(25)
        pictures = sink.add_stream("libx264", rate=rate, options=OPTIONS)
        pictures.codec_context.time_base = TICK
        pictures.width, pictures.height = stream.codec_context.width // 2 * 2, stream.codec_context.height // 2 * 2
        pictures.pix_fmt = "yuv420p"
        sounds = sink.add_stream("pcm_s16le", rate=16_000, layout="mono") if source.streams.audio else None
        written = 0
        for frame in _between(source, stream, start, end):
            picture = frame.reformat(pictures.width, pictures.height, "yuv420p")
            picture.pts, picture.time_base = round((frame.time - start) / TICK), TICK  # a varying rate stays one
            picture.pict_type = 0  # the encoder chooses, not the source
            sink.mux(pictures.encode(picture))
            written += 1
        if not written:
            last = "its end" if end is None else f"{end:g}"
            raise Refused("no_picture", f"holds no frame from {start:g} to {last} s")
        sink.mux(pictures.encode(None))
        if sounds is not None:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
            for frame in _between(source, source.streams.audio[0], start, end):
                frame.pts = None
                for chunk in resampler.resample(frame):
                    sink.mux(sounds.encode(chunk))
            sink.mux(sounds.encode(None))


def _between(source: av.container.InputContainer, stream: av.stream.Stream, start: float, end: float | None):
    source.seek(int(max(0.0, start) / stream.time_base), stream=stream)
    for frame in source.decode(stream):
        if frame.time is None or frame.time < start:
            continue
        if end is not None and frame.time >= end:
            return
        yield frame


def from_frames(folder: Path, target: Path, fps: float, start: float | None, end: float | None) -> None:
    """Writes the pictures of a folder, in the order of their names (2 before 10), as a clip of `fps` frames a second.

    Raises Refused for a folder without pictures in [start, end) seconds.
    """
    pictures = (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    names = sorted(pictures, key=lambda path: (len(path.stem), path.stem))
    first, last = round((start or 0) * fps), len(names) if end is None else round(end * fps)
    if not names[first:last]:
        raise Refused("no_picture", f"the folder holds {len(names)} pictures, none of them in that time")
    with av.open(str(target), "w", format="matroska") as sink:
        rate = Fraction(fps).limit_denominator(1000)
        stream = None
        for name in names[first:last]:
            with Image.open(name, formats=PICTURES) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            if stream is None:
                stream = sink.add_stream("libx264", rate=rate, options=OPTIONS)
                stream.height, stream.width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]), "rgb24")
            sink.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p", dst_colorspace="ITU601")))
        assert stream is not None
        sink.mux(stream.encode(None))
