"""Lengths of MP3 and Ogg files, by walking their frames or pages: headers may lack the length, or have a part's.

libsndfile trusts the first frame of an MP3: without a "Xing" header it guesses from the bit rate, and of two joined
files it sees the first. Here the frames are counted, and a header with their number is put before them.
"""

import io
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

KBPS = {  # (MPEG 1, layer): bit rates by their index from 1 on; ISO 11172-3, table 2.4.2.3, and 13818-3
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBPS[False, 3] = KBPS[False, 2]
PEEK = 48  # bytes of a frame that hold its header and the mark of a Xing header
SEARCHED = 1 << 16  # bytes read at a time in the search for a frame


@dataclass(frozen=True)
class Frame:
    """The header of an MPEG audio frame."""

    raw: bytes  # its first PEEK bytes
    size: int  # bytes
    samples: int
    rate: int  # Hz
    layer: int
    mark: int  # byte at which a Xing header has its mark
    mono: bool

    @property
    def is_header(self) -> bool:
        """Whether it holds a header about the stream instead of sound."""
        return self.raw[self.mark : self.mark + 4] in (b"Xing", b"Info") or self.raw[36:40] == b"VBRI"

    def is_like(self, other: "Frame") -> bool:
        """Whether both can belong to one stream."""
        return (self.rate, self.layer, self.mono) == (other.rate, other.layer, other.mono)


@dataclass(frozen=True)
class Mpeg:
    """Statistics of the frames of a file."""

    first: Frame  # the first with sound
    start: int  # byte at which it begins
    end: int  # byte after the last whole frame
    frames: int  # from `start` on
    announced: int | None  # frames according to the header of the file; None: it has none
    alike: bool  # whether rate and channels are the same in all frames

    @property
    def samples(self) -> int:
        """Samples of all frames."""
        return self.frames * self.first.samples

    @property
    def is_announced(self) -> bool:
        """Whether the header counts all frames; if it counts more, the file is truncated."""
        return self.announced is not None and self.frames <= self.announced + 1


def parse_frame(raw: bytes) -> Frame | None:
    """The header at the beginning of `raw`; None if there is none, or one without a size."""
    if len(raw) < 4 or raw[0] != 0xFF or raw[1] & 0xE0 != 0xE0:
        return None
    version, layer, kbps, rate = raw[1] >> 3 & 3, 4 - (raw[1] >> 1 & 3), raw[2] >> 4, raw[2] >> 2 & 3
    if version == 1 or layer == 4 or kbps in (0, 15) or rate == 3:
        return None
    first, padding, mono = version == 3, raw[2] >> 1 & 1, raw[3] >> 6 == 3
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = KBPS[first, layer][kbps - 1] * 1000
    samples = {1: 384, 2: 1152, 3: 1152 if first else 576}[layer]
    size = (12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding
    side = (17 if mono else 32) if first else (9 if mono else 17)  # bytes of layer 3 between header and mark
    return Frame(raw[:PEEK], size, samples, hertz, layer, 4 + side, mono)


@lru_cache(4096)
def walk_mpeg(path: Any, stamp: tuple[int, int]) -> Mpeg | None:
    """Count the frames of an MPEG audio file; None without frames of known size.

    path: a Path or an object with its methods; stamp: size and time of the last change, for the cache.
    """
    with path.open("rb") as file:
        size, position, frames, start, announced, alike, first = file.seek(0, io.SEEK_END), 0, 0, 0, None, True, None
        position = _next_frame(file, 0, first)
        while position is not None:
            file.seek(position)
            frame = parse_frame(file.read(PEEK))
            if frame is None or position + frame.size > size:
                found = None if frame else _next_frame(file, position, first)
                if found is None:
                    break
                position = found
                continue
            if first is None and frame.is_header:
                announced = _announced(frame)
            elif first is None:
                first, start, frames = frame, position, 1
            else:
                frames, alike = frames + 1, alike and frame.is_like(first)
            position += frame.size
            end = position
    return Mpeg(first, start, end, frames, announced, alike) if first else None


def _announced(frame: Frame) -> int | None:
    """The number of frames in a Xing header; None if it has none."""
    flags, frames = struct.unpack(">II", frame.raw[frame.mark + 4 : frame.mark + 12])
    return frames if flags & 1 and frame.raw[frame.mark : frame.mark + 4] in (b"Xing", b"Info") else None


def _next_frame(file: BinaryIO, position: int, like: Frame | None) -> int | None:
    """The next byte from `position` on at which a frame begins that is followed by another; None if there is none."""
    while True:
        file.seek(position)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        position += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + 10 * (head[5] >> 4 & 1)
    while True:
        file.seek(position)
        block = file.read(SEARCHED)
        at = block.find(b"\xff")
        while 0 <= at < len(block) - 3:
            frame = parse_frame(block[at : at + PEEK])
            if frame and (like is None or frame.is_like(like)):
                file.seek(position + at + frame.size)
                follows = file.read(PEEK)
                after = parse_frame(follows)
                if not follows or after and after.is_like(frame):
                    return position + at
            at = block.find(b"\xff", at + 1)
        if len(block) < SEARCHED:
            return None
        position += SEARCHED - 3


class Announced(io.RawIOBase):
    """A file of the frames of an MP3 behind a header with their number."""

    def __init__(self, file: BinaryIO, mpeg: Mpeg):
        self.file, self.start, self.position = file, mpeg.start, 0
        raw = bytearray(mpeg.first.raw[:4])
        raw[1], raw[2] = raw[1] | 1, 9 << 4 | raw[2] & 0x0C  # no checksum; 128 or 80 kbit/s, large enough for it
        header = parse_frame(bytes(raw))
        length = header.size + mpeg.end - mpeg.start
        xing = struct.pack(">4sIII", b"Xing", 3, mpeg.frames, length)
        self.head = (bytes(raw) + bytes(header.mark - 4) + xing).ljust(header.size, b"\0")
        self.length = length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def readinto(self, buffer: bytearray) -> int:
        if self.position < len(self.head):
            part = self.head[self.position : self.position + len(buffer)]
        else:
            self.file.seek(self.start + self.position - len(self.head))
            part = self.file.read(min(len(buffer), max(0, self.length - self.position)))
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # the mark of a stream and the header of its first block


@lru_cache(4096)
def holds_several(path: Any, stat: tuple[int, int]) -> bool:
    """Whether a WAV or FLAC file holds several sounds one behind the other; stat: its size and time of change."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            file.seek(8 + int.from_bytes(head[4:8], "little"))
            return re.match(rb"\0?RIFF....WAVE", file.read(13), re.DOTALL) is not None
        found, tail = 0, head
        while head[:4] == b"fLaC" and found < 2 and (block := file.read(1 << 20)):
            found += len(FLAC_START.findall(tail + block))
            tail = block[-7:]  # one byte less than a mark
    return found > 1


def check_ogg(path: Any) -> None:
    """Raise ValueError if an Ogg file ends within a page or holds several sounds one behind the other."""
    with path.open("rb") as file:
        size, position, begun, ended = file.seek(0, io.SEEK_END), 0, False, False
        while position < size:
            file.seek(position)
            head = file.read(27)
            if head[:4] != b"OggS":
                break
            table = file.read(head[26]) if len(head) == 27 else b""
            position += 27 + len(table) + sum(table)
            if len(head) < 27 or len(table) < head[26] or position > size:
                raise ValueError(f"{path}: truncated, it ends within a page of Ogg")
            if head[5] & 2 and begun:
                raise ValueError(
                    f"{path}: several sounds one behind the other, of which libsndfile would read the first: save each "
                    "in its own file, or all as one WAV or FLAC"
                )
            begun, ended = begun or not head[5] & 2, ended or bool(head[5] & 4)
        if not ended:
            raise ValueError(f"{path}: truncated, its last page of Ogg is missing")
