"""Decoding only what is needed gives the frames that decoding everything gives, bit for bit."""

from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_avatar.data import decode, packets
from megatron_avatar.data.decode import MediaError, decode_frames

CODECS = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "2"}),
    "h264.mkv": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}),
    "refresh.mkv": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "annexb.ts": ("libx264", {"g": "9", "bf": "2"}),
    "hevc.mp4": ("libx265", {"g": "12", "x265-params": "bframes=3:log-level=none"}),
    "open.mkv": ("libx265", {"g": "12", "x265-params": "bframes=3:open-gop=1:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "15", "cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1"}),
    "vp8.webm": ("libvpx", {"g": "15", "deadline": "good", "lag-in-frames": "16", "auto-alt-ref": "1"}),
    "mjpeg.avi": ("mjpeg", {}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "av1.mp4": ("libsvtav1", {"g": "20", "preset": "12"}),
}  # fmt: skip
FRAMES = 60


def make(path, times=None, codec=None):
    """A moving pattern that no two frames share; `times` in ms."""
    encoder, options = CODECS[codec or path.name]
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream(encoder, rate=25, options=options)
        except (ValueError, av.error.EncoderNotFoundError):
            pytest.skip(f"this FFmpeg has no {encoder}")
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        if times is not None:
            stream.time_base = Fraction(1, 1000)
        grid = np.add.outer(np.arange(64), 2 * np.arange(96))
        for k in range(FRAMES):
            picture = np.stack([(grid + 7 * k) % 256, (grid * 3 + 31 * k) % 256, np.full_like(grid, 4 * k)], axis=-1)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def in_turn(path):
    frames = decode._decode_in_turn(path, list(range(FRAMES)))
    assert len(frames) == FRAMES
    return frames.transpose(0, 2, 3, 1)


def index_of(path):
    with av.open(str(path)) as container:
        return packets.read_index(container, decode._video_stream(container, path), 0)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hold", [True, False])
def test_chosen_frames_are_those_of_decoding_everything(tmp_path, monkeypatch, name, hold):
    path = make(tmp_path / name)
    whole = in_turn(path)
    if not hold:
        monkeypatch.setattr(packets, "HOLD_BYTES", 0)
    rng = np.random.default_rng(0)
    sets = [[0], [FRAMES - 1], [0, FRAMES - 1], range(FRAMES), range(5, 40, 7), [11, 12, 13], [23, 24, 25, 26]]
    sets += [rng.choice(FRAMES, rng.integers(1, 9), replace=False) for _ in range(25)]
    for indices in sets:
        indices = np.array(indices)
        np.testing.assert_array_equal(decode_frames(path, indices, "pyav"), whole[indices], err_msg=str(indices))


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mjpeg.avi", "hevc.mp4", "av1.mp4", "annexb.ts"])
def test_these_codecs_tell_their_frames(tmp_path, name):
    index = index_of(make(tmp_path / name))
    assert len(index.order) == FRAMES and len(index.starts) >= 3


@pytest.mark.parametrize("name", ["h264.mkv", "refresh.mkv"])
def test_key_frames_that_are_no_fresh_start_are_none(tmp_path, name):
    assert index_of(make(tmp_path / name)).starts == [0]


@pytest.mark.parametrize("name", ["vp8.webm", "mpeg4.mp4"])
def test_others_are_decoded_in_turn(tmp_path, name):
    with pytest.raises(packets.Untrusted):
        index_of(make(tmp_path / name))


@pytest.mark.parametrize("codec", ["h264.mkv", "vp9.webm"])
def test_variable_frame_rate_and_a_late_start(tmp_path, codec):
    times = (1000 + np.cumsum(np.random.default_rng(1).integers(10, 200, FRAMES))).tolist()
    path = make(tmp_path / ("vfr" + codec[-5:].replace("4", "")), times, codec)
    whole = in_turn(path)
    for indices in ([3, 30, 59], [17], list(range(0, 60, 4))):
        np.testing.assert_array_equal(decode_frames(path, np.array(indices), "pyav"), whole[indices])


def test_few_packets_of_a_long_clip_are_decoded(tmp_path, monkeypatch):
    path = make(tmp_path / "h264.mp4")
    fed = []
    original = packets._read
    monkeypatch.setattr(packets, "_read", lambda *a: (fed.append(p) or p for p in original(*a)))
    decode_frames(path, np.array([0, 25, 50]), "pyav")
    assert 3 <= len(fed) <= 18
    path = make(tmp_path / "mjpeg.avi")
    fed.clear()
    decode_frames(path, np.array([0, 25, 50]), "pyav")
    assert len(fed) == 3


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mjpeg.avi"])
def test_truncated_files_are_named(tmp_path, name):
    path = make(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=name):
        decode_frames(path, np.array([0, 30, 59]), "pyav")
