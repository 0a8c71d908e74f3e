"""Read and remove the metadata of image files: EXIF written by cameras and editors is often damaged.

Pillow needs intact EXIF to turn an image upright and, in some formats, to open it at all. Here the
orientation is read from whatever is left of the metadata, and files are rewritten without metadata, their
pixels unchanged.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ORIENTATION = 0x0112
# Exceptions that Pillow's EXIF reader has been seen to raise.
METADATA_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    LookupError,
    struct.error,
)
_EXIF_PREFIX = re.compile(rb"\A(?:Exif\x00\x00){1,2}")
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # TIFF's types BYTE, SHORT and LONG

_PNG, _JPEG, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*")
_HEAD_BYTES = 32
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_METADATA = {
    *range(0xE1, 0xEE),
    0xEF,
    0xFE,
}  # APP1..APP13, APP15, COM; APP0 and APP14 define the colours
# Tags that the pixels depend on; all others of a TIFF file are metadata.
_TIFF_PIXELS = {254, 256, 257, 258, 259, 262, 266, 273, ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320}
_TIFF_PIXELS |= {322, 323, 324, 325, 332, 334, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}


def stored_orientation(info: Mapping[Any, Any]) -> int | None:
    """Return the orientation (1..8) in a Pillow image's ``info``, from EXIF or else XMP, or None."""
    for name in ("exif", "Raw profile type exif"):
        block = info.get(name)
        block = _unhex(block) if isinstance(block, str) else block
        orientation = exif_orientation(block) if isinstance(block, bytes) else None
        if orientation is not None:
            return orientation
    texts = (info.get(name) for name in ("XML:com.adobe.xmp", "xmp"))
    contents = (text.encode("utf-8", "replace") if isinstance(text, str) else text for text in texts)
    matches = (_XMP_ORIENTATION.search(content) for content in contents if isinstance(content, bytes))
    return next((int(match[1]) for match in matches if match), None)


def exif_orientation(block: bytes) -> int | None:
    """Return the orientation (1..8) in an EXIF block; its entry must be intact, the rest may be damaged."""
    block = _EXIF_PREFIX.sub(b"", block)
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return None
    start = struct.unpack_from(f"{order}I", block, 4)[0]
    for tag, kind, count, value in _entries(block, order, start):
        if tag == ORIENTATION and kind in _INTEGERS and count == 1:
            number = struct.unpack_from(f"{order}{_INTEGERS[kind]}", value)[0]
            if 1 <= number <= 8:
                return number
    return None


def split_metadata(source: str | os.PathLike[str] | bytes) -> tuple[bytes, dict[str, Any]] | None:
    """Return an image file without its metadata, and its EXIF and XMP as in a Pillow image's ``info``.

    Returns None for formats that are not supported here.
    """
    split = _splitter(_head(source))
    if split is None:
        return None
    if isinstance(source, bytes):
        return split(source)
    with open(source, "rb") as file:
        return split(file.read())


def _head(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:_HEAD_BYTES]
    with open(source, "rb") as file:
        return file.read(_HEAD_BYTES)


def _splitter(head: bytes) -> Callable[[bytes], tuple[bytes, dict[str, Any]]] | None:
    if head.startswith(_JPEG):
        return _split_jpeg
    if head.startswith(_PNG):
        return _split_png
    if head.startswith(_TIFF):
        return _split_tiff
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _split_webp
    return _split_avif if head[4:12] in (b"ftypavif", b"ftypavis") else None


def _unhex(text: str) -> bytes | None:
    """Decode EXIF that ImageMagick stored in a PNG: hexadecimal text below three header lines."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return None


def _entries(block: bytes, order: str, start: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, count and the four value bytes of each complete entry of a TIFF directory."""
    if start + 2 > len(block):
        return
    count = struct.unpack_from(f"{order}H", block, start)[0]
    for at in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", block, at)
        yield tag, kind, number, block[at + 8 : at + 12]


def _split_jpeg(content: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [content[:2]], {}, 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        if content[at + 1] == 0xFF:  # fill bytes may stand before a marker
            at += 1
            continue
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        segment = content[at:end]
        if content[at + 1] not in _JPEG_METADATA:
            kept.append(segment)
        elif segment[4:].startswith(b"Exif\0\0"):
            info["exif"] = info.get("exif", b"") + segment[4 if "exif" not in info else 10 :]
        elif segment[4:].startswith(_JPEG_XMP):
            info["xmp"] = segment[4 + len(_JPEG_XMP) :]
        at = end
    return b"".join([*kept, content[at:]]), info


def _split_png(content: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [content[:8]], {}, 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if kind[:1].isupper() or kind == b"tRNS":  # critical chunks, and the one that colours depend on
            kept.append(content[at:end])
        elif kind == b"eXIf":
            info["exif"] = content[at + 8 : end - 4]
        elif kind == b"iTXt" and b"XML:com.adobe.xmp" in content[at + 8 : at + 32]:
            info["xmp"] = content[at + 8 : end - 4]
        at = end
    return b"".join(kept), info


def _split_webp(content: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [], {}, 12
    names = {b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc_profile"}
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        end = at + 8 + length + length % 2
        chunk = content[at:end]
        if kind in names:
            info[names[kind]] = chunk[8 : 8 + length]
        elif kind == b"VP8X" and len(chunk) > 8:
            kept.append(chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:])  # flags of ICC, EXIF and XMP
        else:
            kept.append(chunk)
        at = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, info


def _split_avif(content: bytes) -> tuple[bytes, dict[str, Any]]:
    """Give metadata items a type that no decoder knows; AVIF's orientation is not metadata, and stays."""
    bare = re.sub(rb"(infe[\x02\x03]\0\0.(?:..|....)\0\0)(?:Exif|mime)", rb"\1free", content, flags=re.DOTALL)
    return bare, {}


def _split_tiff(content: bytes) -> tuple[bytes, dict[str, Any]]:
    """Rewrite the first directory in place, with only the entries that the pixels depend on."""
    order = "<" if content[:2] == b"II" else ">"
    start = struct.unpack_from(f"{order}I", content, 4)[0]
    count = struct.unpack_from(f"{order}H", content, start)[0]
    entries = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:start] + directory + content[start + len(directory) :], {}
