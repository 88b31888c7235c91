"""Whether a media file is cut off or has holes, by the sizes that its container states.

Decoders show the part of a cut-off file that is there and report nothing. These containers state
how long their parts are, so the check reads a few bytes a part and decodes nothing.
"""

import mmap
import os
from collections.abc import Callable
from typing import BinaryIO

_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")
_MP4_BOXES = {
    *(b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"meta"),
    *(b"pnot", b"PICT", b"styp", b"sidx", b"ssix", b"prft", b"emsg", b"udta", b"pdin", b"junk"),
}
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", 0x18538067
_MASTERS = {_SEGMENT: "segment", 0x1F43B675: "cluster"}
_FLV_TAGS = (8, 9, 18)
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_BROADCAST = 1  # flag: the sizes in the header were never filled in
_OGG_LAST_PAGE = 4
_TS_PACKET, _TS_SYNC = 188, 0x47
_PS_PACK, _PS_WINDOW = b"\0\0\1\xba", 1 << 18
_PS_HEADER = 8 + 6
"""Bytes of a pack header of MPEG-2: code and clock, then rate and length of the stuffing."""


def cut_off(path: str) -> str | None:
    """The missing part of a file; None for a whole file and for unknown containers."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(16)
        for fits, find in _CONTAINERS:
            if fits(head):
                file.seek(0)
                return find(file, size)
    return None


def _mp4(file: BinaryIO, size: int) -> str | None:
    position = 0
    kinds: list[bytes] = []
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        length = length or size - position  # 0: up to the end of the file
        if length < 8:
            break
        if kind not in _MP4_BOXES and b"moov" in kinds and {b"mdat", b"moof"} & set(kinds):
            break  # no box: something was appended to a whole file
        kinds.append(kind)
        position += length
        if position > size:
            name = kind.decode("latin-1")
            return f"its {name!r} box needs {position} bytes, the file has {size}"
    return None if b"moov" in kinds else "it has no index ('moov' box)"


def _matroska(file: BinaryIO, size: int) -> str | None:
    # Blocks are walked too: FFmpeg skips what it cannot read and goes on without those frames.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, ends = 0, [size]
        while position < ends[-1]:
            number, start = _ebml_number(data, position, keep_marker=True)
            length, start = _ebml_number(data, start)
            if number is None or length is None:
                return f"no element begins at byte {position} of {size}"
            if number in _MASTERS:
                # -1: a live stream never states the sizes of its segment and clusters.
                end = size if length < 0 else start + length
                if end > size:
                    return f"its {_MASTERS[number]} needs {end} bytes, the file has {size}"
                if number == _SEGMENT:  # what follows the segment is no part of the video
                    ends = [end]
                elif length >= 0:
                    ends.append(end)
                position = start
                continue
            position = size + 1 if length < 0 else start + length
            while len(ends) > 1 and position >= ends[-1]:
                if position > ends.pop():
                    return f"an element passes the end of its cluster, at byte {start} of {size}"
            if position > size:
                return f"an element needs more than the file's {size} bytes"
    return None


def _ebml_number(
    data: mmap.mmap, position: int, *, keep_marker: bool = False
) -> tuple[int | None, int]:
    """(a variable-length number, the place behind it); -1: unknown size; None: there is none."""
    if position >= len(data) or not data[position]:
        return None, position
    length = 8 - data[position].bit_length() + 1
    if position + length > len(data):
        return None, position
    value = int.from_bytes(data[position : position + length], "big")
    mask = (1 << 7 * length) - 1
    if not keep_marker:
        value = -1 if value & mask == mask else value & mask
    return value, position + length


def _riff(file: BinaryIO, size: int) -> str | None:
    position = 0
    while position + 8 <= size:  # OpenDML files hold one RIFF chunk a gigabyte
        file.seek(position)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or length == 0:  # 0: a recorder never came back to write it
            break
        position += 8 + length
        if position > size:
            return f"its RIFF chunk needs {position} bytes, the file has {size}"
        position += length % 2
    return None


def _asf(file: BinaryIO, size: int) -> str | None:
    header = file.read(min(size, 1 << 16))
    place = header.find(_ASF_PROPERTIES)
    if place < 0 or place + 104 > len(header):
        return "its header is incomplete"
    stated = int.from_bytes(header[place + 40 : place + 48], "little")
    flags = int.from_bytes(header[place + 88 : place + 92], "little")
    if not flags & _ASF_BROADCAST and stated > size:
        return f"its header says {stated} bytes, the file has {size}"
    return None


def _flv(file: BinaryIO, size: int) -> str | None:
    file.seek(5)
    position = int.from_bytes(file.read(4), "big") + 4
    while position < size:
        file.seek(position)
        header = file.read(11)
        if header[:1] and header[0] & 0x1F not in _FLV_TAGS:
            break  # damaged, or appended: left to the comparison with the stated length
        position += 11 + int.from_bytes(header[1:4], "big") + 4
        if len(header) < 11 or position > size:
            return f"its last tag needs {position} bytes, the file has {size}"
    return None


def _ogg(file: BinaryIO, size: int) -> str | None:
    position, open_streams = 0, set()
    while position < size:
        file.seek(position)
        header = file.read(27)
        if header[:4] != b"OggS":
            break  # damaged rather than cut off: left to the decoder
        lengths = file.read(header[26]) if len(header) == 27 else b""
        if len(header) < 27 or len(lengths) < header[26]:
            return f"it ends inside a page's header, after {position} of its {size} bytes"
        position += 27 + len(lengths) + sum(lengths)
        if position > size:
            return f"its last page needs {position} bytes, the file has {size}"
        serial = header[14:18]
        if header[5] & _OGG_LAST_PAGE:
            open_streams.discard(serial)
        else:
            open_streams.add(serial)
    return "its last page is missing" if open_streams else None


def _mpegts(file: BinaryIO, size: int) -> str | None:
    if left := size % _TS_PACKET:
        return f"it ends inside a packet, {left} of {_TS_PACKET} bytes"
    return None


def _mpegps(file: BinaryIO, size: int) -> str | None:
    # The end alone: a film has millions of packets. A pack header there may be a sound's bytes by
    # chance, but then no packets follow one another from it to the end.
    file.seek(max(size - _PS_WINDOW, 0))
    data = file.read()
    start = data.find(_PS_PACK)
    while start >= 0:
        missing = _ps_missing(data, start)
        if missing is not None:
            return f"its last packet lacks {missing} bytes" if missing else None
        start = data.find(_PS_PACK, start + 1)
    return None


def _ps_missing(data: bytes, at: int) -> int | None:
    """Bytes by which the last of the packets from `at` on leaves `data`; None where they are none.

    ISO 13818-1 2.5: a pack header (`_PS_HEADER` bytes and up to 7 of stuffing, 12 in MPEG-1),
    packets with their length in two bytes, an end code of four.
    """
    while data[at:].strip(b"\0"):  # zeros pad a whole file
        head = data[at : at + 6]
        if head[:3] != _PS_PACK[: len(head[:3])]:
            return None
        if head[3:4] == b"\xb9":
            at += 4
            continue
        if len(head) < 6:
            return 6 - len(head)
        if head[3] < 0xB9:
            return None
        if head[3] != _PS_PACK[3]:
            at += 6 + int.from_bytes(head[4:6], "big")
        elif head[4] >> 4 == 0b0010:
            at += 12
        elif head[4] >> 6 == 0b01:
            stuffing = at + _PS_HEADER - 1
            at += _PS_HEADER + (data[stuffing] & 7 if stuffing < len(data) else 0)
        else:
            return None
    return max(at - len(data), 0)


def _gif(file: BinaryIO, size: int) -> str | None:
    file.seek(max(size - 64, 0))
    # Some writers pad the file with zeros behind its trailer.
    return None if file.read().rstrip(b"\0").endswith(b";") else "its trailer is missing"


def _ivf(file: BinaryIO, size: int) -> str | None:
    file.seek(6)
    position = int.from_bytes(file.read(2), "little")
    while position < size:
        file.seek(position)
        header = file.read(12)
        position += 12 + int.from_bytes(header[:4], "little")
        if len(header) < 12 or position > size:
            return f"its last frame needs {position} bytes, the file has {size}"
    return None


def _is_mpegts(head: bytes) -> bool:
    return head[:1] == bytes([_TS_SYNC])


_Finder = Callable[[BinaryIO, int], str | None]
_CONTAINERS: tuple[tuple[Callable[[bytes], bool], _Finder], ...] = (
    (lambda head: head[4:8] in _MP4_STARTS, _mp4),
    (lambda head: head[:4] == _EBML, _matroska),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _riff),
    (lambda head: head == _ASF, _asf),
    (lambda head: head[:3] == b"FLV", _flv),
    (lambda head: head[:4] == b"OggS", _ogg),
    (lambda head: head[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda head: head[:4] == b"DKIF", _ivf),
    (lambda head: head[:4] == _PS_PACK, _mpegps),
    (_is_mpegts, _mpegts),
)
