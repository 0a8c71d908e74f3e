"""transformers' own `generate` and its pipeline return the answers of `flamingo-ft generate`."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines.base import Chat

from flamingo_ft.data.collate import load_media
from flamingo_ft.inference.answer import answer
from tests.model.kinds_of_images import KINDS

from .conftest import PROMPT


@pytest.fixture(scope="module", params=["adapter", "merged"])
def model_and_answers(request, folders):
    """A folder, and for one and for two images the paths and the answer of `flamingo-ft generate`."""
    folder, paths = folders
    place = folder / request.param
    return place, {n: (paths[:n], answer(place, paths[:n], PROMPT)) for n in (1, 2)}


def chat(paths, kind="image"):
    images = [{"type": "image", kind: str(path)} for path in paths]
    return [{"role": "user", "content": [*images, {"type": "text", "text": PROMPT}]}]


def test_the_answers_differ_and_one_ends_early(model_and_answers):
    _, answers = model_and_answers
    one, two = (reference for _, reference in answers.values())
    assert one != two and 10 < len(one) < 60


def test_a_pipeline_returns_the_answer_of_generate(model_and_answers):
    folder, answers = model_and_answers
    ask = pipeline("image-text-to-text", model=str(folder))
    for paths, reference in answers.values():
        (result,) = ask(text=chat(paths), return_full_text=False)
        assert result["generated_text"] == reference
        text = ask.processor.apply_chat_template(chat(paths), add_generation_prompt=True)
        (result,) = ask(images=[Image.open(path) for path in paths], text=text, return_full_text=False)
        assert result["generated_text"] == reference


def test_a_pipeline_sees_the_pixels_that_training_sees(folders, tmp_path):
    ask = pipeline("image-text-to-text", model=str(folders[0] / "merged"))
    for number, kind in enumerate(KINDS.values()):
        path = tmp_path / f"{number}.image"
        path.write_bytes(kind.content)
        expected = load_media(ask.processor, [{"images": [kind.content], "where": "row 0"}])["pixel_values"]
        with Image.open(path) as opened:
            for image in (str(path), opened, *([] if kind.array is None else [kind.array])):
                for images in (image, [image], [[image]]):
                    seen = ask.preprocess({"images": images, "text": "<image>?"})["pixel_values"]
                    assert torch.equal(seen, expected)
            assert torch.equal(ask.preprocess(Chat(chat([path])))["pixel_values"], expected)


def test_generate_of_transformers_returns_the_answer_of_generate(model_and_answers):
    folder, answers = model_and_answers
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for paths, reference in answers.values():
        inputs = processor.apply_chat_template(chat(paths, "path"), **options)
        new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True) == reference
