"""How long an MP3 or Ogg file is: its frames or pages are walked, as headers may not tell, or tell of a part alone.

libsndfile believes the first frame of an MP3: without a "Xing" header it guesses from the bit rate, and of two files
that were joined it sees the first. Here the frames are counted, and a header that tells their number goes before them.
"""

import io
import struct
from dataclasses import dataclass
from functools import lru_cache

KBPS = {  # (MPEG 1, layer): bit rates by their index from 1 on; ISO 11172-3, table 2.4.2.3, and 13818-3
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBPS[False, 3] = KBPS[False, 2]
PEEK = 48  # bytes of a frame, in which its header and the mark of a Xing header are
SEARCHED = 1 << 16  # bytes at a time, where a frame is looked for


@dataclass(frozen=True)
class Frame:
    """The header of an MPEG audio frame."""

    raw: bytes  # its first PEEK bytes
    size: int  # bytes
    samples: int
    rate: int  # Hz
    layer: int
    mark: int  # where the Xing header would say so
    mono: bool

    @property
    def tells(self) -> bool:
        """Whether it holds no sound but a header about the stream."""
        return self.raw[self.mark : self.mark + 4] in (b"Xing", b"Info") or self.raw[36:40] == b"VBRI"

    def is_like(self, other: "Frame") -> bool:
        """Whether both can belong to one stream."""
        return (self.rate, self.layer, self.mono) == (other.rate, other.layer, other.mono)


@dataclass(frozen=True)
class Mpeg:
    """What the frames of a file say."""

    first: Frame  # with sound
    start: int  # byte, of it
    end: int  # byte, behind the last whole frame
    frames: int  # behind `start`
    announced: int | None  # frames, by the header of the file; None: it has none
    alike: bool  # rate and channels are the same throughout

    @property
    def samples(self) -> int:
        return self.frames * self.first.samples

    @property
    def is_announced(self) -> bool:
        """Whether the header tells of all frames; of one that tells of more, the file was cut."""
        return self.announced is not None and self.frames <= self.announced + 1


def parse_frame(raw: bytes) -> Frame | None:
    """The header at the beginning of some bytes; None if there is none, or one that does not tell its size."""
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
def walk_mpeg(path, stamp) -> Mpeg | None:
    """Count the frames of an MPEG audio file; None if it has none that tell their size. stamp: of its last change."""
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
            if first is None and frame.tells:
                announced = _announced(frame)
            elif first is None:
                first, start, frames = frame, position, 1
            else:
                frames, alike = frames + 1, alike and frame.is_like(first)
            position += frame.size
            end = position
    return Mpeg(first, start, end, frames, announced, alike) if first else None


def _announced(frame):
    """Frames that a Xing header tells of, None if it does not."""
    flags, frames = struct.unpack(">II", frame.raw[frame.mark + 4 : frame.mark + 12])
    return frames if flags & 1 and frame.raw[frame.mark : frame.mark + 4] in (b"Xing", b"Info") else None


def _next_frame(file, position, like):
    """Where from `position` on a frame begins that another one follows, tags passed over; None if nowhere."""
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
    """The frames of an MP3 behind a header that tells their number, as a file."""

    def __init__(self, file, mpeg: Mpeg):
        self.file, self.start, self.position = file, mpeg.start, 0
        raw = bytearray(mpeg.first.raw[:4])
        raw[1], raw[2] = raw[1] | 1, 9 << 4 | raw[2] & 0x0C  # no checksum; 128 or 80 kbit/s, which have the room
        header = parse_frame(bytes(raw))
        length = header.size + mpeg.end - mpeg.start
        told = struct.pack(">4sIII", b"Xing", 3, mpeg.frames, length)
        self.head = (bytes(raw) + bytes(header.mark - 4) + told).ljust(header.size, b"\0")
        self.length = length

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def readinto(self, buffer):
        if self.position < len(self.head):
            part = self.head[self.position : self.position + len(buffer)]
        else:
            self.file.seek(self.start + self.position - len(self.head))
            part = self.file.read(min(len(buffer), max(0, self.length - self.position)))
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def check_ogg(path) -> None:
    """Raise ValueError if an Ogg file ends within a page, or if another sound begins behind the first one."""
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
                raise ValueError(f"{path}: several sounds one behind the other, of which libsndfile would read the "
                                 "first: save them as files of their own, or as one WAV or FLAC")  # fmt: skip
            begun, ended = begun or not head[5] & 2, ended or bool(head[5] & 4)
        if not ended:
            raise ValueError(f"{path}: truncated, its last page of Ogg is missing")
