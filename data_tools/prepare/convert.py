"""Sound tracks to 16 kHz mono FLAC, and clips to codecs that GPUs decode. A frame at a time: memory stays bounded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import soundfile

from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import Clip, opened
from megatron_avatar.data.container import Posture, clip_stream, sound_stream
from megatron_avatar.data.sound import SAMPLE_RATE, UNKNOWN, read_track
from megatron_avatar.files import writing

ENCODERS = {
    "h264": ("libx264", ".mp4", {"preset": "medium", "crf": "20", "bf": "0", "threads": "1"},
             {"movflags": "faststart"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "good", "cpu-used": "4", "crf": "30", "b": "0", "threads": "1"},
            {"fflags": "+bitexact"}),  # no identity of its own: the same bytes at every run
}  # fmt: skip
BT601 = 6  # SMPTE 170M, in FFmpeg's three tables of colour


def extract_sound(path: Path, target: Path, start: float | None = None) -> tuple[int, float]:
    """Writes the default sound track as FLAC, in time with a picture that starts at `start` seconds; returns its
    samples and the loudest of them, from 0 to 1 (no track: 0, 0)."""
    loudest = 0.0
    with opened(path) as container:
        if sound_stream(container) is None:
            return 0, loudest
        with _flac(target) as file:
            for block in read_track(path, container, start):
                loudest = max(loudest, float(np.abs(block).max(initial=0)))
                file.write(np.clip(np.rint(block * 2**15), -(2**15), 2**15 - 1).astype(np.int16))
            return file.frames, loudest


def ready_sound(path: Path) -> tuple[int, float] | None:
    """Samples, all of them read, and the loudest, of a file that is 16 kHz mono FLAC of known length already."""
    try:
        with soundfile.SoundFile(path) as file:
            if (file.format, file.samplerate, file.channels) != ("FLAC", SAMPLE_RATE, 1) or file.frames >= UNKNOWN:
                return None
            samples, loudest = 0, 0.0
            for block in file.blocks(SAMPLE_RATE):
                samples, loudest = samples + len(block), max(loudest, float(np.abs(block).max()))
            if samples < file.frames:
                raise Refused("truncated", f"holds {samples} of the {file.frames} samples in its header")
            return samples, loudest
    except soundfile.LibsndfileError:
        return None  # FFmpeg says what is wrong with it


class _Disk(io.FileIO):
    """A file whose first error of writing is kept: libsndfile only says that something went wrong."""

    error: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return len(data) - len(rest)


@contextmanager
def _flac(target: Path) -> Iterator[soundfile.SoundFile]:
    """A new FLAC file of 16 kHz mono; OSError where the disk takes no more."""
    with writing(target), _Disk(target, "w+") as disk:
        try:
            with soundfile.SoundFile(disk, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
                yield file
        except (soundfile.SoundFileError, AssertionError):  # it asserts that all was written
            if disk.error is None:
                raise
        if disk.error is not None:
            raise disk.error


def bounded_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Even (height, width) with no side above `max_side`, the aspect ratio kept."""
    scale = min(1.0, max_side / max(height, width))
    return tuple(max(2, round(side * scale / 2) * 2) for side in (height, width))  # type: ignore[return-value]


def upright(stream: av.VideoStream, posture: Posture, size: tuple[int, int], colours: str) -> av.filter.Graph:
    """Decoded frames in, frames of `size` (height, width) out: upright, with square pixels, as yuv420p. `colours`: the
    scale filter's options of matrix and range."""
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [graph.add_buffer(template=stream), *(graph.add(*filter_) for filter_ in posture.filters)]
    nodes += [graph.add("scale", f"{size[1]}:{size[0]}:flags=bicubic:{colours}"), graph.add("setsar", "1"),
              graph.add("format", "yuv420p"), graph.add("buffersink")]  # fmt: skip
    graph.link_nodes(*nodes).configure()
    return graph


def transcode(path: Path, target: Path, clip: Clip, codec: str, max_side: int) -> None:
    """Encodes a clip anew: upright, square pixels, sides bounded, a key frame a second, colours and tags of BT.601,
    times kept."""
    encoder, _, options, container_options = ENCODERS[codec]
    size = bounded_size(*clip.posture.shown(clip.height, clip.width), max_side)
    with opened(path, writes=target) as source, av.open(str(target), "w", options=container_options) as sink:
        stream = clip_stream(source)
        assert stream is not None
        stream.codec_context.thread_count = 1
        encoded = sink.add_stream(encoder, rate=max(1, round(clip.fps)), options=options)
        (encoded.height, encoded.width), encoded.pix_fmt = size, "yuv420p"
        context = encoded.codec_context
        context.time_base = stream.time_base
        context.gop_size = max(1, round(clip.fps))
        context.colorspace = context.color_primaries = context.color_trc = BT601
        context.color_range = 1
        graph = upright(stream, clip.posture, size, "out_color_matrix=bt601:out_range=tv")
        for index, frame in enumerate(source.decode(stream)):
            if frame.pts is None:
                frame.pts = round(index / clip.fps / stream.time_base)
            graph.push(frame)
            picture = graph.pull()
            picture.pict_type = 0  # the encoder chooses, not the source
            sink.mux(encoded.encode(picture))
        sink.mux(encoded.encode(None))
