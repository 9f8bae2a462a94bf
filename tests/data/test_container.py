"""Which stream of a clip is meant, how it is to be shown, and that both heads refuse what they wouldn't show so."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from megatron_avatar.data.container import TURNS, MediaError, posture
from megatron_avatar.data.decode import decode_audio, decode_frames
from tests.data.films import corners, upright_by_hand, write_film

HEADS = ("pyav", "dali", "auto")
@pytest.mark.parametrize("matrix", TURNS)
def test_the_filters_of_a_turn_do_what_its_matrix_says(tmp_path, matrix):
    path = write_film(tmp_path / "a.mp4", matrix=matrix)
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        frame = next(container.decode(stream))
        shown = posture(path, stream, frame)
        assert shown.turn == matrix and shown.is_square
        assert shown.shown(48, 64) == upright_by_hand(corners(), matrix).shape[:2]
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream), *(graph.add(*f) for f in shown.filters), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        graph.push(frame)
        picture = graph.pull().to_ndarray(format="rgb24").astype(int)
    assert np.abs(picture - upright_by_hand(corners(), matrix)).mean() < 12


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("options", "kind", "what"), [
    ({"matrix": (0, 1, -1, 0)}, "rotated", "turned by 90 degrees, which the decoder doesn't; prepare it with"),
    ({"matrix": (-1, 0, 0, 1)}, "mirrored", "to be shown mirrored, which"),
    ({"matrix": (0, -1, -1, 0)}, "mirrored", "mirrored and turned by 90 degrees"),
    ({"matrix": (0.8, 0.6, -0.6, 0.8)}, "rotated", "turned by 37.* degrees or sheared.*; turn it upright"),
    ({"matrix": (2, 0, 0, 1)}, "rotated", "sheared"),
    ({"aspect": Fraction(16, 15)}, "anamorphic", "has pixels of 16:15, which the decoder doesn't stretch; prepare"),
])  # fmt: skip
def test_what_would_be_shown_otherwise_is_refused(tmp_path, head, options, kind, what):
    with pytest.raises(MediaError, match=what) as refused:
        decode_frames(write_film(tmp_path / "a.mp4", **options), np.array([0, 11]), head)
    assert refused.value.kind == kind


@pytest.mark.parametrize("options", [{"matrix": (1, 0, 0, 1)}, {"matrix": (2, 0, 0, 2)}, {"aspect": Fraction(99, 100)}])
def test_upright_clips_with_almost_square_pixels_pass(tmp_path, options):
    assert len(decode_frames(write_film(tmp_path / "a.mp4", **options), np.array([0, 11]))) == 2


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
@pytest.mark.parametrize("cover", ["attached", "stream"])
def test_the_film_is_decoded_not_the_cover_in_front_of_it(tmp_path, name, cover):
    path = write_film(tmp_path / name, cover=cover)
    assert decode_frames(path, np.array([0, 11])).shape == (2, 48, 64, 3)
    with pytest.raises(MediaError, match="holds several video streams, and DALI can't choose; try data.decoder=auto"):
        decode_frames(path, np.array([0, 11]), "dali")


def test_a_cover_alone_is_no_film(tmp_path):
    """As sound that is sold with a picture."""
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as sink:
        track, image = sink.add_stream("aac", rate=16_000, layout="mono"), sink.add_stream("mjpeg", rate=1)
        image.width, image.height, image.pix_fmt = 64, 48, "yuvj420p"
        image.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(corners(), "rgb24").reformat(format="yuvj420p")
        sink.mux(image.encode(frame) + image.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        sink.mux(track.encode(frame) + track.encode(None))
    with pytest.raises(MediaError, match="holds no video stream"):
        decode_frames(path, np.array([0]))
    assert len(decode_audio(path, in_video=True)) >= 1024


def test_pictures_turned_by_hand_are_those_of_pillow():
    """The oracle itself: a matrix of a quarter turn clockwise, as phones write it."""
    turned = Image.fromarray(corners()).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(upright_by_hand(corners(), (0, 1, -1, 0)), np.asarray(turned))
