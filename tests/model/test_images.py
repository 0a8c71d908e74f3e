"""The image reader: every kind of file, picture and array is read into the pixels that numpy computes."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flamingo_ft.data.collate import load_media
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.errors import UserError
from flamingo_ft.model import images
from flamingo_ft.model.images import UnreadableImage, conversions, open_image, to_rgb
from tests.data.dialogues import nano_processor

from .kinds_of_images import ALPHA, COLOURS, KINDS, RAMP, SIDE, SIXTEEN, file_of, over_white

LEVEL = 1  # of 255: two ways of rounding
FLOATS = RAMP.astype(np.float32)


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


def normalised(processor, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) in 0..255 of the tower's own size to what the tower takes, computed without any image
    library.
    """
    how = processor.image_processor.open_clip_preprocess
    return ((pixels / 255 - np.array(how["mean"])) / np.array(how["std"])).transpose(2, 0, 1)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_becomes_the_expected_pixels_and_says_what_was_done(name):
    kind = KINDS[name]
    image = open_image(kind.content)
    assert image.mode == "RGB" and image.size == (SIDE, SIDE)
    assert np.abs(np.asarray(image).astype(int) - kind.expected).max() <= LEVEL
    assert set(conversions(image)) == {*kind.conversions} <= {*images.CONVERSIONS}


@pytest.mark.parametrize("name", KINDS)
def test_training_and_the_processor_see_the_same_normalised_pixels(name, processor, tmp_path):
    kind = KINDS[name]
    path = tmp_path / "image"
    path.write_bytes(kind.content)
    opened = Image.open(io.BytesIO(kind.content))
    stored = MediaResolver(None, False).image(opened, "row 0: image")  # a Pillow image in a row
    text = base64.b64encode(kind.content).decode()
    seen = {
        **{
            f"training: {type(one).__name__}": trained_on(processor, one)
            for one in (str(path), kind.content, stored)
        },
        **{
            f"asked: {one}": asked_about(processor, one)
            for one in (path, str(path), f"data:image/png;base64,{text}")
        },
        "asked: bytes": asked_about(processor, kind.content),
        "asked: Pillow": asked_about(processor, Image.open(path)),
        "asked: base64": asked_about(processor, text),
        "image processor": processor.image_processor(Image.open(path))["pixel_values"][0],
        "transform": processor.image_processor.transform(Image.open(path)),
    }
    if kind.array is not None:
        seen["numpy"] = asked_about(processor, kind.array)
        seen["a list of numpy"] = processor.image_processor([kind.array])["pixel_values"][0]
        seen["torch"] = asked_about(processor, torch.from_numpy(kind.array.copy()))
    first = next(iter(seen.values()))
    expected = normalised(processor, kind.expected)
    step = 1 / 255 / min(processor.image_processor.open_clip_preprocess["std"])
    assert np.abs(first.numpy() - expected).max() <= LEVEL * step + 1e-5
    for how, pixels in seen.items():
        assert torch.equal(pixels, first), how


def trained_on(processor, image) -> torch.Tensor:
    return load_media(processor, [{"images": [image], "where": "row 0"}])["pixel_values"][0, 0]


def asked_about(processor, image) -> torch.Tensor:
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0, 0]


def test_the_images_of_a_chat_are_read_the_same_way(processor):
    for name in ("16-bit PNG", "RGBA"):
        image = Image.open(io.BytesIO(KINDS[name].content))
        messages = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}
        ]
        batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(batch["pixel_values"][0, 0], trained_on(processor, KINDS[name].content))


def premultiplied(mode: str) -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, ALPHA])).convert(mode)


IN_MEMORY = {
    "I;16B": (
        Image.frombytes("I;16B", (SIDE, SIDE), SIXTEEN.astype(">u2").tobytes()),
        SIXTEEN[..., None] / 257,
    ),
    "HSV": (Image.fromarray(COLOURS).convert("HSV"), COLOURS),
    "YCbCr": (Image.fromarray(COLOURS).convert("YCbCr"), COLOURS),
    "RGBa": (premultiplied("RGBa"), over_white(COLOURS, ALPHA)),
    "RGBX": (Image.frombytes("RGBX", (SIDE, SIDE), np.dstack([COLOURS, ALPHA]).tobytes()), COLOURS),
    "PA": (Image.fromarray(np.dstack([ALPHA // 8, ALPHA])), None),
    "LAB": (Image.frombytes("LAB", (SIDE, SIDE), COLOURS.tobytes()), None),
}


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_modes_that_only_exist_in_memory_are_read_and_kept_as_they_are_read(mode):
    image, expected = IN_MEMORY[mode]
    if mode == "PA":
        image = Image.frombytes("PA", image.size, image.tobytes())
        image.putpalette(COLOURS.tobytes()[:768])
    seen = np.asarray(to_rgb(image)).astype(int)
    if expected is not None:
        assert np.abs(seen - expected).max() <= (8 if mode in ("HSV", "YCbCr", "RGBa") else LEVEL)
    stored = open_image(MediaResolver(None, False).image(image, "row 0: image"))
    assert (np.asarray(stored) == seen).all()


def test_grey_with_premultiplied_alpha_is_read():
    la = Image.fromarray(np.dstack([ALPHA, ALPHA]))
    expected = np.asarray(to_rgb(la)).astype(int)
    assert np.abs(np.asarray(to_rgb(la.convert("La"))) - expected).max() <= 5


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "RGB", "CMYK"])
def test_the_callers_image_is_not_changed(mode, processor):
    image = Image.fromarray(SIXTEEN) if mode == "I;16" else Image.fromarray(COLOURS).convert(mode)
    image.info["dpi"] = (72, 72)
    image.getexif()[0x0112] = 6
    before = image.mode, image.tobytes(), dict(image.info), dict(image.getexif())
    for read in (
        to_rgb,
        processor.image_processor.transform,
        lambda one: MediaResolver(None, False).image(one, "row 0"),
    ):
        read(image)
        assert (image.mode, image.tobytes(), dict(image.info), dict(image.getexif())) == before
    assert to_rgb(image) is not image


def test_an_open_animation_stays_at_its_frame_and_keeps_what_was_painted_on_it():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    image = Image.open(io.BytesIO(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    image.load()
    image.putpixel((2, 3), (9, 9, 9))
    for _ in range(2):
        seen = to_rgb(image)
        assert (
            seen.getpixel((0, 0)) == (0, 255, 0) and seen.getpixel((2, 3)) == (9, 9, 9) and image.tell() == 1
        )


# Arrays


@pytest.mark.parametrize(
    "array",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        COLOURS.astype(np.int64),
        COLOURS.astype(np.uint16) * 257,
        COLOURS / 255,
        (COLOURS / 255).astype(np.float32).transpose(2, 0, 1),
        COLOURS.astype(np.float32),
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        torch.from_numpy(COLOURS),
        (torch.from_numpy(COLOURS) / 255).requires_grad_(),
        np.dstack([COLOURS, np.full((SIDE, SIDE), 255, np.uint8)]),
        COLOURS[:, ::-1][:, ::-1],
    ],
)
def test_an_array_of_any_type_and_order_is_the_picture(array):
    assert np.abs(np.asarray(to_rgb(array)).astype(int) - COLOURS).max() <= LEVEL


def test_a_float_file_without_values_somewhere_is_black_there_and_says_so():
    values = FLOATS.copy()
    values[3, 4], values[5, 6] = np.nan, np.inf
    image = open_image(file_of(Image.fromarray(values), "TIFF"))
    assert image.getpixel((4, 3)) == (0, 0, 0) and image.getpixel((6, 5)) == (255, 255, 255)
    assert conversions(image) == ("float", "clipped")


def test_low_precision_tensors_are_the_picture():
    for dtype in (torch.bfloat16, torch.float16):
        seen = np.asarray(to_rgb((torch.from_numpy(COLOURS) / 255).to(dtype))).astype(int)
        assert np.abs(seen - COLOURS).max() <= 1


def test_where_both_ends_could_be_channels_they_come_last_in_arrays_and_first_in_tensors():
    values = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert (np.asarray(to_rgb(values)) == values).all()
    assert (np.asarray(to_rgb(torch.from_numpy(values))) == values.transpose(1, 2, 0)).all()


def test_floats_that_resampling_made_a_little_too_bright_are_not_taken_for_0_to_255():
    overshot = FLOATS * 1.1 - 0.05
    seen = np.asarray(to_rgb(overshot))[..., 0]
    assert np.abs(seen - np.round(overshot.clip(0, 1) * 255)).max() <= LEVEL
    assert "clipped" in conversions(to_rgb(overshot))


REFUSED = {
    "a batch": (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\), a batch; pass a list of images"),
    "a batch of tensors": (torch.zeros(2, 3, 8, 8), "a batch"),
    "one row": (np.zeros(8, np.uint8), r"shape \(8,\)"),
    "many channels": (np.zeros((8, 8, 7), np.uint8), r"shape \(8, 8, 7\)"),
    "no pixels": (np.zeros((0, 8, 3), np.uint8), "no pixels"),
    "normalised": (
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "before any normalization",
    ),
    "normalised, mostly bright": (np.linspace(-0.2, 2.6, 64).reshape(8, 8), "before any normalization"),
    "normalised to -1..1": (np.linspace(-1, 1, 64).reshape(8, 8), "before any normalization"),
    "temperatures": (
        Image.fromarray(np.linspace(-1000, 3000, 64, dtype=np.int32).reshape(8, 8)),
        "from -1000 to 3000",
    ),
    "a z-score": (Image.fromarray(np.linspace(-3, 3, 64, dtype=np.float32).reshape(8, 8)), "from -3 to 3"),
    "NaN": (np.full((8, 8), np.nan), "NaN"),
    "negative integers": (np.full((8, 8), -1), "got pixel values from -1 to 0"),
    "complex": (np.zeros((8, 8), complex), "an array of complex128"),
    "text in an array": (np.array([["a", "b"]]), "an array of"),
    "a number": (7, "got int"),
    "nothing": (None, "got NoneType"),
}


@pytest.mark.parametrize(("array", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_is_refused_in_one_line(array, message, processor):
    with pytest.raises(UnreadableImage, match=message):
        to_rgb(array)
    with pytest.raises(UserError, match=message) as caught:
        processor.image_processor([array])
    assert "\n" not in str(caught.value)


def test_an_array_of_a_batch_is_refused_by_the_image_processor_too(processor):
    with pytest.raises(UserError, match="a batch; pass a list of images"):
        processor.image_processor(np.zeros((2, 8, 8, 3), np.uint8))


# Bounds


@pytest.fixture
def few_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", SIDE * SIDE - 1)


@pytest.mark.parametrize("name", KINDS)
def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(name, few_pixels, monkeypatch):
    opened = Image.open(io.BytesIO(KINDS[name].content))
    monkeypatch.setattr(Image.Image, "load", None)
    for read, image in ((open_image, KINDS[name].content), (to_rgb, opened)):
        with pytest.raises(UnreadableImage, match="32 x 32 pixels, the limit is"):
            read(image)
    with pytest.raises(UserError, match=r"row 0: image: .*32 x 32 pixels"):
        MediaResolver(None, False).image(opened, "row 0: image")


def test_the_processor_and_arrays_have_the_same_limit(few_pixels, processor):
    for image in (COLOURS, torch.from_numpy(COLOURS), Image.fromarray(COLOURS), KINDS["RGB"].content):
        with pytest.raises(UserError, match="32 x 32 pixels"):
            asked_about(processor, image)


def test_an_icon_that_holds_a_larger_picture_than_it_says_is_refused(monkeypatch):
    content = bytearray(file_of(Image.fromarray(COLOURS), "ICO", sizes=[(SIDE, SIDE)]))
    content[6:8] = 4, 4  # what the icon's directory says
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="pixels"):
        open_image(bytes(content))


def test_pillows_own_lower_limit_is_obeyed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_image(KINDS["RGB"].content)


# What people give by mistake


def test_what_is_no_image_is_told_in_one_line_by_the_processor(processor, tmp_path):
    (tmp_path / "words.png").write_text("words")
    wrong = {
        str(tmp_path / "gone.png"): "no such file",
        tmp_path / "gone.png": "no such file",
        tmp_path / "words.png": "of no known image format",
        "data:image/png;base64,????": "not base64",
        b"": "an empty file",
    }
    for image, reason in wrong.items():
        with pytest.raises(UserError, match=reason) as caught:
            processor(images=image, text="<image>")
        assert "\n" not in str(caught.value) and "not a readable image" in str(caught.value)


def test_an_undecoded_image_of_datasets_is_read(processor, tmp_path):
    content = KINDS["16-bit PNG"].content
    (tmp_path / "a.png").write_bytes(content)
    expected = trained_on(processor, content)
    for image in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert torch.equal(asked_about(processor, image), expected)


def test_a_file_whose_text_has_the_readers_own_key_is_still_turned_upright():
    note, exif, content = PngInfo(), Image.Exif(), io.BytesIO()
    note.add_text(images.NOTES, "rotated")
    exif[images.ORIENTATION] = 6
    Image.new("RGB", (8, 4)).save(content, "PNG", pnginfo=note, exif=exif)
    opened = Image.open(content)
    assert (
        to_rgb(opened).size == (4, 8)
        and conversions(to_rgb(opened)) == ("rotated",)
        and conversions(opened) == ()
    )
