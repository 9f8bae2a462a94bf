"""Parts of clips and folders of frames as clips: which frames and which sound, and what is refused."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import measure_video
from eval.asking.clips import cut, from_frames
from eval.fixture import write_medium
from megatron_avatar.data.decode import decode_audio, decode_frames
from tests.data.films import corners, upright_by_hand, write_film
from tests.data.tracks import mux, room_for, tone

RATE = 10


def write_clip(path, times, *, sound_from=None, seconds=4):
    """Frames at `times` (seconds) whose grey is 10 times the time, and a tone from `sound_from` seconds on."""
    with av.open(str(path), "w") as sink:
        video = sink.add_stream("libx264", rate=RATE, options={"crf": "10", "g": "8"})  # few key frames
        video.codec_context.time_base = Fraction(1, 1000)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = sink.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound_from is not None else None
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + round(50 * time), np.uint8), "rgb24")
            frame.pts, frame.time_base = round(time * 1000), video.codec_context.time_base
            sink.mux(video.encode(frame.reformat(format="yuv420p")))
        sink.mux(video.encode(None))
        if audio is not None:
            wave = np.sin(2 * np.pi * 500 * np.arange(16_000 * seconds) / 16_000) * 8000
            wave[: round(16_000 * sound_from)] = 0
            for first in range(0, len(wave), 1600):
                piece = wave[first : first + 1600].astype(np.int16)[None]
                part = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
                part.sample_rate, part.pts = 16_000, first
                sink.mux(audio.encode(part))
            sink.mux(audio.encode(None))


def greys(path):
    clip = measure_video(path, decode=True)
    frames = decode_frames(path, np.arange(clip.frame_count), "pyav")
    return clip, frames[:, 16:48, 16:48].mean(axis=(1, 2, 3))


def seconds_of(grey):
    return (grey - 20) / 50


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "whole.mkv"
    write_clip(path, np.arange(40) / RATE, sound_from=2.0)
    return path


@pytest.mark.parametrize(("start", "end", "first", "count"), [(1.0, 2.5, 10, 15), (0.0, 1.0, 0, 10), (3.5, None, 35, 5),
                                                              (1.05, 1.35, 11, 3), (3.0, 99.0, 30, 10)])  # fmt: skip
def test_a_part_holds_the_frames_of_its_seconds_and_no_others(clip, tmp_path, start, end, first, count):
    cut(clip, tmp_path / "part.mkv", start, end)
    measured, grey = greys(tmp_path / "part.mkv")
    assert measured.frame_count == count and measured.fps == pytest.approx(RATE) and measured.pts is None
    np.testing.assert_allclose(seconds_of(grey), np.arange(first, first + count) / RATE, atol=0.045)


def test_a_part_holds_the_sound_of_its_seconds(clip, tmp_path):
    cut(clip, tmp_path / "part.mkv", 1.5, 3.0)  # the tone begins half a second in
    sound = decode_audio(tmp_path / "part.mkv")
    assert len(sound) == pytest.approx(1.5 * 16_000, abs=3200)
    assert np.abs(sound[:7000]).max() < 0.01 and np.abs(sound[9500:]).max() > 0.2


def test_a_part_of_a_silent_clip_is_silent(tmp_path):
    write_medium(tmp_path / "silent.mp4", "video", seconds=2)
    cut(tmp_path / "silent.mp4", tmp_path / "part.mkv", 0.5, 1.5)
    from data_tools.prepare.measure import opened

    with opened(tmp_path / "part.mkv") as container:
        assert not container.streams.audio and len(container.streams.video) == 1


def test_frames_of_a_varying_rate_keep_their_times(tmp_path):
    times = np.array([0, 0.1, 0.2, 1.0, 1.1, 2.0, 2.1, 2.2, 3.0])
    write_clip(tmp_path / "varying.mkv", times)
    cut(tmp_path / "varying.mkv", tmp_path / "part.mkv", 1.0, 2.5)
    measured, grey = greys(tmp_path / "part.mkv")
    np.testing.assert_allclose(seconds_of(grey), times[3:8], atol=0.045)
    np.testing.assert_allclose(measured.pts, [0, 0.1, 1.0, 1.1, 1.2], atol=0.002)


@pytest.mark.parametrize(("start", "end"), [(0.0, None), (0.0, 2.0), (0.5, 2.0), (1.3, 2.6)])
def test_the_sound_of_a_part_lies_where_its_track_has_it(tmp_path, start, end):
    """A track that begins 0.7 s behind the picture, and its hole from 1.7 to 2.2 s."""
    times = [*(0.7 + np.arange(10) / 10), *(2.2 + np.arange(8) / 10)]
    path = mux(tmp_path / "late.mkv", tone(1.8), codec="pcm_s16le", times=times, film=np.arange(30) / 10)
    cut(path, tmp_path / "part.mkv", start, end)
    sound = decode_audio(tmp_path / "part.mkv", in_video=True)
    assert len(sound) == pytest.approx(((end or 3.0) - start) * 16_000, abs=32)
    seconds = start + np.arange(len(sound)) / 16_000
    due = (seconds > 0.7) & ~((seconds > 1.7) & (seconds < 2.2))
    near = np.abs(np.subtract.outer(seconds, [0.7, 1.7, 2.2])).min(axis=1) < 0.003
    loud = np.abs(sound) > 0
    assert not (loud & ~due & ~near).any() and loud[due & ~near].mean() > 0.98


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, 1), (0, -1, -1, 0)])
def test_a_part_is_upright_with_square_pixels(tmp_path, matrix):
    path = write_film(tmp_path / "a.mp4", matrix=matrix, aspect=Fraction(2), cover="attached")
    cut(path, tmp_path / "part.mkv", 0.5, 1.0)
    wanted = upright_by_hand(np.repeat(corners(), 2, axis=1), matrix).astype(int)
    frame = decode_frames(tmp_path / "part.mkv", np.array([1]))[0]
    assert frame.shape == wanted.shape and np.abs(frame - wanted).mean() < 12


def test_a_part_of_the_default_track(tmp_path):
    path = mux(tmp_path / "a.mkv", tone(2.0, 300), tone(2.0, 900), codec="flac", film=np.arange(20) / 10, default=1)
    cut(path, tmp_path / "part.mkv", 0.5, 1.5)
    assert np.abs(np.fft.rfft(decode_audio(tmp_path / "part.mkv"))).argmax() == pytest.approx(900, abs=2)


def test_a_part_of_a_cut_clip_is_refused_and_a_full_disk_is_not_blamed_on_it(clip, tmp_path):
    (tmp_path / "cut.mkv").write_bytes(clip.read_bytes()[: clip.stat().st_size * 3 // 4])
    with pytest.raises(Refused, match="truncated"):
        cut(tmp_path / "cut.mkv", tmp_path / "part.mkv", 0.0, 1.0)
    write_pictures(tmp_path / "frames", 12, (640, 480))
    with room_for(2_000):
        with pytest.raises(OSError, match="File too large"):
            cut(clip, tmp_path / "part.mkv", 0.0, 2.0)
        with pytest.raises(OSError, match="File too large"):
            from_frames(tmp_path / "frames", tmp_path / "made.mkv", 3.0, None, None)


def test_the_same_part_has_the_same_bytes(clip, tmp_path):
    for name in ("a.mkv", "b.mkv"):
        cut(clip, tmp_path / name, 1.0, 2.0)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_no_frame_in_the_time_is_refused(clip, tmp_path):
    with pytest.raises(Refused) as refused:
        cut(clip, tmp_path / "part.mkv", 10, 12)
    assert refused.value.detail == "holds no frame from 10 to 12 s"


def test_a_sound_has_no_part(tmp_path):
    write_medium(tmp_path / "a.wav", "audio")
    with pytest.raises(Refused) as refused:
        cut(tmp_path / "a.wav", tmp_path / "part.mkv", 0, 1)
    assert refused.value.detail == "holds no video stream"


def write_pictures(folder, count, side=(65, 49)):
    """Pictures 1 ... count without leading zeros, each greyer than the one before it; an odd size."""
    folder.mkdir()
    for number in range(1, count + 1):
        Image.new("RGB", side, (10 * number,) * 3).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")


@pytest.mark.parametrize(("start", "end", "numbers"), [(None, None, range(1, 13)), (1.0, 3.0, range(4, 10)),
                                                       (2.0, None, range(7, 13))])  # fmt: skip
def test_a_folder_of_frames_is_a_clip_of_its_rate(tmp_path, start, end, numbers):
    write_pictures(tmp_path / "frames", 12)
    from_frames(tmp_path / "frames", tmp_path / "made.mkv", 3.0, start, end)
    measured, grey = greys(tmp_path / "made.mkv")
    assert (measured.frame_count, measured.fps) == (len(numbers), pytest.approx(3))
    assert (measured.height, measured.width) == (48, 64)
    np.testing.assert_allclose(grey, [10 * number for number in numbers], atol=2.5)  # 10 comes behind 9


def test_pictures_of_a_folder_are_opaque_upright_and_of_one_size(tmp_path):
    write_pictures(tmp_path / "frames", 2, (64, 48))
    Image.new("RGBA", (64, 48), (0, 0, 0, 0)).save(tmp_path / "frames" / "3.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (48, 64), (90, 90, 90)).save(tmp_path / "frames" / "4.png", exif=turned)
    from_frames(tmp_path / "frames", tmp_path / "made.mkv", 2.0, None, None)
    np.testing.assert_allclose(greys(tmp_path / "made.mkv")[1], [10, 20, 255, 90], atol=2.5)
    Image.new("RGB", (32, 48)).save(tmp_path / "frames" / "5.png")
    with pytest.raises(Refused, match="5.png is 32x48 pixels, the folder's first picture 64x48"):
        from_frames(tmp_path / "frames", tmp_path / "made.mkv", 2.0, None, None)


def test_a_folder_without_pictures_in_that_time_is_refused(tmp_path):
    write_pictures(tmp_path / "frames", 6)
    with pytest.raises(Refused) as refused:
        from_frames(tmp_path / "frames", tmp_path / "made.mkv", 3.0, 2.0, 4.0)
    assert refused.value.detail == "the folder holds 6 pictures, none of them in that time"
