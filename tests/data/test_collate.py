"""Batches of tensors: padding, media of different lengths, and errors of samples and images."""

from __future__ import annotations

import io
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flamingo_ft.data.collate import collate_text, load_media
from flamingo_ft.data.encode import IGNORED, encode, encode_within
from flamingo_ft.data.media import open_image
from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor
from flamingo_ft.model.views import Views, stack_media

from .dialogues import IMAGE, assistant, nano_processor, system, user

ORIENTATION = 0x0112  # the EXIF tag; 6: upright after a quarter turn


def picture(seed: int = 0, size: tuple[int, int] = (40, 28)) -> Image.Image:
    rng = random.Random(seed)
    small = Image.new("RGB", (5, 4))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(20)])
    return small.resize(size)


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    return tmp_path


def row(folder, images: int, answer: str = "Seven.", first: int = 0):
    paths = [str(folder / f"{first + index}.png") for index in range(images)]
    return {
        "messages": [user(*[IMAGE] * images, "Which?"), assistant(answer)],
        "images": paths,
        "where": "row 5",
    }


def collate(*rows, limit=100, processor=None):
    processor = processor or nano_processor()
    samples = [Sample(each["messages"], each["images"], "", each["where"]) for each in rows]
    encoded = [encode_within(processor, sample, limit) for sample in samples]
    return collate_text(encoded, processor.tokenizer.pad_token_id) | load_media(processor, rows)


def test_a_batch_holds_its_samples_padded_at_the_end(folder):
    processor = nano_processor()
    rows = [row(folder, 1), row(folder, 0, "It is a rather long answer, this one."), row(folder, 2, "No.")]
    batch = collate(*rows)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for index, each in enumerate(rows):
        sample = encode(processor, each["messages"])
        length = len(sample.input_ids)
        assert batch["input_ids"][index, :length].tolist() == sample.input_ids
        assert batch["labels"][index, :length].tolist() == sample.labels
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert set(batch["input_ids"][index, length:].tolist()) <= {processor.tokenizer.pad_token_id}
        assert set(batch["labels"][index, length:].tolist()) <= {IGNORED}


def test_the_end_token_has_a_label_even_if_it_is_the_padding_token(folder):
    processor = nano_processor()
    tokenizer = type(processor.tokenizer).from_pretrained(processor.tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    processor = FlamingoProcessor(processor.image_processor, tokenizer)
    batch = collate(row(folder, 0, "A."), row(folder, 0, "A much longer answer."), processor=processor)
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]


def test_every_image_has_its_slot_and_the_rest_is_zero(folder):
    processor = nano_processor()
    pixels = collate(row(folder, 1), row(folder, 0), row(folder, 3, first=1))["pixel_values"]
    assert pixels.shape == (3, 3, 3, 32, 32)
    images = [processor.image_processor.transform(picture(index)) for index in range(4)]
    assert torch.equal(pixels[0, 0], images[0])
    assert torch.equal(pixels[2], torch.stack(images[1:]))
    assert not pixels[0, 1:].any() and not pixels[1].any()


def test_a_batch_without_images_has_no_pixel_values(folder):
    assert set(collate(row(folder, 0), row(folder, 0))) == {"input_ids", "attention_mask", "labels"}


def test_a_sample_as_long_as_the_limit_passes_and_a_longer_one_is_refused(folder):
    length = len(encode(nano_processor(), row(folder, 1)["messages"]).input_ids)
    assert collate(row(folder, 1), limit=length)["input_ids"].shape == (1, length)
    with pytest.raises(UserError) as caught:
        collate(row(folder, 1), limit=length - 1)
    assert str(caught.value) == (
        f"row 5: got {length} text tokens, the limit is {length - 1}; "
        "shorten the sample, raise data.max_text_tokens (up to the language model's context) "
        "or set data.too_long"
    )


def test_the_error_of_a_chat_template_names_the_sample(folder):
    strict = nano_processor("{{ raise_exception('system role not supported') }}")
    with pytest.raises(
        UserError, match=r"^row 5: chat template: refuses the dialogue \(system role not supported\)"
    ):
        collate(
            {**row(folder, 0), "messages": [system("Be brief."), user("x"), assistant("y")]}, processor=strict
        )


def test_a_sample_without_labels_is_refused(folder):
    marks_nothing = "{% for m in messages %}{% generation %}{% endgeneration %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="^row 5: no assistant text to train on; remove the sample$"):
        collate(row(folder, 0), processor=nano_processor(marks_nothing))


def bytes_of(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = bytes_of(picture(), "PNG")
DAMAGED = {
    "no bytes": b"",
    "text": b"a picture of a seven",
    "a PNG cut in its pixels": PNG[: len(PNG) // 2],
    "a PNG cut in its header": PNG[:20],
    "a PNG whose header claims no bytes": PNG[:11] + b"\0" + PNG[12:],
    "a PNG whose pixels claim too few bytes": PNG[:35] + b"\0" + PNG[36:],
    "a JPEG cut": bytes_of(picture(), "JPEG")[:200],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_the_error_of_an_unreadable_image_names_sample_and_file(folder, content):
    (folder / "0.png").write_bytes(content)
    with pytest.raises(
        UserError, match=r"^row 5: [^\n]*/0\.png: not a readable image \([^\n]+\); replace it$"
    ):
        collate(row(folder, 1))


def test_the_error_of_a_missing_image_or_a_folder_names_sample_and_file(folder):
    (folder / "0.png").unlink()
    with pytest.raises(
        UserError, match=r"^row 5: .*/0\.png: not a readable image \(no such file\); replace it$"
    ):
        collate(row(folder, 1))
    (folder / "0.png").mkdir()
    with pytest.raises(UserError, match=r"^row 5: .*/0\.png: not a readable image \([^\n]+\); replace it$"):
        collate(row(folder, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_image_file_raises_nothing_but_user_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged size may claim gigabytes
    whole, path = bytes_of(picture(), kind), tmp_path / "image"
    changed = [whole[:at] + bytes([byte]) + whole[at + 1 :] for at in range(100) for byte in (0, 1, 5)]
    for damaged in [*changed, *(whole[:length] for length in range(0, len(whole), 20))]:
        path.write_bytes(damaged)
        try:
            open_image(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        picture().convert("L" if mode == "I;16" else mode).save(tmp_path / "image.tiff")
        assert open_image(tmp_path / "image.tiff").mode == "RGB"


def test_a_rotated_photo_is_upright_in_training_and_in_the_processor(tmp_path):
    upright = picture(size=(40, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    upright.rotate(90).save(tmp_path / "photo.png", exif=exif)
    processor, path = nano_processor(), str(tmp_path / "photo.png")
    expected = processor.image_processor.transform(upright)
    trained_on = load_media(processor, [{"images": [path], "where": ""}])["pixel_values"]
    processed = processor(images=path, text="<image>")["pixel_values"]
    assert torch.equal(trained_on[0, 0], expected) and torch.equal(processed[0, 0], expected)


lengths = st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4)


@given(lengths)
def test_stacked_media_keep_their_values_and_padding_is_zero(lengths):
    rows = [[Views(torch.randn(frames, 3, 2, 2)) for frames in row] for row in lengths]
    batch = stack_media(rows)
    if not any(rows):
        assert batch == {}
        return
    pixels = batch["pixel_values"]
    pixels = pixels[:, :, None] if pixels.dim() == 5 else pixels
    frames = {len(medium) for row in rows for medium in row}
    assert ("frame_counts" in batch) == (len(frames) > 1)
    total = 0.0
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            assert torch.equal(pixels[b, m, : len(medium)], medium.values)
            assert len(frames) == 1 or batch["frame_counts"][b, m] == len(medium)
            total += float(medium.values.abs().sum())
    torch.testing.assert_close(float(pixels.abs().sum()), total, rtol=1e-4, atol=1e-4)


def test_single_images_have_no_axis_of_frames():
    assert stack_media([[Views(torch.zeros(1, 3, 4, 4))], []])["pixel_values"].shape == (2, 1, 3, 4, 4)
