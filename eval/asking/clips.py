"""Clips that a benchmark names as a part of a file, or as a folder of frames, made into files of their own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_tools.prepare.convert import bounded_size, upright
from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import MAX_SIDE, measure_video, opened
from megatron_avatar.data.container import clip_stream, sound_stream
from megatron_avatar.data.picture import PICTURES, to_rgb
from megatron_avatar.data.sound import SAMPLE_RATE, read_track

OPTIONS = {"preset": "veryfast", "crf": "16", "threads": "1"}
SINK = {"fflags": "+bitexact"}  # the same bytes at every run: Matroska draws numbers by itself
TICK = Fraction(1, 90_000)
PREROLL_S = 0.5  # of sound, decoded and left out: lossy codecs need some frames to come right
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def cut(path: Path, target: Path, start: float, end: float | None) -> None:
    """Writes the frames and the sound of [start, end) seconds of a clip as H.264 and PCM in Matroska, upright.

    Raises Refused for a damaged clip, and where no frame lies there.
    """
    clip = measure_video(path, decode=False, any_codec=True)
    with opened(path, writes=target) as source, av.open(str(target), "w", format="matroska", options=SINK) as sink:
        stream = clip_stream(source)
        assert stream is not None
        stream.codec_context.thread_count = 1
        pictures = sink.add_stream("libx264", rate=stream.average_rate or Fraction(25), options=OPTIONS)
        pictures.codec_context.time_base = TICK
        size = bounded_size(*clip.posture.shown(clip.height, clip.width), MAX_SIDE)
        (pictures.height, pictures.width), pictures.pix_fmt = size, "yuv420p"
        heard = sound_stream(source) is not None
        sounds = sink.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono") if heard else None
        graph = upright(stream, clip.posture, size, "in_color_matrix=bt601:out_color_matrix=bt601:out_range=tv")
        written = 0
        for frame in _between(source, stream, start, end):
            graph.push(frame)
            picture = graph.pull()
            picture.pts, picture.time_base = round((frame.time - start) / TICK), TICK  # a varying rate stays one
            picture.pict_type = 0  # the encoder chooses, not the source
            sink.mux(pictures.encode(picture))
            written += 1
        if not written:
            last = "its end" if end is None else f"{end:g}"
            raise Refused("no_picture", f"holds no frame from {start:g} to {last} s")
        sink.mux(pictures.encode(None))
        if sounds is not None:
            _cut_sound(path, source, sink, sounds, start, end)


def _cut_sound(path: Path, source: av.container.InputContainer, sink: av.container.OutputContainer,
               sounds: av.AudioStream, start: float, end: float | None) -> None:  # fmt: skip
    """Sound in time with the picture: silence where the track has not begun yet."""
    stream = sound_stream(source)
    assert stream is not None
    source.seek(int(max(0.0, start - PREROLL_S) / stream.time_base), stream=stream)
    left, done = None if end is None else round((end - start) * SAMPLE_RATE), 0
    for block in read_track(path, source, start, whole=False):
        samples = np.clip(np.rint(block[:left] * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
        if len(samples):
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, done, Fraction(1, SAMPLE_RATE)
            sink.mux(sounds.encode(frame))
        done += len(samples)
        left = None if left is None else left - len(samples)
        if left == 0:
            break
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

    Raises Refused for a folder without pictures in [start, end) seconds, and for pictures of different sizes.
    """
    pictures = (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    names = sorted(pictures, key=lambda path: (len(path.stem), path.stem))
    first, last = round((start or 0) * fps), len(names) if end is None else round(end * fps)
    if not names[first:last]:
        raise Refused("no_picture", f"the folder holds {len(names)} pictures, none of them in that time")
    with av.open(str(target), "w", format="matroska", options=SINK) as sink:
        rate = Fraction(fps).limit_denominator(1000)
        stream, shape = None, (0, 0, 0)
        for name in names[first:last]:
            with Image.open(name, formats=PICTURES) as picture:
                pixels = np.asarray(to_rgb(picture))
            if stream is None:
                shape = pixels.shape
                stream = sink.add_stream("libx264", rate=rate, options=OPTIONS)
                stream.height, stream.width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
                stream.pix_fmt = "yuv420p"
            if pixels.shape != shape:
                (h, w), (height, width) = pixels.shape[:2], shape[:2]
                raise Refused("size", f"{name.name} is {w}x{h} pixels, the folder's first picture {width}x{height}")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]), "rgb24")
            sink.mux(stream.encode(frame.reformat(stream.width, stream.height, "yuv420p", dst_colorspace="ITU601")))
        assert stream is not None
        sink.mux(stream.encode(None))
