"""Films of one picture whose corners differ, to be shown turned, mirrored or stretched, behind a cover or alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CORNERS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 200))  # upper left and right, lower left and right


def corners() -> np.ndarray:
    """A picture [48, 64, 3] that tells each of its turns and mirrors from the others."""
    picture = np.empty((48, 64, 3), np.uint8)
    for k, colour in enumerate(CORNERS):
        picture[24 * (k // 2) : 24 * (k // 2) + 24, 32 * (k % 2) : 32 * (k % 2) + 32] = colour
    return picture


def write_film(path: Path, *, matrix: tuple | None = None, aspect: Fraction | None = None, cover: str = "",
               frames: int = 12) -> Path:  # fmt: skip
    """Frames that show `corners`. `cover`: in front of the film, "attached" as such or a "stream" of one picture."""
    with av.open(str(path), "w") as sink:
        image = None
        if cover:
            image = sink.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 32, 32, "yuvj420p"
            if cover == "attached":
                image.disposition = av.stream.Disposition.attached_pic
        stream = sink.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            (a, b, c, d), one = matrix, 2**16
            values = [round(v * one) for v in (a, b, 0, c, d, 0, 0, 0)]
            stream.set_display_matrix([*values, 2**30])
        if image is not None:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9, np.uint8), "rgb24")
            sink.mux(image.encode(frame.reformat(format="yuvj420p")) + image.encode(None))
        for _ in range(frames):
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(corners(), "rgb24")))
        sink.mux(stream.encode(None))
    return path


def upright_by_hand(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """The picture with each of its points where the matrix takes it."""
    a, b, c, d = matrix
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    shown = np.empty((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    shown[down - down.min(), across - across.min()] = picture
    return shown
