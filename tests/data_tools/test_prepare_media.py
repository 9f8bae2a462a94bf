"""What data_tools.prepare makes of single files: every codec as the decoder counts it, every damage with its reason."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from data_tools.prepare import store as stores
from data_tools.prepare.convert import bounded_size, extract_sound
from data_tools.prepare.damage import Refused
from data_tools.prepare.measure import measure_video
from data_tools.prepare.store import Handling, Source, read_card, store
from megatron_avatar.data.container import TURNS
from megatron_avatar.data.decode import MediaError, decode_audio, decode_frames
from tests.data.films import corners, upright_by_hand, write_film
from tests.data.media import make_audio
from tests.data.tracks import mux, patched, room_for, tone, wav, without
from tests.data_tools.clips import FORMATS, make_clip
from tests.data_tools.damage import (
    cut,
    deep_picture,
    fast_start,
    half_picture,
    huge_picture,
    no_frames,
    playlist,
    sound_only,
    standing_time,
    text,
    turned,
)

GOP = {"g": "10", "bf": "0", "sc_threshold": "0"}


@pytest.fixture
def handle(tmp_path):
    """Stores a file below `in` and returns its card."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for path in (folder, out / "scratch"):
        path.mkdir(parents=True)

    def run(name: str | bytes, kind: str = "video", root: object = folder, **options) -> dict:
        handling = Handling(str(root), str(out), str(out / "scratch"), **options)
        source = Source(kind, data=name) if isinstance(name, bytes) else Source(kind, name)
        card = read_card(out, store(source, handling), kind)
        assert not list((out / "scratch").iterdir())
        return card

    run.folder, run.out = folder, out
    return run


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "mpeg2_mp3"])
def test_frames_are_counted_as_the_decoder_counts_them(handle, form):
    path = make_clip(handle.folder, form=form, fps=8, frames=21)
    card = handle(path.name)
    media = card["media"]
    count = media["frame_count"]
    assert (count, media["height"], media["width"]) == (21, 84, 84)
    if form == "mjpeg_mp3":  # this AVI leaves out the time of its second frame
        assert media["pts"][:3] == [0, 0.25, 0.375]
    else:
        assert media["fps"] == 8.0 and "pts" not in media
    stored = handle.out / media["path"]
    assert len(decode_frames(stored, np.arange(count), "pyav")) == count
    with pytest.raises(MediaError, match="ends before"):
        decode_frames(stored, np.array([count]), "pyav")
    assert measure_video(path, decode=True).frame_count == count
    assert not os.path.samefile(stored, path) and stored.read_bytes() == path.read_bytes()  # copied, not linked
    assert media["audio_in_video"] and len(decode_audio(handle.out / media["audio_path"])) == media["audio_samples"]
    assert soundfile.info(handle.out / media["audio_path"]).samplerate == 16_000
    assert abs(media["audio_samples"] - 42_000) < 1_200
    assert card["facts"]["codec"] == FORMATS[form][1].replace("lib", "").replace("x264", "h264").replace(
        "vpx-vp9", "vp9").replace("vpx", "vp8").replace("svtav1", "av1")  # fmt: skip


def test_times_are_kept_where_the_frame_rate_varies(handle):
    times = [0, 100, 200, 300, 900, 1000, 2000, 2050]
    path = make_clip(handle.folder, form="vp9_opus", frames=len(times), pts=times, sound=0)
    media = handle(path.name)["media"]
    assert media["pts"] == [t / 1000 for t in times] and media["frame_count"] == 8 and "audio_path" not in media
    assert measure_video(path, decode=True).pts == media["pts"]


def test_a_clip_that_does_not_open_with_a_key_frame_is_counted_by_decoding(handle):
    whole, path = make_clip(handle.folder, "whole", sound=0, frames=40, options=GOP), "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(handle.folder / path), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux()):
            if packet.size and index >= 5:
                packet.stream = stream
                sink.mux(packet)
    media = handle(path)["media"]
    assert media["frame_count"] == 30  # of 35 packets
    assert len(decode_frames(handle.out / media["path"], np.arange(30), "pyav")) == 30


def test_b_frames_are_sorted_in_time(handle):
    path = make_clip(handle.folder, frames=30, options={"bf": "3", "preset": "medium"})
    assert handle(path.name)["media"]["frame_count"] == 30


@pytest.mark.parametrize(("make", "kind", "reason"), [
    (lambda f: f / "gone.mp4", "video", "missing"),
    (lambda f: cut(make_clip(f), 0), "video", "empty"),
    (text, "video", "not_media"),
    (text, "image", "not_media"),
    (text, "audio", "not_media"),
    (playlist, "video", "not_media"),
    (lambda f: cut(make_clip(f), 0.7), "video", "not_media"),  # an MP4's index is at its end
    (lambda f: cut(fast_start(f), 0.7), "video", "truncated"),
    (lambda f: cut(make_clip(f, form="vp9_opus", frames=48), 0.6), "video", "truncated"),
    (lambda f: cut(make_clip(f, form="mjpeg_mp3", frames=48), 0.6), "video", "truncated"),
    (sound_only, "video", "no_video"),
    (lambda f: make_audio(f / "a.wav"), "video", "no_video"),
    (no_frames, "video", "no_frames"),
    (standing_time, "video", "pts"),
    (huge_picture, "image", "size"),
    (half_picture, "image", "truncated"),
    (lambda f: make_clip(f, form="mpeg2_mp3"), "video", "codec"),
    (turned, "video", "rotated"),
    (lambda f: make_clip(f, sound=0), "audio", "no_sound"),
    (lambda f: make_audio(f / "short.wav", seconds=0.01), "audio", "no_sound"),
    (lambda f: cut(make_clip(f, form="vp9_opus", frames=48), 0.97), "video", "truncated"),
    (lambda f: cut(make_clip(f, form="mjpeg_mp3", frames=48), 0.97), "video", "truncated"),
    (lambda f: cut(make_audio(f / "a.wav"), 0.6), "audio", "truncated"),
    (lambda f: cut(make_audio(f / "a.ogg", seconds=60, channels=2), 0.9), "audio", "truncated"),
    (lambda f: cut(mux(f / "a.opus", tone(2.0, rate=48_000), rate=48_000), 0.6), "audio", "truncated"),
    (lambda f: cut(mux(f / "a.mp3", tone(2.0)), 0.6), "audio", "truncated"),
    (lambda f: without(mux(f / "a.opus", tone(4.0, rate=48_000), rate=48_000), 0.4, 0.3), "audio", "damaged"),
    (lambda f: wav(f / "a.wav", np.array([0.1, np.nan] * 800), subtype="FLOAT"), "audio", "damaged"),
    (lambda f: patched(make_audio(f / "a.wav"), b"fmt ", 12, bytes([1, 0, 0, 0])), "audio", "size"),
    (lambda f: write_film(f / "a.mp4", matrix=(-1, 0, 0, 1)), "video", "mirrored"),
    (lambda f: write_film(f / "a.mkv", aspect=Fraction(4, 3)), "video", "anamorphic"),
    (lambda f: deep_picture(f), "image", "mode"),
])  # fmt: skip
def test_damage_is_refused_with_its_reason(handle, make, kind, reason):
    path = make(handle.folder)
    try:
        card = handle(path.name, kind)
    except Refused as refused:
        card = {"refused": refused.kind, "detail": refused.detail}
    assert card.get("refused") == reason, card
    assert card["detail"] and not [p for p in handle.out.rglob("*") if p.is_file() and p.suffix != ".json"]


def test_check_decode_finds_what_packets_hide(handle):
    path = make_clip(handle.folder, form="mjpeg_mp3", frames=40, sound=0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\x00" * 3000
    path.write_bytes(data)
    card = handle(path.name, decode=True)
    assert card["refused"] in ("damaged", "truncated", "size"), card


def test_no_path_leaves_the_input(handle, tmp_path):
    outside = make_clip(tmp_path, "outside")
    (handle.folder / "link.mp4").symlink_to(outside)
    (handle.folder / "folder").symlink_to(tmp_path)
    for name in ("../outside.mp4", str(outside), "link.mp4", "folder/outside.mp4"):
        with pytest.raises(Refused, match="outside"):
            handle(name)
    assert handle("outside.mp4", root=tmp_path)["media"]


def test_addresses_stay_below_the_hub_dataset(handle, monkeypatch):
    root, asked = "hf://datasets/owner/name@1234", []
    clip = make_clip(handle.folder).read_bytes()

    def fake(address, mode):
        asked.append(address)
        if "gone" in address:
            raise FileNotFoundError(address)
        if "down" in address:
            raise RuntimeError("no network")
        return __import__("io").BytesIO(clip)

    monkeypatch.setattr(stores.fsspec, "open", fake)
    assert handle("videos/a.mp4", root=root)["media"]["frame_count"] == 24
    assert handle(f"zip://a.mp4::{root}/all.zip", root=root)["media"]["frame_count"] == 24
    assert asked == [f"{root}/videos/a.mp4", f"zip://a.mp4::{root}/all.zip"]
    for name, reason in (("videos/gone.mp4", "missing"), ("../b.mp4", "outside"), ("file:///etc/hosts", "outside"),
                         ("hf://datasets/owner/other@1/a.mp4", "outside")):  # fmt: skip
        with pytest.raises(Refused, match=reason):
            handle(name, root=root)
    with pytest.raises(OSError, match="no network; the same command continues"):  # not the medium's fault
        handle("videos/down.mp4", root=root)


def test_sound_comes_in_time_with_the_picture(handle):
    """A track that starts half a second late gets silence in front."""
    whole, path = make_clip(handle.folder, "whole", "h264_mp3"), handle.folder / "late.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as sink:
        streams = {stream: sink.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                if packet.stream.type == "audio":
                    packet.pts, packet.dts = packet.pts + 500, None
                packet.stream = streams[packet.stream]
                sink.mux(packet)
    sound, _ = soundfile.read(handle.out / handle(path.name)["media"]["audio_path"])
    plain, _ = soundfile.read(handle.out / handle(whole.name)["media"]["audio_path"])
    begins = [int(np.argmax(np.abs(wave) > 0.05)) for wave in (sound, plain)]
    assert begins[0] - begins[1] == pytest.approx(8_000, abs=32)


@pytest.mark.parametrize("name", ["a.wav", "b.ogg", "c.flac", "d.mp4"])
def test_sounds_become_flac(handle, name):
    if name == "d.mp4":
        make_clip(handle.folder, "d")
    else:
        make_audio(handle.folder / name, rate=16_000 if name == "c.flac" else 44_100, channels=1 + (name != "c.flac"))
    media = handle(name, "audio")["media"]
    path = handle.out / media["path"]
    wave = decode_audio(path)
    assert len(wave) == media["audio_samples"] and abs(len(wave) - (48_000 if name[0] == "d" else 32_000)) < 1_200
    assert np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave) == pytest.approx(440, abs=2)
    assert (path.read_bytes() == (handle.folder / name).read_bytes()) == (name == "c.flac")


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_encoding_anew_bounds_the_side_and_keeps_frames_and_colours(handle, codec):
    path = make_clip(handle.folder, form="mpeg2_mp3", size=(120, 200), frames=40)
    media = handle(path.name, codec=codec, max_side=100, decode=True)["media"]
    assert (media["height"], media["width"], media["frame_count"]) == (60, 100, 40) and media["audio_in_video"]
    stored = handle.out / media["path"]
    with av.open(str(stored)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.codec.canonical_name == codec and not container.streams.audio
        assert (stream.codec_context.colorspace, stream.codec_context.color_primaries) == (6, 6) or codec == "vp9"
        keys = [i for i, packet in enumerate(p for p in container.demux(stream) if p.size) if packet.is_keyframe]
    assert np.diff(keys).max() <= 8  # a second
    old, new = (decode_frames(p, np.array([0, 20, 39]), "pyav") for p in (path, stored))
    for before, after in zip(old, new, strict=True):
        small = np.asarray(Image.fromarray(before).resize((100, 60), Image.Resampling.BICUBIC), np.int16)
        assert np.abs(small - after).mean() < 6


def test_encoding_anew_keeps_varying_times_and_turns_upright(handle):
    times = [0, 100, 200, 300, 900, 1000, 2000, 2050]
    path = make_clip(handle.folder, form="vp9_opus", frames=len(times), pts=times, sound=0)
    assert handle(path.name, codec="h264")["media"]["pts"] == [t / 1000 for t in times]
    path = turned(handle.folder)
    media = handle(path.name, codec="h264")["media"]
    assert (media["height"], media["width"]) == (112, 84)
    with av.open(str(path)) as container:
        before = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    after = decode_frames(handle.out / media["path"], np.array([0]), "pyav")[0].astype(int)
    assert np.abs(np.rot90(before, -1) - after).mean() < 6  # the matrix turns clockwise


@pytest.mark.parametrize("matrix", TURNS)
def test_clips_that_need_it_are_shown_upright_with_square_pixels(handle, matrix):
    path = write_film(handle.folder / "a.mp4", matrix=matrix, aspect=Fraction(2), cover="attached")
    card = handle(path.name)
    assert card["refused"] in ("rotated", "mirrored", "anamorphic") and "transcode=needed" in card["detail"]
    shutil.rmtree(handle.out / "media")
    media = handle(path.name, codec="needed")["media"]
    wide = np.repeat(corners(), 2, axis=1)  # pixels are twice as wide as high
    wanted = upright_by_hand(wide, matrix).astype(int)
    assert (media["height"], media["width"], media["frame_count"]) == (*wanted.shape[:2], 12)
    assert np.abs(decode_frames(handle.out / media["path"], np.array([5]))[0] - wanted).mean() < 12


def test_clips_that_are_plain_are_not_encoded_anew_where_needed(handle):
    plain, odd = make_clip(handle.folder), make_clip(handle.folder, "odd", form="mpeg2_mp3")
    media = handle(plain.name, codec="needed")["media"]
    assert (handle.out / media["path"]).read_bytes() == plain.read_bytes()
    media = handle(odd.name, codec="needed")["media"]  # DALI doesn't know MPEG-2
    assert media["path"].endswith(".mp4") and media["frame_count"] == 24


def test_no_matrix_that_encoding_cannot_undo_passes(handle):
    write_film(handle.folder / "a.mp4", matrix=(0.8, 0.6, -0.6, 0.8))
    for codec in ("none", "needed", "h264"):
        card = handle("a.mp4", codec=codec)
        assert card["refused"] == "rotated" and "turned by 37 degrees or sheared" in card["detail"]
        shutil.rmtree(handle.out / "media")


def test_a_clip_that_was_trimmed_in_place_is_whole(handle):
    """Phones shorten the edit list and leave the frames; a file that is cut after that is still found out."""
    path = make_clip(handle.folder, frames=48, options=GOP)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst")
    while place >= 0:
        length = int.from_bytes(data[place + 12 : place + 16], "big")
        data[place + 12 : place + 16] = (length // 2).to_bytes(4, "big")
        place = data.find(b"elst", place + 1)
    path.write_bytes(data)
    media = handle(path.name)["media"]
    assert media["frame_count"] == 24 and abs(media["audio_samples"] - 48_000) < 1_200
    assert len(decode_frames(handle.out / media["path"], np.arange(24))) == 24


def test_appending_to_the_input_leaves_what_is_stored(handle):
    for path, kind in ((make_clip(handle.folder), "video"), (make_audio(handle.folder / "a.flac"), "audio")):
        stored = handle.out / handle(path.name, kind)["media"]["path"]
        content = stored.read_bytes()
        with open(path, "ab") as file:
            file.write(b"more")
        assert stored.read_bytes() == content


def test_a_file_that_grows_while_it_is_read_stops_the_work(handle, monkeypatch):
    path = make_clip(handle.folder)

    def slow(*args, **options):
        with open(path, "ab") as file:
            file.write(b"more")
        return measure_video(*args, **options)

    monkeypatch.setattr(stores.measure, "measure_video", slow)
    with pytest.raises(OSError, match="was changed while it was read; the same command reads it again"):
        handle(path.name)
    monkeypatch.undo()
    assert handle(path.name)["media"]["frame_count"] == 24


def test_silent_tracks_are_named_and_cancelled_ones_refused(handle):
    silent, opposite = np.zeros((2, 32_000), np.float32), np.stack([tone(2.0), -tone(2.0)])
    film = np.arange(20) / 10
    mux(handle.folder / "a.mkv", silent, codec="flac", film=film)
    mux(handle.folder / "b.mkv", opposite, codec="flac", film=film)
    assert handle("a.mkv")["facts"]["silent"] and handle("a.mkv", "audio")["facts"]["silent"]
    assert not handle(make_clip(handle.folder).name)["facts"]["silent"]
    for kind in ("video", "audio"):
        card = handle("b.mkv", kind)
        assert card["refused"] == "cancelled" and "keep one of its channels" in card["detail"]


def test_sound_lies_where_its_times_say(handle):
    """A hole in a clip's track, and a track of a second language in front of the default one."""
    times = [*np.arange(10) / 10, *(2.0 + np.arange(10) / 10)]
    path = mux(handle.folder / "a.mkv", tone(2.0), codec="pcm_s16le", times=times, film=np.arange(30) / 10)
    media = handle(path.name)["media"]
    wave = decode_audio(handle.out / media["audio_path"])
    assert media["audio_samples"] == len(wave) == pytest.approx(48_000, abs=32)
    assert not wave[16_100:31_900].any() and min(np.abs(w).max() for w in (wave[:16_000], wave[32_100:])) > 0.2
    mux(handle.folder / "b.mkv", tone(1.0, 300), tone(1.0, 900), codec="flac", film=np.arange(10) / 10, default=1)
    wave = decode_audio(handle.out / handle("b.mkv")["media"]["audio_path"])
    assert np.abs(np.fft.rfft(wave)).argmax() == pytest.approx(900, abs=2)


def test_only_tracks_that_no_decoder_knows_are_refused(handle):
    path = mux(handle.folder / "a.mkv", tone(1.0), codec="flac", film=np.arange(10) / 10)
    path.write_bytes(path.read_bytes().replace(b"A_FLAC", b"A_FLOC"))
    card = handle("a.mkv")
    assert card["refused"] == "codec" and "no decoder knows the codec of its sound" in card["detail"]


@pytest.mark.parametrize(("name", "kind", "options"), [
    ("clip.mp4", "video", {}), ("noise.wav", "audio", {}), ("noise.flac", "audio", {}), ("noise.png", "image", {}),
    ("clip.mp4", "video", {"codec": "h264"}), ("clip.mp4", "video", {"codec": "vp9"}), ("text.mp4", "video", {}),
])  # fmt: skip
def test_a_disk_without_room_is_not_blamed_on_the_medium(handle, tmp_path, name, kind, options):
    """Wherever the writing stops, the work stops, and the same call ends later as one that was not disturbed."""
    rng = np.random.default_rng(0)
    make_clip(handle.folder, "clip", size=(120, 160), options={"crf": "0"})
    soundfile.write(handle.folder / "noise.wav", rng.normal(0, 0.2, 32_000), 44_100)
    soundfile.write(handle.folder / "noise.flac", rng.normal(0, 0.2, 32_000), 16_000)
    Image.fromarray(rng.integers(0, 255, (120, 120, 3), dtype=np.uint8)).save(handle.folder / "noise.png")
    text(handle.folder)

    def tree(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    handle(name, kind, **options)
    wanted = tree(handle.out)
    shutil.rmtree(handle.out / "media")
    largest = max(map(len, wanted.values()))
    for size in {10, largest // 3, largest - 10}:
        with room_for(size), pytest.raises(OSError, match="File too large"):
            handle(name, kind, **options)
        assert not list(handle.out.rglob("*.json"))
    handle(name, kind, **options)
    assert tree(handle.out) == wanted


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_the_system(handle):
    path = make_audio(handle.folder / "a.wav")
    with pytest.raises(OSError, match="No space left") as full:
        extract_sound(path, Path("/dev/full"))
    assert full.value.errno == errno.ENOSPC


def test_sizes_are_even():
    assert bounded_size(1080, 1920, 1280) == (720, 1280) and bounded_size(85, 64, 1280) == (84, 64)
    assert bounded_size(3, 4000, 100) == (2, 100)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Peak memory of a shard and its merge, over ten times the rows, of which two thirds are refused."""
    script = """
import sys, resource, json
from pathlib import Path
from rich.console import Console
from data_tools.prepare.settings import parse
from data_tools.prepare.work import prepare
from tests.data_tools.clips import make_model, write_rows
folder, count = Path(sys.argv[1]), int(sys.argv[2])
text = "what moves ? " * 12
with open(folder / "rows.jsonl", "w") as file:
    for k in range(count):
        row = {"images": [f"none{k}.png"] if k % 3 == 0 else [], "problem": f"{text} {k}", "id": f"r{k}",
               "answer": "" if k % 3 == 1 else str(k), "unused": "x" * 30_000}
        file.write(json.dumps(row) + "\\n")
make_model(folder / "model")
prepare(*parse(["source=vision_r1_rl", f"input={folder}/rows.jsonl", f"out={folder}/out", f"model={folder}/model",
                "recipe=tiny_avatar", "data.mute=true", "processes=1"]), Console(quiet=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = []
    for count in (300, 3000):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", script, str(folder), str(count)], capture_output=True, text=True,
                              check=True, cwd=Path(__file__).parents[2])  # fmt: skip
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 8, peaks  # MiB; 3,000 rows hold 90 MiB of text
