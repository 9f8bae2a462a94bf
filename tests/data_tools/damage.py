"""Files that are damaged, or not what their name says; each function makes one below a folder."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data_tools.clips import make_clip


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def fast_start(folder: Path) -> Path:
    """An MP4 with its index in front, so that it opens when its end is cut off."""
    whole, path = make_clip(folder, "whole", frames=48), folder / "fast.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as sink:
        streams = {stream: sink.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                sink.mux(packet)
    return path


def sound_only(folder: Path) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def no_frames(folder: Path) -> Path:
    path = folder / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width = stream.height = 84
        stream.pix_fmt = "yuvj420p"
        track = container.add_stream("libmp3lame", rate=48_000, layout="stereo")
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp", layout="stereo")
            frame.sample_rate = 48_000
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def standing_time(folder: Path) -> Path:
    """Two frames at the same time."""
    whole, path = make_clip(folder, "whole", "vp9_opus", sound=0), folder / "standing.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux()):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts = packet.dts = 125 * (index - (index == 5))
                sink.mux(packet)
    return path


def huge_picture(folder: Path) -> Path:
    Image.new("1", (20_000, 8)).save(folder / "huge.png")
    return folder / "huge.png"


def deep_picture(folder: Path) -> Path:
    """Pixels of 32 bits, of which nobody knows how white they are."""
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(folder / "deep.tiff")
    return folder / "deep.tiff"


def text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("no film at all\n" * 100)
    return folder / "text.mp4"


def playlist(folder: Path) -> Path:
    make_clip(folder, "other")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    return folder / "list.mp4"


def half_picture(folder: Path) -> Path:
    Image.effect_noise((64, 64), 90).save(folder / "half.jpg")
    return cut(folder / "half.jpg", 0.6)


def turned(folder: Path) -> Path:
    """A phone's clip: the picture's matrix says to turn it."""
    path = make_clip(folder, "turned", size=(84, 112))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # the first track is the picture
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return path
