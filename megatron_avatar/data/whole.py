"""Whether a sound or a clip holds what its header, its pages or its index promise.

Decoders read to where a file ends and are content. What is checked here is what each form of file says about its own
length, so that a download that broke off is told from a short sound.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

import av

from megatron_avatar.data.container import MediaError

PIPED = 0x7FFF_0000  # a WAV written into a pipe states such a length or more (FFmpeg, SoX, arecord), or 0
SPARE_S = 0.25  # containers round their length, and count what a decoder leaves out at the end
MP3_KBITS = {  # of MPEG 1 and of 2 or 2.5, layer III, by the header's four bits
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def require_whole(path: Path) -> None:
    """MediaError for WAV, AVI, Matroska (WebM) and Ogg that break off, and Ogg that has lost a part; others pass."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"OggS":
        _check_pages(path)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        _check_segment(path)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        size, end = path.stat().st_size, 8 + int.from_bytes(head[4:8], "little")
        if size < end:
            raise _short(path, f"holds {size} of the {end} bytes in its header")
    elif head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:] == b"WAVE":
        _check_wav(path, "big" if head[:4] == b"RIFX" else "little")


def require_end(path: Path, container: av.container.InputContainer, stream: av.AudioStream, *, packets: int,
                samples: int, end: float, last: bytes) -> None:  # fmt: skip
    """MediaError for a track that was read to its end and held less than promised: `packets` packets, the last of which
    is `last`, `samples` samples, ending at `end` seconds."""
    form = container.format.name.split(",")[0]
    if form == "flac" and stream.duration and samples < stream.duration:
        raise _short(path, f"holds {samples} of the {stream.duration} samples in its header")
    if form == "mp3":
        _check_mp3(path, packets, last)
    if form == "mov" and packets < (indexed := len(stream.index_entries)):
        raise _short(path, f"its sound holds {packets} of the {indexed} packets in its index")
    if form in ("mov", "matroska", "flv", "asf") and len(container.streams) == 1:  # else it may be another's length
        promised = ((container.duration or 0) + min(0, container.start_time or 0)) / av.time_base
        if end < promised - SPARE_S:
            raise _short(path, f"its sound ends at {end:.2f} s of {promised:.2f} s")


def _short(path: Path, what: str) -> MediaError:
    return MediaError(path, what, kind="truncated")


def _check_wav(path: Path, order: str) -> None:
    """The length of the data chunk against what follows it."""
    size, long_data = path.stat().st_size, 0
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], order)  # type: ignore[arg-type]
            if head[:4] == b"ds64":
                long_data = int.from_bytes(file.read(16)[8:], "little")
                file.seek(-16, 1)
            if head[:4] == b"data":
                if length == 0xFFFF_FFFF and 0 < long_data < 2**62:
                    length, piped = long_data, False
                else:
                    piped = not 0 < length < PIPED
                found = size - file.tell()
                if found < length and not piped:
                    raise _short(path, f"holds {found} of the {length} bytes of sound in its header")
                return
            file.seek(length + length % 2, 1)


def _check_segment(path: Path) -> None:
    """The size of Matroska's one segment, behind the header; live recordings leave it open."""
    with open(path, "rb") as file:
        file.seek(4)
        header, _ = _ebml_size(file)
        file.seek(header, 1)
        if file.read(4) != b"\x18\x53\x80\x67":
            return
        length, known = _ebml_size(file)
        size, end = path.stat().st_size, file.tell() + length
    if known and size < end:
        raise _short(path, f"holds {size} of the {end} bytes in its header")


def _ebml_size(file: BinaryIO) -> tuple[int, bool]:
    """A number whose first byte's leading zeros tell its length, and whether it is one: all bits set mean unknown."""
    first = (file.read(1) or b"\0")[0]
    more = 8 - first.bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(bytes([first]) + file.read(more), "big") & (1 << bits) - 1
    return value, value != (1 << bits) - 1


def _check_pages(path: Path) -> None:
    """Every page's number and checksum, and that each stream's last page says so."""
    following: dict[bytes, int] = {}
    open_streams: set[bytes] = set()
    with open(path, "rb") as file:
        while head := file.read(27):
            if head[:4] != b"OggS" or len(head) < 27:
                if not open_streams:
                    return  # something appended behind the end, as tags are
                raise _short(path, "breaks off, or has lost a part, between two of its pages")
            sizes = file.read(head[26])
            body = file.read(sum(sizes))
            serial, number = head[14:18], int.from_bytes(head[18:22], "little")
            if len(sizes) < head[26] or len(body) < sum(sizes):
                raise _short(path, "breaks off within a page")
            if _checksum(head[:22] + bytes(4) + head[26:] + sizes + body) != int.from_bytes(head[22:26], "little"):
                raise MediaError(path, f"page {number} is damaged (its checksum is wrong)")
            if number != following.get(serial, number):
                raise MediaError(path, f"has lost what lies between its pages {following[serial] - 1} and {number}")
            following[serial] = number + 1
            (open_streams.discard if head[5] & 4 else open_streams.add)(serial)
    if open_streams:
        raise _short(path, "breaks off: its last page says that others follow")


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32, most significant bit first and from 0, by way of zlib's, which is its mirror image."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _check_mp3(path: Path, packets: int, last: bytes) -> None:
    """The count of frames in front of the first, where there is one, and the length that the last one states."""
    promised = _mp3_frames(path)
    if promised is not None and packets < promised - 1:  # some count the frame that holds the count
        raise _short(path, f"holds {packets} of the {promised} frames in its header")
    length = _mp3_length(last)
    if length is not None and len(last) < length:
        raise _short(path, f"its last frame holds {len(last)} of {length} bytes")


def _mp3_frames(path: Path) -> int | None:
    with open(path, "rb") as file:
        head = file.read(10)
        tags = 0
        if head[:3] == b"ID3":
            tags = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(tags)
        first = file.read(2048)
    for name in (b"Xing", b"Info"):
        place = first.find(name)
        if place >= 0 and first[place + 7 : place + 8] and first[place + 7] & 1:
            return int.from_bytes(first[place + 8 : place + 12], "big") or None
    place = first.find(b"VBRI")
    return int.from_bytes(first[place + 14 : place + 18], "big") or None if place >= 0 else None


def _mp3_length(frame: bytes) -> int | None:
    """Bytes of a frame of layer III by its header; None for other data."""
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:
        return None
    version, bits, rate = frame[1] >> 3 & 3, frame[2] >> 4, frame[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return None
    kbits = MP3_KBITS[version == 3][bits]
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * kbits * 1000 // hertz + (frame[2] >> 1 & 1)
