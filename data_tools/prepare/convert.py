"""Sound tracks to 16 kHz mono FLAC, and clips to codecs that GPUs decode. A frame at a time: memory stays bounded."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import av
import numpy as np
import soundfile

from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import Clip, opened

SAMPLE_RATE = 16_000
ALIGNED_S = 0.01  # a track that starts so near to the picture is left as it is
ENCODERS = {
    "h264": ("libx264", ".mp4", {"preset": "medium", "crf": "20", "bf": "0", "threads": "1"},
             {"movflags": "faststart"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "good", "cpu-used": "4", "crf": "30", "b": "0", "threads": "1"}, {}),
}  # fmt: skip
BT601 = 6  # SMPTE 170M, in FFmpeg's three tables of colour
TURNS = {90: ["cclock"], -90: ["clock"], 180: ["clock", "clock"], -180: ["clock", "clock"]}

def extract_sound(path: Path, target: Path, start: float | None = None) -> int:
    """Writes the first sound track as FLAC, in time with a picture that starts at `start` seconds; returns its samples
    (0: no track)."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    with opened(path) as container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            return 0
        with soundfile.SoundFile(target, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as file:
            skip, begun = 0, start is None
            for frame in chain(container.decode(audio=0), [None]):  # None flushes the resampler
                if not begun and frame is not None:
                    begun, skip = True, _align(file, (frame.time or 0.0) - start)
                for chunk in resampler.resample(frame):
                    samples = chunk.to_ndarray()[0]
                    file.write(samples[skip:])
                    skip = max(0, skip - len(samples))
            return file.frames

def _align(file: soundfile.SoundFile, late: float) -> int:
    """Silence in front of a track that starts late; samples to leave out of one that starts early."""
    if abs(late) < ALIGNED_S:
        return 0
    silent = max(0, round(late * SAMPLE_RATE))
    while silent:
        file.write(np.zeros(min(silent, SAMPLE_RATE), np.int16))
        silent -= min(silent, SAMPLE_RATE)
    return max(0, round(-late * SAMPLE_RATE))

def is_ready_sound(path: Path) -> bool:
    """Whether a file is 16 kHz mono FLAC already."""
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return False
    return (info.format, info.samplerate, info.channels) == ("FLAC", SAMPLE_RATE, 1)

def count_samples(path: Path) -> int:
    """Samples of a FLAC file, all of them read."""
    try:
        with soundfile.SoundFile(path) as file:
            return sum(len(block) for block in file.blocks(SAMPLE_RATE))
    except soundfile.LibsndfileError as error:
        raise Refused("damaged", f"its sound breaks off ({error})") from None

def bounded_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Even (height, width) with no side above `max_side`, the aspect ratio kept."""
    scale = min(1.0, max_side / max(height, width))
    return tuple(max(2, round(side * scale / 2) * 2) for side in (height, width))  # type: ignore[return-value]

def transcode(path: Path, target: Path, clip: Clip, codec: str, max_side: int) -> None:
    """Encodes a clip anew: upright, sides bounded, a key frame a second, colours and tags of BT.601, times kept."""
    encoder, _, options, container_options = ENCODERS[codec]
    turned = abs(clip.rotation) == 90
    height, width = bounded_size(*((clip.width, clip.height) if turned else (clip.height, clip.width)), max_side)
    with opened(path) as source, av.open(str(target), "w", options=container_options) as sink:
        stream = source.streams.video[0]
        stream.codec_context.thread_count = 1
        encoded = sink.add_stream(encoder, rate=max(1, round(clip.fps)), options=options)
        encoded.width, encoded.height, encoded.pix_fmt = width, height, "yuv420p"
        context = encoded.codec_context
        context.time_base = stream.time_base
        context.gop_size = max(1, round(clip.fps))
        context.colorspace = context.color_primaries = context.color_trc = BT601
        context.color_range = 1
        graph = av.filter.Graph()
        graph.threads = 1
        nodes = [graph.add_buffer(template=stream)]
        nodes += [graph.add("transpose", f"dir={turn}") for turn in TURNS.get(clip.rotation, [])]
        nodes += [graph.add("scale", f"{width}:{height}:flags=bicubic:out_color_matrix=bt601:out_range=tv"),
                  graph.add("format", "yuv420p"), graph.add("buffersink")]  # fmt: skip
        graph.link_nodes(*nodes).configure()
        for index, frame in enumerate(source.decode(stream)):
            if frame.pts is None:
                frame.pts = round(index / clip.fps / stream.time_base)
            graph.push(frame)
            picture = graph.pull()
            picture.pict_type = 0  # the encoder chooses, not the source
            sink.mux(encoded.encode(picture))
        sink.mux(encoded.encode(None))
