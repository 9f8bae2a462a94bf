"""H.264 and HEVC on a GPU's decoders, by DALI, against PyAV: the frames that were asked for, in one colour matrix."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from megatron_avatar.data import dali
from megatron_avatar.data.container import Fit
from megatron_avatar.data.decode import decode_frames

ENCODERS = {"h264": "libx264", "hevc": "libx265"}
FRAMES, HEIGHT, WIDTH = 24, 144, 256
WANTED = np.array([0, 3, 4, 11, 23])


def make_clip(path: Path, codec: str) -> Path:
    """Soft colours that move, so that a frame differs from its neighbours by more than decoders do."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[codec], rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "12", "g": "8"}
        for k in range(FRAMES):
            waves = [np.sin(x / 40 + k / 3), np.sin(y / 30 - k / 4), np.sin((x + y) / 50 + k / 5)]
            frame = (127 + 100 * np.stack(waves, -1)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec", ENCODERS)
def test_the_clips_tell_frames_apart(tmp_path, codec):
    frames = decode_frames(make_clip(tmp_path / "clip.mp4", codec), np.arange(FRAMES), "pyav").astype(float)
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert min(np.abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ENCODERS)
@pytest.mark.parametrize("fit", [None, Fit((HEIGHT, WIDTH), (84, 140))], ids=["whole", "resized"])
def test_nvdec_gives_the_frames_of_pyav(tmp_path, codec, fit):
    if codec not in dali.codecs():
        pytest.skip("DALI is not installed, or decodes this codec on no GPU")
    path = make_clip(tmp_path / "clip.mp4", codec)
    ours, theirs = dali.reader().take(path, WANTED, fit), decode_frames(path, WANTED, "pyav", fit)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    assert np.abs(ours.astype(float) - theirs).mean() < 2.0, "a frame off would be 5 and more"
