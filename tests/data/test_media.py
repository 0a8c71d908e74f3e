"""Images and videos of every kind become upright RGB, and what must not be opened is refused."""

import base64
import http.server
import io
import socket
import struct
import sys
import threading
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from flamingo_ft.data import open_medium
from flamingo_ft.data.media import open_image
from flamingo_ft.data.media_resolver import MediaResolver, lossless_bytes
from flamingo_ft.data.sample import Video
from flamingo_ft.errors import UserError
from flamingo_ft.model import download, images
from flamingo_ft.model.images import read_image

from .fixtures import FACTS, SCANS

SCAN = SCANS / FACTS[0][0]


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(content: bytes) -> np.ndarray:
    (image,) = open_medium(content, "row 0")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refused(medium, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_medium(medium, "x.jsonl: row 0: images[0]", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def photo() -> Image.Image:
    """Return a real scan, enlarged, with a color gradient over it."""
    grey = np.asarray(Image.open(SCAN).convert("L").resize((48, 32))).astype(int)
    ramp = np.linspace(0, 255, 48).astype(int)[None, :].repeat(32, 0)
    return Image.fromarray(np.stack([grey, ramp, 255 - grey], -1).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_every_file_format_gives_the_same_pixels(form):
    tolerance = {"JPEG": 8, "WEBP": 8, "GIF": 12}.get(form, 0)
    shown = opened(file_of(photo(), form))
    assert np.abs(shown - np.asarray(photo()).astype(int)).mean() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_is_converted_to_its_rgb_colors(mode):
    image = photo().convert(mode)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    tolerance = 4 if form == "JPEG" else 0
    shown = opened(file_of(image, form, **({"quality": 98, "subsampling": 0} if form == "JPEG" else {})))
    assert np.abs(shown - np.asarray(image.convert("RGB")).astype(int)).mean() <= tolerance


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    shown = opened(file_of(Image.fromarray(grey), form))
    assert np.abs(shown[..., 0].ravel() - np.arange(256)).max() <= 1
    dark = opened(file_of(Image.fromarray(grey // 256), form))
    assert dark.max() == 1


def test_float_pixels_are_scaled_by_their_range():
    for top in (1, 255, 65535):
        values = np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)
        shown = opened(file_of(Image.fromarray(values), "TIFF"))
        assert np.abs(shown[..., 0].ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    options = {}
    if mode == "palette":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.putpixel((0, 0), 1)
    elif mode == "LA":
        image = image.convert("LA")
    shown = opened(file_of(image, "PNG", **options))
    assert (shown[0, 0] == 0).all() and shown.sum() == 15 * 3 * 255


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_are_rotated_by_their_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = photo().transpose(turned[orientation])
    shown = opened(file_of(stored, form, exif=exif))
    assert shown.shape == (32, 48, 3) and np.abs(shown - np.asarray(photo()).astype(int)).mean() < 8


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if form == "WEBP" else {}
    shown = opened(file_of(first, form, save_all=True, append_images=[second], **options))
    assert (shown == [255, 0, 0]).all()


def pillow_image(mode: str) -> Image.Image:
    if mode == "I;16B":
        return Image.frombytes(mode, (48, 32), np.arange(48 * 32, dtype=">u2").tobytes())
    if mode == "LAB":
        return Image.frombytes(mode, (48, 32), photo().tobytes())
    if mode == "I":
        return Image.fromarray(np.arange(48 * 32, dtype=np.int32).reshape(32, 48) * 100_000)
    return (photo().convert("L") if mode in ("I;16", "F", "PA") else photo()).convert(mode)


MODES = ("RGB", "RGBA", "L", "P", "CMYK", "I;16", "F", "1", "LA", "I", "I;16B", "PA", "LAB")


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_is_encoded_without_loss(mode):
    image = pillow_image(mode)
    content = MediaResolver(None, False).image(image, "row 0: image")
    kept = Image.open(io.BytesIO(content))
    assert kept.mode == image.mode and kept.tobytes() == image.tobytes()
    assert content == lossless_bytes(image)


@pytest.mark.parametrize("mode", (*MODES, "YCbCr"))
def test_a_pillow_image_in_a_row_keeps_its_orientation_and_its_transparency(mode):
    image = pillow_image(mode)
    image.getexif()[0x0112] = 6
    if mode in ("L", "P", "1", "I;16"):
        image.info["transparency"] = 1
    seen = images.open_image(lossless_bytes(image))
    assert seen.size == (32, 48) and seen.tobytes() == images.to_rgb(image).tobytes()


def test_a_palette_with_alpha_is_kept():
    image = Image.fromarray((np.arange(48 * 32) % 16).astype(np.uint8).reshape(32, 48))
    table = np.random.default_rng(0).integers(0, 256, (16, 4), dtype=np.uint8)
    image.putpalette(table.tobytes(), "RGBA")
    colours, alpha = table[np.asarray(image)][..., :3], table[np.asarray(image)][..., 3:] / 255
    seen = images.open_image(lossless_bytes(image))
    assert np.abs(np.asarray(seen) - (colours * alpha + 255 * (1 - alpha))).max() <= 1
    assert seen.tobytes() == images.to_rgb(image).tobytes() and "transparent" in images.conversions(seen)


def test_a_pillow_image_of_a_truncated_file_is_refused_in_one_line():
    cut = Image.open(io.BytesIO(file_of(photo(), "JPEG")[:-200]))
    with pytest.raises(UserError, match=r"row 0: image: not a readable image \(.*truncated"):
        MediaResolver(None, False).image(cut, "row 0: image")


def test_a_pillow_image_with_invalid_metadata_is_encoded():
    image = photo()
    image.info |= {"exif": b"Exif\0\0garbage", "icc_profile": "text", "dpi": "high"}
    assert images.open_image(lossless_bytes(image)).tobytes() == photo().tobytes()


BROKEN = {
    "an empty file": (b"", "an empty file"),
    "text": (b"not an image", "of no known image format"),
    "a truncated JPEG": (file_of(photo(), "JPEG")[:-200], "truncated"),
    "a truncated PNG": (file_of(photo(), "PNG")[:200], "truncated"),
    "a JPEG's head alone": (file_of(photo(), "JPEG")[:30], ""),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "of no known image format"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_refused_in_one_line(tmp_path, content, reason):
    message = refused(content)
    assert (
        message.startswith("x.jsonl: row 0: images[0]: ")
        and reason in message
        and "not a readable image" in message
    )
    (tmp_path / "a.png").write_bytes(content)
    assert f"row 0: images[0]: {tmp_path / 'a.png'}: not a readable image" in refused(str(tmp_path / "a.png"))


def test_a_missing_file_and_a_folder_are_refused_as_images(tmp_path):
    for path, reason in [(tmp_path / "a.png", "no such file"), (tmp_path, "directory")]:
        with pytest.raises(UserError, match=reason):
            open_image(path)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few hundred bytes whose header claims an enormous size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    for size in [(12_000, 10_000), (60_000, 60_000)]:
        assert "pixels" in refused(bomb(*size))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/scan%20one.png": (200, SCAN.read_bytes()),
            "/scan.png": (200, SCAN.read_bytes()),
            "/big": (200, b"0" * 5000),
        }
        status, content = answers.get(self.path, (404, b""))
        targets = {
            "/moved": "/scan.png",
            "/file": SCAN.as_uri(),
            "/ftp": "ftp://127.0.0.1/x",
            "/loop": "/loop",
        }
        self.send_response(302 if self.path in targets else status)
        if self.path in targets:
            self.send_header("Location", targets[self.path])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.parametrize("path", ["/scan.png", "/moved", "/scan one.png", "/scan%20one.png"])
def test_an_image_is_fetched_from_its_url(server, path):
    (image,) = open_medium(server + path)
    assert (np.asarray(image) == np.asarray(Image.open(SCAN).convert("RGB"))).all()
    assert read_image(server + path).tobytes() == image.tobytes()  # as the processor fetches it


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/gone", "404"), ("/file", ""), ("/ftp", ""), ("/loop", ""), ("/big", "larger than 0 MiB")],
)
def test_a_failed_download_is_a_one_line_error(server, path, reason, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 4000)
    message = refused(server + path)
    assert f"cannot fetch {server + path}" in message and reason in message


PRIVATE = (
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.0.1 169.254.169.254 100.64.0.1 224.0.0.1 ::1 fe80::1%e0 fc00::1"
)


@pytest.mark.parametrize(
    "address", [*PRIVATE.split(), "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
)
def test_an_address_of_this_machine_or_a_private_network_is_not_public(address):
    with pytest.raises(ValueError, match="not a public address"):
        download._check_public(address)
    download._check_public("8.8.8.8")
    download._check_public("2606:4700:4700::1111")


def test_a_host_that_resolves_to_a_private_address_after_its_check_gets_no_request(server, monkeypatch):
    monkeypatch.setattr(download, "_check_name", lambda host, port: None)
    monkeypatch.setattr(Handler, "do_GET", lambda self: pytest.fail("a request was sent"))
    with pytest.raises(UserError, match="not a public address"):
        download.download(f"{server}/scan.png", "here", public_only=True)


def test_no_connection_is_made_to_a_private_address():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="not a public address"):
            download.download(f"http://127.0.0.1:{closed.getsockname()[1]}/a.png", "here", public_only=True)


@pytest.mark.parametrize("path", ["/scan.png", "/moved"])
def test_a_public_address_is_fetched_without_a_proxy_and_each_redirection_is_checked(
    server, path, monkeypatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not a public address"):
        download.download(server + path, "here", public_only=True)
    checked = []
    monkeypatch.setattr(download, "_check_public", checked.append)
    assert download.download(server + path, "here", public_only=True) == SCAN.read_bytes()
    assert checked == ["127.0.0.1"] * (4 if path == "/moved" else 2)


def test_a_server_that_does_not_answer_times_out(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in refused(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


def test_a_slow_download_is_stopped(server, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_SECONDS", -1.0)
    assert "slower than" in refused(f"{server}/scan.png")


def test_a_video_file_without_pyav_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "a video file needs PyAV; pip install av" in refused(Video(file=b"video"))


def video_of(frame: np.ndarray, form: str, codec: str, pixels: str) -> bytes:
    """Return a video of four times the same RGBA frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=4)
        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], pixels
        for _ in range(4):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels))
            )
        container.mux(stream.encode(None))
    return buffer.getvalue()


def half_transparent() -> np.ndarray:
    """Return a frame that is blue on the left, and fully transparent red on the right."""
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[:, :16], frame[:, 16:] = (0, 0, 255, 255), (255, 0, 0, 0)
    return frame


def test_transparent_frames_of_a_video_are_drawn_over_white():
    gif = io.BytesIO()
    frames = [Image.fromarray(half_transparent())] * 2
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], disposal=2)
    for content in (video_of(half_transparent(), "mov", "png", "rgba"), gif.getvalue()):
        for frame in open_medium(Video(file=content), video_frames=2):
            assert frame.getpixel((4, 9)) == (0, 0, 255) and frame.getpixel((28, 9)) == (255, 255, 255)
            assert "transparent" in images.conversions(frame)


def test_a_video_of_too_many_pixels_is_not_decoded(monkeypatch):
    content = video_of(half_transparent(), "mov", "png", "rgba")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert "not a readable video (32 x 32 pixels, the limit is" in refused(Video(file=content))


@pytest.mark.parametrize("content", [b"", b"not a video", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"])
def test_a_broken_video_is_refused_in_one_line(content):
    assert "images[0]" in refused(Video(file=content)) and "not a readable video" in refused(
        Video(file=content)
    )


def test_a_playlist_is_not_opened_as_a_video(tmp_path):
    """FFmpeg would open the files that a playlist names, wherever they are."""
    playlist = tmp_path / "x.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
    assert "not a readable video" in refused(Video(file=str(playlist)))


def test_base64_is_decoded_with_and_without_a_data_uri_header():
    content = SCAN.read_bytes()
    text = base64.b64encode(content).decode()
    for value in (
        text,
        f"data:image/png;base64,{text}",
        text[:80] + "\n" + text[80:],
        {"bytes": text},
        {"bytes": content},
    ):
        assert MediaResolver(None, False).image(value, "row 0: image") == content
