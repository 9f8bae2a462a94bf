"""Frame plans, the two video heads against each other, and damaged files."""

import math
import pickle
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from av.video.reformatter import Colorspace
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.container import Fit, MediaError
from megatron_avatar.data.decode import (
    clip_seconds,
    decode_audio,
    decode_frames,
    decode_image,
    plan_frames,
)
from megatron_avatar.data.features import resize
from megatron_avatar.records import Media
from tests.data.media import make_audio, make_video


def video(frames, fps=8.0, pts=None):
    return Media("v", "video", frames, fps, pts, 84, 84)


def smart_nframes(frames, fps, sampled, least, most):
    """qwen-omni-utils 0.0.9: clamped, then floored to a multiple of FRAME_FACTOR = 2."""
    nframes = frames / fps * sampled
    nframes = min(min(max(nframes, math.ceil(least / 2) * 2), math.floor(most / 2) * 2), frames)
    return math.floor(nframes / 2) * 2


@given(st.integers(1, 5000), st.floats(0.5, 120), st.floats(0.2, 8), st.integers(2, 384))
def test_plan_frames(frames, fps, sampled, most):
    data = DataConfig(fps=sampled, min_frames=4, max_frames=max(4, 2 * most))
    indices = plan_frames(video(frames, fps), data)
    assert len(indices) == max(2, smart_nframes(frames, fps, sampled, 4, data.max_frames))
    assert indices[0] == 0 and indices[-1] == frames - 1 and (np.diff(indices) >= 0).all()
    if frames > 1:
        assert np.ptp(np.diff(indices)) <= 1  # even spacing


def test_plan_frames_by_hand():
    data = DataConfig(fps=4.0, max_frames=16)
    assert plan_frames(video(16), data).tolist() == [0, 2, 4, 6, 9, 11, 13, 15]
    assert len(plan_frames(video(209, 30.0), DataConfig(fps=2.0))) == 12  # 13.93 are wanted
    assert plan_frames(video(1), data).tolist() == [0, 0]
    assert plan_frames(video(3), data).tolist() == [0, 2]
    # variable frame rate: eight frames in the first second, then one a second; times 0, 1, ..., 7 are wanted
    pts = tuple(i / 8 for i in range(8)) + tuple(float(i) for i in range(1, 8))
    uneven = video(15, pts=pts)
    assert plan_frames(uneven, DataConfig(fps=1.1)).tolist() == [0, 8, 9, 10, 11, 12, 13, 14]
    assert clip_seconds(uneven) == pytest.approx(7.5) and clip_seconds(video(16)) == 2.0
    late = video(15, pts=tuple(10.0 + time for time in pts))  # cut out of a film: its clock doesn't begin at 0
    assert plan_frames(late, DataConfig(fps=1.1)).tolist() == [0, 8, 9, 10, 11, 12, 13, 14]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(0, 64_000))
def test_frames_do_not_depend_on_where_a_clips_clock_begins(gaps, start):
    """Times in 64ths of a second, which floats hold exactly."""
    times = np.cumsum([0, *gaps]) / 64
    own, late = (
        plan_frames(video(len(times), pts=tuple(begin + times)), DataConfig(fps=2.0)) for begin in (0.0, start / 64)
    )
    assert own.tolist() == late.tolist()
    assert own[0] == 0 and own[-1] == len(times) - 1 and (np.diff(own) >= 0).all()


@pytest.mark.parametrize(
    ("codec", "name", "size"),
    [
        ("libvpx-vp9", "a.webm", (84, 84)),
        ("libvpx-vp9", "b.webm", (90, 161)),
        ("libvpx", "c.webm", (84, 120)),
        ("mjpeg", "d.avi", (84, 84)),
    ],
)
def test_dali_equals_pyav(tmp_path, codec, name, size):
    path = make_video(tmp_path / name, 16, *size, codec=codec)
    for indices in ([0, 2, 4, 6, 9, 11, 13, 15], [15, 3, 3, 0]):
        dali, pyav, auto = (decode_frames(path, np.array(indices), b) for b in ("dali", "pyav", "auto"))
        assert dali.dtype == np.uint8 and dali.shape == (len(indices), *size, 3)
        assert np.array_equal(dali, pyav) and np.array_equal(auto, pyav)
    assert not np.array_equal(dali[0], dali[-1])


def test_colour_tag_changes_neither_head(tmp_path):
    plain, tagged = (make_video(tmp_path / f"{tag}.webm", tag=tag) for tag in (None, Colorspace.ITU709))
    frames = [decode_frames(path, np.arange(0, 16, 5), b) for path in (plain, tagged) for b in ("dali", "pyav")]
    assert all(np.array_equal(frames[0], other) for other in frames[1:])


def test_variable_frame_rate(tmp_path):
    path = make_video(tmp_path / "v.webm", 8, pts=[0, 10, 20, 30, 500, 900, 1700, 2000])
    frames = [decode_frames(path, np.arange(8), backend) for backend in ("dali", "pyav")]
    assert np.array_equal(*frames) and len({f.tobytes() for f in frames[0]}) == 8


def test_colours_are_those_that_were_drawn(tmp_path):
    frame = decode_frames(make_video(tmp_path / "v.webm"), np.array([8, 8]))[0]
    assert np.abs(frame[20, 30].astype(int) - [160, 102, 60]).max() < 20
    assert np.abs(frame[70, 10].astype(int) - [38, 38, 38]).max() < 8


def test_auto_takes_pyav_for_codecs_that_dali_lacks(tmp_path):
    path = make_video(tmp_path / "v.mkv", codec="ffv1")
    assert decode_frames(path, np.array([0, 15])).shape == (2, 84, 84, 3)
    with pytest.raises(MediaError, match=r"v\.mkv: DALI cannot decode it .*; try data\.decoder=auto"):
        decode_frames(path, np.array([0, 15]), "dali")


@pytest.mark.parametrize("backend", ["auto", "pyav", "dali"])
def test_damaged_videos_are_named_and_the_next_one_decodes(tmp_path, backend):
    good = make_video(tmp_path / "good.webm")
    content = good.read_bytes()
    (tmp_path / "empty.webm").touch()
    (tmp_path / "text.webm").write_text("no video at all\n" * 50)
    (tmp_path / "head.webm").write_bytes(content[:300])
    (tmp_path / "half.webm").write_bytes(content[: len(content) // 2])
    make_audio(tmp_path / "sound.flac")
    for name in ("missing.webm", "empty.webm", "text.webm", "head.webm", "half.webm", "sound.flac"):
        with pytest.raises(MediaError, match=rf"{name}: .+; .+"):
            decode_frames(tmp_path / name, np.array([0, 15]), backend)
    with pytest.raises(MediaError):
        decode_frames(good, np.array([0, 16]), backend)
    assert decode_frames(good, np.array([0, 15]), backend).shape == (2, 84, 84, 3)


def test_messages_name_what_is_wrong(tmp_path):
    (tmp_path / "empty.webm").touch()
    make_audio(tmp_path / "sound.flac")
    for name, what in {
        "missing.webm": "the file is missing; restore it",
        "empty.webm": "the file is empty",
        "sound.flac": "holds no video stream; correct the media kind",
    }.items():
        with pytest.raises(MediaError, match=what):
            decode_frames(tmp_path / name, np.array([0]))
    with pytest.raises(MediaError, match=r"ends before frame 16, .*truncated"):
        decode_frames(make_video(tmp_path / "v.webm"), np.array([0, 16]))
    content = (tmp_path / "v.webm").read_bytes()
    assert content.count(b"V_VP9") == 1
    (tmp_path / "odd.webm").write_bytes(content.replace(b"V_VP9", b"V_VPX"))
    for backend in ("auto", "pyav"):
        with pytest.raises(MediaError, match="no decoder knows its codec; encode it anew"):
            decode_frames(tmp_path / "odd.webm", np.array([0]), backend)
    error = pickle.loads(pickle.dumps(MediaError(tmp_path, "what", "remedy")))
    assert str(error) == f"{tmp_path}: what; remedy"


def first_and_last(path):
    return decode_frames(path, np.array([0, 9]))


@pytest.mark.parametrize(("name", "decode"), [
    ("a.mp4", first_and_last), ("a.mkv", first_and_last), ("a.webm", first_and_last), ("a.flac", decode_audio),
    ("a.wav", decode_audio), ("a.ogg", decode_audio), ("a.png", decode_image), ("a.gif", decode_image),
])  # fmt: skip
def test_damage_of_any_kind_is_a_media_error(tmp_path, name, decode):
    """Bytes overwritten, cut out and cut off: what comes is an array, or the file's name with a reason."""
    path = tmp_path / name
    if decode is first_and_last:
        make_video(path, 10, 48, 64, codec="libvpx-vp9" if name == "a.webm" else "libx264")
    elif decode is decode_audio:
        make_audio(path, 0.5)
    else:
        Image.effect_noise((40, 40), 60).save(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for k in range(60):
        data = bytearray(whole)
        place = int(rng.integers(len(data) if k % 2 else min(len(data), 400)))
        data[place : place + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(9)))
        path.write_bytes(data if k % 5 else data[:place])
        try:
            decode(path)
        except MediaError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 10


def test_audio(tmp_path):
    for name in ("a.flac", "a.wav", "a.ogg"):
        waveform = decode_audio(make_audio(tmp_path / name))
        assert waveform.dtype == np.float32 and len(waveform) == 32_000
    stereo = decode_audio(make_audio(tmp_path / "s.flac", rate=48_000, channels=2))
    assert len(stereo) == 32_000
    assert np.abs(stereo - decode_audio(tmp_path / "a.flac"))[200:-200].max() < 1e-3
    (tmp_path / "a.mka").write_bytes((tmp_path / "a.flac").read_bytes())  # not soundfile's: PyAV reads it
    assert np.array_equal(decode_audio(tmp_path / "a.mka"), decode_audio(tmp_path / "a.flac"))


def test_damaged_audio_is_named(tmp_path):
    content = make_audio(tmp_path / "a.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "text.mp3").write_text("no sound at all")
    (tmp_path / "empty.flac").touch()
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.1]), 16_000, subtype="FLOAT")
    make_video(tmp_path / "mute.webm")
    for name, what in {
        "half.flac": "damaged",
        "text.wav": "not a sound file",
        "text.mp3": "not a sound file",
        "empty.flac": "the file is empty",
        "none.wav": "holds no sound; leave audio_path out",
        "nan.wav": "not finite numbers",
        "mute.webm": "holds no audio stream; leave audio_path out",
        "missing.flac": "the file is missing",
    }.items():
        with pytest.raises(MediaError, match=rf"{name}: .*{what}"):
            decode_audio(tmp_path / name)


@pytest.mark.parametrize("head", ["pyav", "dali"])
@pytest.mark.parametrize("indices", [[0, 2, 4, 6, 9, 11, 13, 15], [15, 3, 3, 0, 7], [5]])
def test_frames_resized_as_they_come_are_those_resized_at_the_end(tmp_path, head, indices, monkeypatch):
    path, indices = make_video(tmp_path / "v.webm", 16, 90, 161), np.array(indices)
    whole = decode_frames(path, indices, head)
    monkeypatch.setattr("megatron_avatar.data.dali.PIECE_BYTES", 3 * 90 * 161 * 3)
    for size in ((84, 140), (112, 168), (90, 161)):
        frames = decode_frames(path, indices, head, Fit((90, 161), size))
        assert np.array_equal(frames, resize(whole, *size))
    with pytest.raises(MediaError, match="is 161x90 pixels, the manifest says 90x161; measure it again"):
        decode_frames(path, indices, head, Fit((161, 90), (84, 84)))


@pytest.mark.parametrize("head", ["pyav", "dali"])
def test_memory_does_not_grow_with_the_frames_at_full_size(tmp_path, head, monkeypatch):
    path = make_video(tmp_path / "v.avi", 24, 720, 1280, codec="mjpeg")  # 2.6 MiB a frame
    monkeypatch.setattr("megatron_avatar.data.dali.PIECE_BYTES", 8 * 2**20)
    fit = Fit((720, 1280), (56, 84))
    decode_frames(path, np.arange(2), head, fit)  # what is built once
    tracemalloc.start()
    frames = decode_frames(path, np.arange(24), head, fit)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert frames.shape == (24, 56, 84, 3) and peak < 20  # MiB, of 63 in all


def shown(tmp_path, picture, name="p.png", **options):
    picture.save(tmp_path / name, **options)
    return decode_image(tmp_path / name)[0]


def test_transparent_pictures_lie_on_white(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels, "RGBA")
    on_white = Image.new("RGB", rgba.size, (255, 255, 255))  # as qwen_vl_utils.to_rgb
    on_white.paste(rgba, mask=rgba.split()[3])
    assert np.array_equal(shown(tmp_path, rgba), np.asarray(on_white))
    assert np.array_equal(shown(tmp_path, rgba, "p.webp", lossless=True, exact=True), np.asarray(on_white))
    alpha = pixels[..., 3:].astype(float) / 255
    grey = shown(tmp_path, Image.fromarray(pixels[..., 2:], "LA"))
    assert np.abs(grey - (pixels[..., 2:3] * alpha + 255 * (1 - alpha))).max() <= 1
    palette = Image.fromarray((pixels[..., 0] % 3).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 250, 10, 10, 10, 10, 250])
    colours = np.array([[255, 255, 255], [250, 10, 10], [10, 10, 250]])
    for name in ("p.png", "p.gif"):
        assert np.array_equal(shown(tmp_path, palette, name, transparency=0), colours[pixels[..., 0] % 3])
    keyed = Image.fromarray(np.where(pixels[..., :1] % 2, [[[9, 8, 7]]], [[[0, 0, 0]]]).astype(np.uint8))
    assert set(map(tuple, shown(tmp_path, keyed, transparency=(0, 0, 0)).reshape(-1, 3).tolist())) == {
        (255, 255, 255), (9, 8, 7)}  # fmt: skip


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    wanted = np.rint(values / 257)
    for name in ("p.png", "p.tiff"):
        assert np.array_equal(shown(tmp_path, Image.fromarray(values), name)[..., 1], wanted)
    keyed = shown(tmp_path, Image.fromarray(values), transparency=int(values[0, 1]))
    assert keyed[0, 1].tolist() == [255] * 3 and np.array_equal(keyed[1:, :, 0], wanted[1:])
    for odd in (values.astype(np.int32), values.astype(np.float32)):
        with pytest.raises(MediaError, match="32-bit numbers, and nothing says which is white; save it with 8 or 16"):
            shown(tmp_path, Image.fromarray(odd), "p.tiff")


def test_whatever_a_format_raises_names_the_picture(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "p.avif")
    data = bytearray((tmp_path / "p.avif").read_bytes())
    for place in range(4, len(data), 61):  # Pillow's AVIF raises RuntimeError, its others OSError and more
        (tmp_path / "q.avif").write_bytes(data[:place] + bytes(40) + data[place + 40 :])
        try:
            decode_image(tmp_path / "q.avif")
        except MediaError as error:
            assert "q.avif: not a picture, or damaged" in str(error)


def test_image(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(picture).save(tmp_path / "i.png", exif=exif)
    assert np.array_equal(decode_image(tmp_path / "i.png"), np.rot90(picture, -1)[None])
    (tmp_path / "half.png").write_bytes((tmp_path / "i.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    Image.fromarray(picture).save(tmp_path / "bomb.png")  # over twice the limit: no OSError
    for name in ("half.png", "text.png", "missing.png", "bomb.png", "long" * 90 + ".png"):
        with pytest.raises(MediaError, match=rf"{name}: "):
            decode_image(tmp_path / name)


def test_a_size_that_changes_within_a_clip_is_named(tmp_path):
    path = tmp_path / "two.avi"
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k in range(8):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = 64 if k < 4 else 32, 48, "yuvj420p"
            encoder.time_base = stream.time_base = Fraction(1, 8)
            frame = av.VideoFrame.from_ndarray(np.full((48, encoder.width, 3), 30 * k, np.uint8), format="rgb24")
            frame.pts = k
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.stream = stream
                sink.mux(packet)
    assert decode_frames(path, np.arange(4)).shape == (4, 48, 64, 3)
    with pytest.raises(MediaError, match="its size changes before frame 4"):
        decode_frames(path, np.arange(8))
