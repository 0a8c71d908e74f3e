"""Images with damaged metadata are read, and their orientation is applied if its own entry is intact."""

import io
import random
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flamingo_ft.data.media_resolver import lossless_bytes
from flamingo_ft.model.image_metadata import exif_orientation, split_metadata
from flamingo_ft.model.images import UNREADABLE, conversions, open_image, to_rgb

from .kinds_of_images import file_of

UPRIGHT = np.zeros((12, 8, 3), np.uint8)  # 8 wide, 12 high, another colour in each corner
UPRIGHT[..., 0], UPRIGHT[..., 1] = np.linspace(0, 255, 12)[:, None], np.linspace(0, 255, 8)
STORED = Image.fromarray(np.rot90(UPRIGHT))  # as a camera held sideways stores it
ORIENTATION = 6
BYTE, ASCII, SHORT, LONG, RATIONAL = 1, 2, 3, 4, 5


def exif(*entries: tuple[int, int, int, bytes], order: str = ">", data: bytes = b"") -> bytes:
    """A block with a directory of these entries (tag, type, count, four bytes), and ``data`` after it."""
    packed = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", len(entries)) + packed + bytes(4) + data


TURN = (0x0112, SHORT, 1, struct.pack(">HH", ORIENTATION, 0))
UNIT_AS_BYTE = (0x0128, BYTE, 1, b"\2\0\0\0")
RESOLUTION_AS_ASCII = (0x011A, ASCII, 4, b"72 \0")


def camera_exif() -> bytes:
    """A block as cameras write it, with resolution, maker, date and place."""
    block = Image.Exif()
    block.endian = ">"
    block.update(
        {0x0112: ORIENTATION, 0x0128: 2, 0x011A: 72.0, 0x011B: 72.0, 0x010F: "Maker", 0x0132: "2020:01:01"}
    )
    block.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    block.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return block.tobytes()


def jpeg(block: bytes, segments: bytes = b"") -> bytes:
    """STORED as a JPEG with a block of EXIF, valid or not."""
    plain = file_of(STORED, "JPEG", quality=95)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + segments + plain[2:]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """STORED as a PNG with chunks before its pixels."""
    plain = file_of(STORED, "PNG")
    return plain[:33] + b"".join(chunk(*one) for one in chunks) + plain[33:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def webp(block: bytes) -> bytes:
    return file_of(STORED, "WEBP", exif=block, lossless=True)


def png_with(block: bytes) -> bytes:
    return png((b"eXIf", block[6:]))


CONTAINERS = {"JPEG": jpeg, "PNG": png_with, "WEBP": webp}


def is_upright(image: Image.Image) -> bool:
    difference = np.abs(np.asarray(image).astype(int) - UPRIGHT) if image.size == (8, 12) else None
    return difference is not None and difference.mean() < 12  # JPEG is lossy


def mutations(block: bytes, count: int):
    """Blocks with some bytes changed, some of them cut short; deterministic."""
    dice = random.Random(0)
    for _ in range(count):
        changed = bytearray(block)
        for _ in range(dice.choice([1, 1, 2, 4, 8, 20])):
            at = dice.randrange(6, len(changed))
            changed[at] = dice.choice(
                [0, 1, 255, changed[at] ^ (1 << dice.randrange(8)), dice.randrange(256)]
            )
        yield bytes(changed[: dice.randrange(6, len(changed))] if dice.random() < 0.2 else changed)


@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_with_mutated_exif_are_read_and_an_intact_orientation_is_applied(form):
    block = camera_exif()
    entry = block.index(struct.pack(">HHI", 0x0112, SHORT, 1))
    # Byte order, start and length of the directory; the entry of the orientation.
    needed = [slice(6, 16), slice(entry, entry + 12)]
    intact = 0
    for mutated in mutations(block, 400):
        content = CONTAINERS[form](mutated)
        seen = open_image(content)
        if all(mutated[part] == block[part] for part in needed):
            intact += 1
            assert is_upright(seen)
        try:
            opened = Image.open(io.BytesIO(content))
        except UNREADABLE:  # by Pillow alone; `open_image` reads such a file without its metadata
            continue
        assert to_rgb(opened).tobytes() == seen.tobytes()
        assert open_image(lossless_bytes(opened)).tobytes() == seen.tobytes()
    assert intact > 100


DAMAGED = {
    "ResolutionUnit stored as BYTE": exif(TURN, UNIT_AS_BYTE),
    "XResolution stored as ASCII": exif(TURN, RESOLUTION_AS_ASCII),
    "XResolution of no values": exif(TURN, (0x011A, RATIONAL, 0, bytes(4)), (0x0128, SHORT, 1, b"\0\2\0\0")),
    "an entry count beyond the end": exif(TURN)[:14] + b"\xff\xff" + exif(TURN)[16:],
    "cut after the orientation": exif(TURN, UNIT_AS_BYTE)[:30],
    "a GPS directory beyond the end": exif(TURN, (0x8825, LONG, 1, b"\xff\xff\xff\xf0")),
    "a wrong magic number": exif(TURN).replace(b"MM\0*", b"MM\0\x07"),
    "a second prefix": b"Exif\0\0" + exif(TURN),
    "orientation stored as LONG": exif((0x0112, LONG, 1, struct.pack(">I", ORIENTATION))),
    "little-endian": exif((0x0112, SHORT, 1, struct.pack("<HH", ORIENTATION, 0)), UNIT_AS_BYTE, order="<"),
}
LOST = {
    "empty": b"Exif\0\0",
    "short": b"Exif\0\0MM\0",
    "garbage": b"Exif\0\0" + bytes(range(200)),
    "text": b"Exif\0\0not at all a directory",
    "orientation 9": exif((0x0112, SHORT, 1, b"\0\x09\0\0")),
    "orientation 0": exif((0x0112, SHORT, 1, bytes(4))),
    "orientation as text": exif((0x0112, ASCII, 2, b"6\0\0\0")),
    "a directory beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
}


@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("block", DAMAGED.values(), ids=DAMAGED)
def test_a_photo_with_damaged_exif_is_upright(form, block):
    assert is_upright(open_image(CONTAINERS[form](block)))


@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("block", LOST.values(), ids=LOST)
def test_a_photo_without_a_readable_orientation_is_read_as_stored(form, block):
    image = open_image(CONTAINERS[form](block))
    assert image.size == STORED.size and not is_upright(image)


def test_only_damaged_metadata_is_reported():
    assert conversions(open_image(jpeg(camera_exif()))) == ("rotated",)
    assert conversions(open_image(jpeg(exif(TURN, UNIT_AS_BYTE)))) == ("rotated",)
    assert conversions(open_image(jpeg(LOST["garbage"]))) == ("damaged metadata",)
    assert conversions(open_image(jpeg(Image.Exif().tobytes()))) == ()


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HARMFUL = {
    "a PNG with a broken ICC profile": png((b"iCCP", b"name\0\0garbage")),
    "a PNG with an ICC profile without an end": png((b"iCCP", b"name")),
    "a PNG with a large ICC profile": png((b"iCCP", b"name\0\0" + zlib.compress(bytes(3 << 20)))),
    "a PNG with large text": png((b"zTXt", b"key\0\0" + zlib.compress(bytes(3 << 20)))),
    "a PNG with broken international text": png((b"iTXt", b"XML:com.adobe.xmp\0\1\7")),
    "a PNG with short metadata": png((b"pHYs", b"\0"), (b"gAMA", b""), (b"cHRM", b"\0"), (b"sRGB", b"")),
    "a PNG with a wrong checksum of metadata": re.sub(
        rb"(tEXtkey.value).{4}", rb"\1????", png((b"tEXt", b"key\0value"))
    ),
    "a JPEG with a broken ICC profile": jpeg(b"Exif\0\0", b"\xff\xe2\0\x12ICC_PROFILE\0\7\7"),
    "a JPEG with a broken multi-picture index": jpeg(b"Exif\0\0", b"\xff\xe2\0\x0cMPF\0MM\0*\0\0"),
    "a JPEG with broken Photoshop resources": jpeg(b"Exif\0\0", b"\xff\xed\0\x18Photoshop 3.0\08BIM\7\7\7"),
    "a WebP with broken ICC and XMP": file_of(
        STORED, "WEBP", lossless=True, icc_profile=b"icc", xmp=b"\xff<x"
    ),
}


@pytest.mark.parametrize("content", HARMFUL.values(), ids=HARMFUL)
def test_images_with_other_damaged_metadata_are_read(content):
    assert open_image(content).size == STORED.size


XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0" + XMP
ORIENTED = {
    "EXIF beside a broken profile": png((b"iCCP", b"name"), (b"eXIf", exif(TURN)[6:])),
    "EXIF beside a broken index": jpeg(exif(TURN), b"\xff\xe2\0\x0cMPF\0MM\0*\0\0"),
    "XMP": jpeg(XMP_SEGMENT),
    "XMP beside garbage EXIF": jpeg(
        LOST["garbage"], b"\xff\xe1" + struct.pack(">H", len(XMP_SEGMENT) + 2) + XMP_SEGMENT
    ),
    "XMP in PNG beside a broken profile": png(
        (b"iCCP", b"name"), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    ),
}


@pytest.mark.parametrize("content", ORIENTED.values(), ids=ORIENTED)
def test_an_orientation_beside_damaged_metadata_is_applied(content):
    assert is_upright(open_image(content))


TIFF_DAMAGE = {
    "ResolutionUnit stored as BYTE": (296, BYTE, 1, b"\2\0\0\0"),
    "XResolution stored as ASCII": (282, ASCII, 4, b"72 \0"),
    "XMP stored as SHORT": (700, SHORT, 2, b"\0\1\0\2"),
    "XMP stored as text": (700, ASCII, 4, b"xmp\0"),
    "a profile beyond the end": (34675, 7, 99999, b"\0\xff\xff\xff"),
    "a directory beyond the end": (34665, LONG, 1, b"\0\xff\xff\xff"),
}


def tiff(entry: tuple, orientation: int | None, compression: str) -> bytes:
    """STORED as a TIFF whose directory, moved to the end of the file, has one more entry."""
    turned = Image.Exif()
    if orientation:
        turned[0x0112] = orientation
    content = file_of(STORED, "TIFF", compression=compression, exif=turned)
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    entries.append(struct.pack(f"{order}HHI", *entry[:3]) + entry[3])
    tag_of = lambda one: struct.unpack_from(f"{order}H", one)[0]  # noqa: E731
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(sorted(entries, key=tag_of)) + bytes(4)
    return content[:4] + struct.pack(f"{order}I", len(content)) + content[8:] + directory


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("entry", TIFF_DAMAGE.values(), ids=TIFF_DAMAGE)
def test_a_tiff_with_damaged_metadata_is_read_and_upright(entry, compression):
    assert open_image(tiff(entry, None, compression)).size == STORED.size
    assert is_upright(open_image(tiff(entry, ORIENTATION, compression)))


def test_an_avif_with_garbage_for_exif_is_read():
    content = file_of(STORED, "AVIF", exif=exif(UNIT_AS_BYTE), quality=100)
    assert content.count(b"MM\0*") == 1
    image = open_image(content.replace(b"MM\0*", b"????"))
    assert image.size == STORED.size and conversions(image) == ("damaged metadata",)


def test_removing_metadata_keeps_the_pixels():
    described = tiff((270, ASCII, 2, b"x\0\0\0"), None, "raw")
    for content in (jpeg(camera_exif()), png_with(camera_exif()), webp(camera_exif()), described):
        bare, _ = split_metadata(content)
        assert len(bare) <= len(content)
        with Image.open(io.BytesIO(bare)) as image, Image.open(io.BytesIO(content)) as whole:
            assert image.tobytes() == whole.tobytes() and not image.info.get("exif")
    assert split_metadata(b"GIF89a") is None


@pytest.mark.parametrize("length", range(0, len(exif(TURN)) + 1, 3))
def test_a_truncated_block_has_its_orientation_if_the_entry_is_complete(length):
    assert exif_orientation(exif(TURN)[:length]) == (ORIENTATION if length >= 28 else None)
