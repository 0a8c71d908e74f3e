"""Answers: alone or together the same, ended where the assistant ends, from an adapter on disk as from memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ft.adapters import save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.inference.answer import answer, answer_batch, end_token_ids, place_images
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.processor import CHUNK_TEMPLATE
from tests.data.dialogues import IMAGE, assistant, nano_processor, user


@pytest.fixture(scope="module")
def flamingo():
    """Around the nano backbones, with a random bridge, so that images matter."""
    torch.manual_seed(0)
    small = {"heads": 2, "dim_head": 8}
    model, processor = build_flamingo(
        load_vision("nano"),
        load_language("nano"),
        perceiver={"num_latents": 2, "depth": 1, **small},
        cross_attention=small,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("perceiver.", "gated_cross_attn_layers.")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval(), processor


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(3)]


def questions(files):
    """Of different lengths, turns and counts of images, and one without."""
    dialogues = [
        ([user(IMAGE, "Which digit is this?")], files[:1]),
        ([user("Hello there, how are you?")], []),
        ([user("First ", IMAGE, " then ", IMAGE, ". Name both.")], files[1:]),
        ([user(IMAGE, "Which digit?"), assistant("Seven."), user(IMAGE, IMAGE, "And now?")], files),
        ([user(IMAGE, "Which digit is this?")], files[2:]),
        ([user(IMAGE)], files[1:2]),
    ]
    return [{"messages": turns, "images": images, "where": "here"} for turns, images in dialogues]


def test_answers_of_a_batch_are_those_given_one_by_one(flamingo, files):
    asked = questions(files)
    together = answer_batch(*flamingo, asked, max_new_tokens=8)
    alone = [answer_batch(*flamingo, [question], max_new_tokens=8)[0] for question in asked]
    assert together == alone
    assert answer_batch(*flamingo, asked[::-1], max_new_tokens=8) == together[::-1]
    assert len(set(together)) > 3


def test_an_answer_depends_on_its_image(flamingo, files):
    first, second = (
        answer_batch(*flamingo, [{**questions(files)[0], "images": [file]}], max_new_tokens=8)
        for file in files[:2]
    )
    assert first != second


class Speaker:
    """In a model's place: says given words after any prompt, and remembers how it was asked."""

    device = "cpu"
    config = SimpleNamespace(get_text_config=lambda: None)

    def __init__(self, tokenizer, words: str, own_end: int | list[int] | None):
        self.generation_config = type("", (), {"eos_token_id": own_end})
        self.tokenizer, self.words = tokenizer, words

    def generate(self, input_ids, **options):
        self.options = options
        said = torch.tensor([self.tokenizer(self.words)["input_ids"]] * len(input_ids))
        return torch.cat([input_ids, said], 1)


@pytest.mark.parametrize("own_end", [None, 2, [1, 2]])
def test_an_answer_ends_with_the_chat_templates_end_token(own_end):
    """A language model that was not trained with the template does not end there by itself."""
    processor = nano_processor(CHUNK_TEMPLATE)
    end = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    model = Speaker(processor.tokenizer, " Seven.<|endofchunk|>And so on", own_end)
    question = {"messages": [user("Which?")], "images": [], "where": "here"}
    assert answer_batch(model, processor, [question, question], max_new_tokens=8) == ["Seven.", "Seven."]
    own = [] if own_end is None else [own_end] if isinstance(own_end, int) else own_end
    assert model.options["eos_token_id"] == end_token_ids(model, processor) == sorted([*own, end])


def test_images_stand_where_they_are_marked_or_before_the_prompt():
    assert place_images("What?", 0) == user("What?")["content"]
    assert place_images("What?", 2) == user(IMAGE, IMAGE, "What?")["content"]
    assert place_images("Is <image> like <image>?", 2) == user("Is ", IMAGE, " like ", IMAGE, "?")["content"]
    assert place_images("<image>", 1) == user(IMAGE)["content"]


@pytest.mark.parametrize(("prompt", "images"), [("<image>", 0), ("<image>", 2), ("<image> or <image>?", 1)])
def test_markers_that_do_not_match_the_images_are_refused(prompt, images):
    markers = prompt.count("<image>")
    with pytest.raises(UserError) as caught:
        place_images(prompt, images)
    assert str(caught.value) == (
        f"--prompt has {markers} <image> markers but {images} images were given; give one --image for each marker"
    )


def test_an_adapter_on_disk_answers_as_the_model_it_was_saved_from(flamingo, files, tmp_path):
    save_adapter(*flamingo, tmp_path / "adapter")
    for question in (questions(files)[i] for i in (0, 1, 2)):
        (expected,) = answer_batch(*flamingo, [question], max_new_tokens=8)
        (turn,) = question["messages"]
        prompt = "".join("<image>" if block == IMAGE else block["text"] for block in turn["content"])
        assert answer(tmp_path / "adapter", question["images"], prompt, max_new_tokens=8) == expected


def test_a_bad_prompt_or_image_is_told_before_the_model_is_loaded(tmp_path):
    broken = tmp_path / "a.png"
    broken.write_text("no image")
    with pytest.raises(UserError, match="a.png: not a readable image"):
        answer(tmp_path / "no adapter", [broken], "What?")
    with pytest.raises(UserError, match="2 <image> markers but 1 images"):
        answer(tmp_path / "no adapter", [broken], "<image><image>")
