"""Sound tracks: in time, as loud as they are, the one that is meant; what is cut off, damaged or out of measure."""

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.data.container import MediaError
from megatron_avatar.data.decode import decode_audio
from megatron_avatar.data.sound import BACK_S, SLACK_S, _Timeline, require_length
from megatron_avatar.data.whole import _checksum
from tests.data.tracks import RATE, mux, patched, piped_flac, piped_wav, tone, wav, without


def level(wave):
    return float(np.sqrt(np.square(wave, dtype=np.float64).mean()))


@pytest.mark.parametrize("suffix", [".m4a", ".mka", ".webm", ".mov", ".wav"])
@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged_whatever_the_codec(tmp_path, suffix, channels):
    """FFmpeg's own downmix to floats makes stereo 1.4 and 5.1 up to 5 times louder."""
    hertz = (300, 400, 500, 60, 700, 800)  # the fourth is the deep one
    waves = np.stack([(k + 1) / channels * tone(2.0, hertz[k], 48_000) for k in range(channels)])
    path = tmp_path / f"a{suffix}"
    wav(path, waves, 48_000) if suffix == ".wav" else mux(path, waves, rate=48_000)
    wanted = level(waves[:, 4800:-4800].mean(axis=0))
    assert level(decode_audio(path)[1600:-1600]) == pytest.approx(wanted, rel=0.06)  # lossy codecs bend the low tones


def test_a_mono_track_of_16_khz_keeps_its_samples(tmp_path):
    wave = (tone(1.0) * 2**15).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", wave, RATE)
    (tmp_path / "a.mka").write_bytes((tmp_path / "a.flac").read_bytes())
    for name in ("a.flac", "a.mka"):
        assert np.array_equal(decode_audio(tmp_path / name) * 2**15, wave)


def silent_spans(wave, least=0.02):
    """(first, last) second of each span of silence."""
    loud = np.flatnonzero(np.abs(wave) > 1e-3)
    edges = np.concatenate([[-1], loud, [len(wave)]])
    gaps = np.flatnonzero(np.diff(edges) > least * RATE)
    return [(round((edges[k] + 1) / RATE, 2), round(edges[k + 1] / RATE, 2)) for k in gaps]


def test_holes_in_a_track_are_silence_and_overlaps_are_heard_once(tmp_path):
    times = [*np.arange(10) / 10, *(2.2 + np.arange(10) / 10), *(3.19 + 0.04 * np.arange(10))]  # at last each overlaps
    path = mux(tmp_path / "a.mka", np.concatenate([tone(2.0), tone(1.0, 880)]), codec="pcm_s16le", times=times)
    wave = decode_audio(path)
    assert len(wave) == pytest.approx((times[-1] + 0.1) * RATE, abs=0.05 * RATE)
    assert silent_spans(wave) == [(1.0, 2.2)]
    assert np.array_equal(wave[:RATE], decode_audio(mux(tmp_path / "b.mka", tone(1.0), codec="pcm_s16le")))


def test_a_track_that_begins_anew_is_refused(tmp_path):
    """As where two recordings were appended."""
    part = mux(tmp_path / "a.ts", tone(3.0), codec="aac").read_bytes()
    (tmp_path / "a.ts").write_bytes(part + part)
    with pytest.raises(MediaError, match=r"goes back in time by 3\.\d\d s behind 3\.\d\d s; encode its sound anew"):
        decode_audio(tmp_path / "a.ts")


def test_a_clock_that_shivers_is_left_alone(tmp_path):
    shiver = np.random.default_rng(0).uniform(-0.02, 0.02, 30).clip(0 - np.arange(30) / 10)
    wave = decode_audio(mux(tmp_path / "a.mka", tone(3.0), codec="pcm_s16le", times=np.arange(30) / 10 + shiver))
    assert np.abs(wave - tone(3.0)).max() < 1e-4


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(-200, 3000)), min_size=1, max_size=20), st.booleans())
def test_every_sample_lies_at_its_time(parts, given_start):
    """Samples that say when they are due: each comes out there, or up to the slack beside it; all else is silence."""
    rate, due, frames = 1000, 500, []
    for length, hole in parts:
        due = max(0, due + hole)
        frames.append((due, np.arange(due, due + length, dtype=np.float32) + 1))
        due += length
    start = frames[0][0] - 130 if given_start else frames[0][0]
    timeline, placed = _Timeline("a", rate, start / rate if given_start else None), []
    for at, samples in frames:
        back = at - start - sum(map(len, placed))
        assert back >= -BACK_S * rate  # holes are never that negative here
        placed += timeline.place(at / rate, samples)
    wave = np.concatenate(placed)
    heard = np.flatnonzero(wave)
    assert np.abs(wave[heard] - 1 - start - heard).max() <= SLACK_S * rate
    assert len(wave) >= max(at + len(samples) for at, samples in frames) - start - SLACK_S * rate


@pytest.mark.parametrize(("film", "track", "silence"), [(0.0, 0.7, 0.7), (0.5, 0.5, 0.0), (1.0, 0.4, -0.6)])
def test_the_sound_of_a_clip_begins_with_its_picture(tmp_path, film, track, silence):
    """A late track has silence in front, of an early one the beginning is left out."""
    wave = np.concatenate([tone(1.0), tone(1.0, 880)])
    path = mux(tmp_path / "a.mkv", wave, codec="pcm_s16le", times=track + np.arange(20) / 10,
               film=film + np.arange(20) / 10)  # fmt: skip
    heard = decode_audio(path, in_video=True)
    assert len(heard) == pytest.approx((2.0 + silence) * RATE, abs=16)
    assert silent_spans(heard) == ([(0.0, silence)] if silence > 0 else [])
    higher = np.abs(np.fft.rfft(heard[int((1.1 + silence) * RATE) : int((1.9 + silence) * RATE)])).argmax() / 0.8
    assert higher == pytest.approx(880, abs=3)
    assert len(decode_audio(path)) == pytest.approx(2.0 * RATE, abs=16)  # by itself it begins with itself


def test_the_default_track_is_heard(tmp_path):
    tracks = [tone(2.0, hertz) for hertz in (300, 600, 900)]
    for default in range(3):
        wave = decode_audio(mux(tmp_path / "a.mka", *tracks, default=default))
        assert np.abs(np.fft.rfft(wave)).argmax() / 2 == 300 * (default + 1)


FORMS = {
    "a.wav": lambda path: wav(path, tone(4.0)),
    "six.wav": lambda path: wav(path, np.stack([tone(4.0)] * 6), subtype="PCM_24"),
    "long.wav": lambda path: wav(path, tone(4.0), form="RF64"),
    "a.flac": lambda path: wav(path, tone(4.0), form="FLAC"),
    "stereo.flac": lambda path: wav(path, np.stack([tone(4.0, rate=44_100)] * 2), 44_100, form="FLAC"),
    "a.mka": lambda path: mux(path, tone(4.0)),
    "a.ogg": lambda path: wav(path, noise(4.0), subtype="VORBIS", form="OGG"),
    "b.opus": lambda path: wav(path, noise(4.0, 48_000), 48_000, subtype="OPUS", form="OGG"),
    "c.opus": lambda path: mux(path, noise(4.0, 48_000), rate=48_000),
    "a.webm": lambda path: mux(path, noise(4.0, 48_000), rate=48_000),
    "a.mp3": lambda path: mux(path, noise(4.0)),
    "b.mp3": lambda path: wav(path, noise(4.0), subtype="MPEG_LAYER_III", form="MP3"),
    "bare.mp3": lambda path: mux(path, noise(4.0), options={"write_xing": "0", "id3v2_version": "0"}),
    "a.m4a": lambda path: mux(path, noise(4.0), options={"movflags": "faststart"}),
    "pieces.m4a": lambda path: mux(path, noise(4.0), options={"movflags": "frag_keyframe+empty_moov"}),
    "a.mov": lambda path: mux(path, tone(4.0)),
}  # fmt: skip


def noise(seconds, rate=RATE):
    wave = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
    return wave.clip(-0.9, 0.9)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("share", [1.0, 0.97, 0.6])
def test_what_breaks_off_is_refused(tmp_path, name, share):
    path = FORMS[name](tmp_path / name)
    if share == 1.0:
        assert len(decode_audio(path)) == pytest.approx(4.0 * RATE, abs=1800)
        return
    without(path, share, 1.0)
    with pytest.raises(MediaError, match=f"{name}: ") as refused:
        decode_audio(path)
    assert refused.value.kind in ("truncated", "damaged")


@pytest.mark.parametrize("name", [name for name in FORMS if name.endswith((".ogg", ".opus", ".flac", ".mp3"))])
@pytest.mark.parametrize("zeros", [True, False])
def test_what_is_damaged_in_the_middle_is_refused(tmp_path, name, zeros):
    with pytest.raises(MediaError, match=f"{name}: "):
        decode_audio(without(FORMS[name](tmp_path / name), 0.4, 0.2, zeros=zeros))


def test_ogg_pages_are_checked_one_by_one(tmp_path):
    path = mux(tmp_path / "a.opus", noise(4.0, 48_000), rate=48_000)
    data = path.read_bytes()
    pages = [k for k in range(len(data)) if data[k : k + 4] == b"OggS"]
    for what, damaged in {
        "damaged .its checksum": data[: pages[2] + 300] + b"\x55" + data[pages[2] + 301 :],
        "has lost what lies between its pages 2 and 4": data[: pages[3]] + data[pages[4] :],
        "its last page says that others follow": data[: pages[-1]],
        "between two of its pages": data[: pages[-1]] + b"junk" + data[pages[-1] :],
        "breaks off within a page": data[:-10],
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(MediaError, match=what):
            decode_audio(path)
    path.write_bytes(data + b"TAG" + bytes(125))  # appended behind the end
    assert len(decode_audio(path)) == pytest.approx(4.0 * RATE, abs=400)


def test_ogg_may_end_with_an_empty_packet(tmp_path):
    """As libvorbis closes a stream; FFmpeg's decoder refuses such a packet."""

    def with_checksum(page):
        return page[:22] + _checksum(page[:22] + bytes(4) + page[26:]).to_bytes(4, "little") + page[26:]

    path = wav(tmp_path / "a.oga", noise(4.0), subtype="VORBIS", form="OGG")
    whole, data = decode_audio(path), path.read_bytes()
    last = data.rindex(b"OggS")
    page = bytearray(data[last:])
    assert with_checksum(bytes(page)) == data[last:] and page[5] == 4
    page[5] = 0
    number = int.from_bytes(page[18:22], "little") + 1
    end = b"OggS\0\4" + bytes(page[6:18]) + number.to_bytes(4, "little") + bytes(4) + b"\1\0"
    path.write_bytes(data[:last] + with_checksum(bytes(page)) + with_checksum(end))
    assert np.array_equal(decode_audio(path), whole)


@pytest.mark.parametrize("length", [0xFFFF_FFFF, 0x7FFF_F000, 0x8000_0000])
def test_sound_that_was_written_into_a_pipe_is_read_to_its_end(tmp_path, length):
    assert len(decode_audio(piped_wav(tmp_path / "a.wav", length))) == RATE
    wave = decode_audio(piped_flac(tmp_path / "a.flac"))
    assert np.abs(wave - tone(3.0)).max() < 1e-4


@pytest.mark.parametrize("rate", [1, 999, 1_000_000, 2**31 - 1])
def test_headers_out_of_all_measure_are_refused(tmp_path, rate):
    path = patched(wav(tmp_path / "a.wav", np.stack([tone(1.0)] * 8)), b"fmt ", 12, rate.to_bytes(4, "little"))
    (tmp_path / "a.mka").write_bytes(path.read_bytes())  # by FFmpeg
    for name in ("a.wav", "a.mka"):
        with pytest.raises(MediaError, match=rf"claims {rate} samples a second|not a sound file"):
            decode_audio(tmp_path / name)


def test_sound_longer_than_a_day_or_than_its_manifest_line_is_refused(tmp_path):
    with pytest.raises(MediaError, match=r"its sound pauses for 700\.00 s behind 1\.00 s"):
        times = [*np.arange(10) / 10, 701.0]
        decode_audio(mux(tmp_path / "a.mka", tone(1.1), codec="pcm_s16le", times=times))
    require_length(tmp_path, 86_400.0)
    with pytest.raises(MediaError, match="more than 24 hours of sound; cut it into parts"):
        require_length(tmp_path, 86_401.0)
    for path in (wav(tmp_path / "a.wav", tone(2.0)), mux(tmp_path / "b.mka", tone(2.0))):
        assert len(decode_audio(path, most=2 * RATE)) == 2 * RATE
        with pytest.raises(MediaError, match="samples or more, the manifest says 31999; measure it again"):
            decode_audio(path, most=2 * RATE - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["pcm_f32le", "pcm_f64le"])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value, codec):
    wave = tone(1.0)
    wave[8000] = value
    for path in (mux(tmp_path / "a.mka", wave, codec=codec), wav(tmp_path / "a.wav", wave, subtype="FLOAT")):
        with pytest.raises(MediaError, match="not finite numbers"):
            decode_audio(path)


def test_channels_that_cancel_each_other_out_are_named(tmp_path):
    opposite = np.stack([tone(1.0), -tone(1.0)])
    for path in (mux(tmp_path / "a.mka", opposite), wav(tmp_path / "a.wav", opposite)):
        with pytest.raises(MediaError, match="one is the other's opposite.*; keep one of its channels"):
            decode_audio(path)
    assert not decode_audio(mux(tmp_path / "b.mka", np.zeros((2, RATE)))).any()  # silence is silence
    assert decode_audio(mux(tmp_path / "c.mka", np.stack([tone(1.0), -0.9 * tone(1.0)]))).any()


def test_a_track_whose_rate_changes_is_refused(tmp_path):
    path = tmp_path / "a.mka"
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libmp3lame", rate=32_000, layout="mono")
        for rate in (32_000, 48_000):
            encoder = av.CodecContext.create("libmp3lame", "w")
            encoder.sample_rate, encoder.layout, encoder.format = rate, "mono", "fltp"
            encoder.open()
            for _ in range(20):
                frame = av.AudioFrame.from_ndarray(noise(1152 / rate, rate)[None], format="fltp", layout="mono")
                frame.sample_rate = rate
                for packet in encoder.encode(frame):
                    packet.stream, packet.pts, packet.dts = stream, None, None
                    sink.mux(packet)
    with pytest.raises(MediaError, match="its rate changes from 32000 to 48000 Hz"):
        decode_audio(path)
