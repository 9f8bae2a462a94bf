"""Which packets of a video stream have to be decoded for some of its frames.

A frame's index is its place in order of time among the frames that a decoder hands out. Reading the packets without
decoding them tells times and key frames; a wanted frame then needs its packets from the key frame before it on, and an
unwanted frame that no other refers to needs nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import av

SEEKABLE = ("h264", "hevc", "vp9", "av1")  # key frames are where decoding may begin, and times are those of the frames
SKIPS_UNREFERRED = ("h264", "hevc")  # FFmpeg drops a frame that no other refers to without decoding it
HOLD_BYTES = 64 * 2**20  # packets of smaller files stay in memory between the two passes


class Untrusted(Exception):
    """The packets don't tell which frames they hold: decode all of them in turn."""


@dataclass
class Index:
    """Packets in order of decoding: times [n] by packet, the packets where decoding may begin, and times in order."""

    times: list[int]
    starts: list[int]
    order: list[int]
    packets: list[av.Packet] | None

    def frame(self, time: int) -> int:
        """The packet that holds the frame of a time."""
        return self._place[time]

    def __post_init__(self) -> None:
        self._place = {time: k for k, time in enumerate(self.times)}


def read_index(container: av.container.InputContainer, stream: av.VideoStream, size: int) -> Index:
    """Read all packets of the stream; `size` is the file's, in bytes. Raises Untrusted."""
    codec = stream.codec_context.codec
    name, hold = codec.canonical_name, size <= HOLD_BYTES
    if not (codec.intra_only or name in SEEKABLE):
        raise Untrusted(name)
    times: list[int] = []
    starts: list[int] = []
    packets: list[av.Packet] = []
    for packet in container.demux(stream):
        if packet.size == 0:  # the end
            continue
        if packet.pts is None or packet.is_discard or packet.is_corrupt:
            raise Untrusted("a packet without a time, or one that is decoded and not shown")
        if name == "vp9" and not _vp9_shown(packet):
            raise Untrusted("a hidden frame in a packet of its own")
        if packet.is_keyframe and (name != "h264" or _has_idr(packet, stream)):
            starts.append(len(times))
        times.append(packet.pts)
        if hold:
            packets.append(packet)
    if not times or starts[:1] != [0] or len(set(times)) < len(times):
        raise Untrusted("no key frame at the beginning, or a time twice")
    if codec.intra_only:
        starts = list(range(len(times)))
    return Index(times, starts, sorted(times), packets if hold else None)


def decode_chosen(
    container: av.container.InputContainer, stream: av.VideoStream, index: Index, wanted: list[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame index, frame) of each of `wanted`, rising, frame indices. Raises Untrusted where a frame does not come."""
    context = stream.codec_context
    skips = context.codec.canonical_name in SKIPS_UNREFERRED
    pending = {index.order[k]: k for k in wanted}
    runs = list(_runs(index, sorted(pending)))
    for first, last in runs:
        due = {time for time in pending if first <= index.frame(time) <= last and _start(index, time) == first}
        reader = _read(container, stream, index, first)
        context.flush_buffers()
        for place in range(first, last + 1):
            packet = next(reader, None)
            if packet is None or packet.pts != index.times[place]:
                raise Untrusted("a second reading gives other packets")
            if skips:
                context.skip_frame = "DEFAULT" if packet.pts in due else "NONREF"
            for frame in context.decode(packet):
                if frame.pts in due:
                    due.discard(frame.pts)
                    yield pending.pop(frame.pts), frame
            if not due:
                break
        for frame in context.decode(None) if due else ():
            if frame.pts in due:
                due.discard(frame.pts)
                yield pending.pop(frame.pts), frame
        if due:
            raise Untrusted("a frame did not come")


def _start(index: Index, time: int) -> int:
    """The last packet at or before a frame's own where decoding may begin, and whose own frame isn't later.

    A frame that is shown before the key frame which precedes it in the file refers to the group before that one.
    """
    k = bisect_right(index.starts, index.frame(time)) - 1
    while index.times[index.starts[k]] > time:
        k -= 1
        if k < 0:
            raise Untrusted("a frame before the first key frame")
    return index.starts[k]


def _runs(index: Index, times: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) packet of each stretch that has to be read, in order."""
    ends: dict[int, int] = {}
    for time in times:
        start = _start(index, time)
        ends[start] = max(ends.get(start, start), index.frame(time))
    yield from sorted(ends.items())


def _read(
    container: av.container.InputContainer, stream: av.VideoStream, index: Index, first: int
) -> Iterator[av.Packet]:
    """The stream's packets from number `first` on."""
    if index.packets is not None:
        yield from index.packets[first:]
        return
    container.seek(index.times[first], stream=stream, backward=True)
    reader = (packet for packet in container.demux(stream) if packet.size)
    for packet in reader:
        if packet.pts == index.times[first]:
            yield packet
            break
    yield from reader


def _vp9_shown(packet: av.Packet) -> bool:
    """Whether a VP9 packet shows a frame; a superframe, which carries hidden ones along, does."""
    data = memoryview(packet)
    head, profile = data[0], (data[0] >> 5 & 1) | (data[0] >> 4 & 1) << 1
    if data[-1] & 0xE0 == 0xC0 or profile == 3:
        return data[-1] & 0xE0 == 0xC0
    return bool(head & 0x08) or bool(head & 0x02)  # an existing frame again, or a frame that is shown


def _has_idr(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether an H.264 packet holds an IDR slice: after other key frames the picture may take a while to be right."""
    data, extra = memoryview(packet), stream.codec_context.extradata
    if extra and extra[0] == 1 and len(extra) > 4:  # lengths before the units, as in MP4 and Matroska
        width, place = (extra[4] & 3) + 1, 0
        while place + width < len(data):
            if data[place + width] & 0x1F == 5:
                return True
            place += width + int.from_bytes(data[place : place + width], "big")
        return False
    raw = bytes(data)
    place = raw.find(b"\x00\x00\x01")
    while 0 <= place < len(raw) - 3:
        if raw[place + 3] & 0x1F == 5:
            return True
        place = raw.find(b"\x00\x00\x01", place + 3)
    return False
