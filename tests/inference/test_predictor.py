"""Answers do not depend on the batch, end with the assistant's turn, and survive saving the adapter."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ft import Predictor
from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import is_quantized, quantization_formats
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.inference import media_inputs
from flamingo_ft.inference.answer import answer
from flamingo_ft.inference.media_inputs import MediaInputs
from flamingo_ft.inference.prompts import Prompt, place_images
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
    return [Prompt(turns, images, "here") for turns, images in dialogues]


def test_answers_of_a_batch_equal_those_of_single_prompts(flamingo, files):
    predictor, prompts = Predictor(*flamingo, max_new_tokens=8), questions(files)
    together = predictor.answer(prompts)
    assert together == [predictor.answer([question])[0] for question in prompts]
    assert predictor.answer(prompts[::-1], batch_size=4) == together[::-1]
    assert len(set(together)) > 3


def test_the_dtype_is_that_of_all_weights_but_gates(flamingo, files, tmp_path):
    model, processor = flamingo
    save_adapter(model, processor, tmp_path / "adapter")
    pixels = MediaInputs(model, processor, 0).pixels_of(questions(files)[:1])
    logits = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        predictor = Predictor.from_pretrained(tmp_path / "adapter", dtype=name)
        for parameter_name, parameter in predictor.model.named_parameters():
            gate = parameter_name.endswith("_gate")
            assert parameter.dtype == (torch.float32 if gate else dtype), parameter_name
        ids = torch.tensor(predictor.encode(questions(files)[:1]))
        with torch.no_grad():
            logits[name] = predictor.model(ids, **pixels).logits.float()
    assert not torch.equal(logits["fp32"], logits["bf16"])
    torch.testing.assert_close(logits["bf16"], logits["fp32"], rtol=0, atol=0.05 * logits["fp32"].abs().max())
    with pytest.raises(UserError, match="dtype: must be one of auto, fp32, bf16, fp16, got half"):
        Predictor.from_pretrained(tmp_path / "adapter", dtype="half")


def test_quantized_matrices_are_multiplied_in_the_dtype_too(flamingo, tmp_path, monkeypatch):
    save_adapter(*flamingo, tmp_path / "adapter")
    monkeypatch.setattr("flamingo_ft.backbones.precision.cpu_has_bf16", lambda: True)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.bfloat16)):
        model = Predictor.from_pretrained(tmp_path / "adapter", quantization="nf4", dtype=name).model
        layers = [layer for layer in model.modules() if is_quantized(layer)]
        assert layers and {layer.compute_dtype for layer in layers} == {dtype}


def test_an_answer_depends_on_its_image(flamingo, files):
    predictor = Predictor(*flamingo, max_new_tokens=8)
    assert predictor(files[0], "Which digit is this?") != predictor(files[1], "Which digit is this?")


@pytest.mark.parametrize(
    "form", [str, Image.open, lambda path: np.asarray(Image.open(path)), lambda path: path.read_bytes()]
)
def test_a_path_an_image_an_array_and_file_content_give_the_same_answer(flamingo, files, form):
    predictor = Predictor(*flamingo, max_new_tokens=8)
    prompt = "First <image> then <image>. Name both."
    assert predictor([form(file) for file in files[1:]], prompt) == predictor(files[1:], prompt)
    assert predictor.batch([(form(files[0]), "Which?"), ([], "Hello.")]) == [
        predictor(files[0], "Which?"),
        predictor(None, "Hello."),
    ]


def test_an_array_that_is_not_an_image_is_refused(flamingo):
    with pytest.raises(UserError, match="prompt: not a readable image .*shape"):
        Predictor(*flamingo)(np.zeros((2, 3, 8, 8)), "What?")


def test_prompts_are_asked_sorted_by_size_and_the_models_mode_is_restored(flamingo, monkeypatch):
    def echo(self, encoded, media, decoding):
        assert not self.model.training and decoding.max_new_tokens == 9
        sizes.append([len(ids) for ids in encoded])
        return encoded

    prompts = [Prompt([user("7" * (7 * n % 5 + 1))], [], str(n)) for n in range(7)]
    done, sizes = [], []
    monkeypatch.setattr(Predictor, "_generate", echo)
    monkeypatch.setattr(Predictor, "_texts", lambda self, ids, decoding: [str(len(row)) for row in ids])
    predictor = Predictor(*flamingo)
    predictor.model.train()
    answers = predictor.answer(prompts, batch_size=3, max_new_tokens=9, on_batch=done.append)
    assert answers == [str(len(ids)) for ids in predictor.encode(prompts)]
    assert done == [3, 3, 1] and predictor.model.training
    assert sum(sizes, []) == sorted(sum(sizes, []))

    monkeypatch.setattr(Predictor, "_generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predictor.answer(prompts)
    assert predictor.model.training
    predictor.model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_strings": ("e", "zz")},
        {"temperature": 2.0, "seed": 3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_a_streamed_answer_is_the_answer(flamingo, files, options):
    predictor = Predictor(*flamingo, max_new_tokens=12, **options)
    for prompt in questions(files)[:4]:
        pieces = list(predictor.stream_answer(prompt))
        assert "".join(pieces) == predictor.answer([prompt])[0]
    assert len(pieces) > 1 or options


def test_sampling_depends_on_the_seed_alone(flamingo, files):
    predictor = Predictor(*flamingo, max_new_tokens=12, temperature=2.0)
    answers = [predictor(files[0], "Which?", seed=seed) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    state = torch.get_rng_state()
    predictor(files[0], "Which?", seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_ends_before_a_stop_string_and_is_not_generated_further(flamingo, files, monkeypatch):
    predictor, lengths = Predictor(*flamingo, max_new_tokens=24), []
    whole = predictor(files[0], "Which digit is this?")
    stop = re.findall("[a-z]{2,}", whole)[-1]
    generate = predictor.model.generate

    def counted(**inputs):
        output = generate(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(predictor.model, "generate", counted)
    assert predictor(files[0], "Which digit is this?") == whole
    assert predictor(files[0], "Which digit is this?", stop_strings=(stop,)) == whole.split(stop)[0].strip()
    assert lengths[1] < lengths[0]


def test_beams_of_a_batch_equal_those_of_single_prompts(flamingo, files):
    predictor = Predictor(*flamingo, max_new_tokens=6, num_beams=3, length_penalty=0.0)
    prompts = questions(files)
    together = predictor.answer(prompts)
    assert together == [predictor.answer([prompt])[0] for prompt in prompts]
    assert together != Predictor(*flamingo, max_new_tokens=6).answer(prompts)
    with pytest.raises(UserError, match="num_beams: the answer of beam search cannot be streamed, got 3"):
        predictor.stream(files[0], "Which?")


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(flamingo, files):
    predictor = Predictor(*flamingo, max_new_tokens=16)
    room = context_length(predictor.model.config)
    short = questions(files)[0]
    words = next(
        n for n in range(1, room) if len(predictor.encode([Prompt([user("7 " * n)], [])])[0]) > room - 10
    )
    long = Prompt([user("7 " * words)], [], "long")
    assert predictor.answer([long, short])[1] == predictor.answer([short])[0]


def test_a_caption_is_the_continuation_of_an_image_without_a_prompt(flamingo, files):
    predictor = Predictor(*flamingo, max_new_tokens=8)
    document = Prompt([{"role": "document", "content": [{"type": "image"}]}], files[:1])
    assert predictor(files[0]) == predictor.answer([document])[0]
    with pytest.raises(UserError, match="prompt: got neither a text nor an image; give at least one of them"):
        predictor(None)


# --- kept tokens of the tower ---


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of images that the tower is run on."""
    counts = []
    encode = media_inputs.encode_distinct

    def counted(vision, images):
        counts.append(len(images))
        return encode(vision, images)

    monkeypatch.setattr(media_inputs, "encode_distinct", counted)
    return counts


def test_an_image_that_comes_again_is_not_encoded_again(flamingo, files, encoded):
    plain = Predictor(*flamingo, max_new_tokens=8).answer(questions(files))
    assert encoded == []
    predictor = Predictor(*flamingo, max_new_tokens=8, image_cache_mib=1)
    assert predictor.answer(questions(files)) == plain
    assert sum(encoded) == 3
    as_pictures = [Image.open(file) for file in files]
    expected = predictor(files, "Name <image>, <image> and <image>.")
    assert sum(encoded) == 3
    assert predictor(as_pictures, "Name <image>, <image> and <image>.") == expected
    assert predictor(as_pictures, "Name <image>, <image> and <image>.") == expected
    assert sum(encoded) == 6


def test_a_file_that_changed_is_read_again(flamingo, files, tmp_path, encoded):
    predictor = Predictor(*flamingo, max_new_tokens=8, image_cache_mib=1)
    path = tmp_path / "image.png"
    for file in files[:2]:
        path.write_bytes(file.read_bytes() + b"x" * files.index(file))
        assert predictor(path, "Which?") == Predictor(*flamingo, max_new_tokens=8)(file, "Which?")
    assert encoded == [1, 1]


def test_kept_tokens_take_no_more_memory_than_allowed(flamingo, files, encoded):
    media = MediaInputs(*flamingo, cache_bytes=1)
    tokens = [media.of([Prompt([], [file])])["vision_tokens"] for file in files[:2]]
    size = tokens[0].nbytes
    media = MediaInputs(*flamingo, cache_bytes=2 * size)
    encoded.clear()
    for index in (0, 1, 0, 2, 0, 1):  # 1 is the one that was used longest ago when 2 comes
        media.of([Prompt([], [files[index]])])
    assert len(encoded) == 4


class StubModel:
    """Stub of a model: answers every prompt with the same words and records the options."""

    device, training = "cpu", False
    config = SimpleNamespace(get_text_config=lambda: None, trained_on=None)

    def __init__(self, tokenizer, words: str, own_end: int | list[int] | None):
        self.generation_config = type("", (), {"eos_token_id": own_end})
        self.tokenizer, self.words = tokenizer, words

    def eval(self):
        pass

    def train(self, mode):
        pass

    def generate(self, input_ids, **options):
        self.options = options
        answer = torch.tensor([self.tokenizer(self.words)["input_ids"]] * len(input_ids))
        return torch.cat([input_ids, answer], 1)


@pytest.mark.parametrize("own_end", [None, 2, [1, 2]])
def test_an_answer_ends_with_the_chat_templates_end_token(own_end):
    """A language model that was not trained with the template does not end there by itself."""
    processor = nano_processor(CHUNK_TEMPLATE)
    end = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    model = StubModel(processor.tokenizer, " Seven.<|endofchunk|>And so on", own_end)
    answers = Predictor(model, processor).batch([([], "Which?"), ([], "Which?")], max_new_tokens=8)
    assert answers == ["Seven.", "Seven."]
    own = [] if own_end is None else [own_end] if isinstance(own_end, int) else own_end
    assert model.options["eos_token_id"] == end_token_ids(model, processor) == sorted([*own, end])


def test_images_stand_where_they_are_marked_or_before_the_prompt():
    assert place_images("What?", 0) == user("What?")["content"]
    assert place_images("What?", 2) == user(IMAGE, IMAGE, "What?")["content"]
    assert place_images("Is <image> like <image>?", 2) == user("Is ", IMAGE, " like ", IMAGE, "?")["content"]
    assert place_images("<image>", 1) == user(IMAGE)["content"]


@pytest.mark.parametrize(
    ("prompt", "images", "counts"),
    [
        ("<image>", 0, "1 <image> marker and 0 images"),
        ("<image>", 2, "1 <image> marker and 2 images"),
        ("<image> or <image>?", 1, "2 <image> markers and 1 image"),
    ],
)
def test_markers_that_do_not_match_the_images_are_refused(prompt, images, counts):
    with pytest.raises(UserError) as caught:
        place_images(prompt, images)
    assert str(caught.value) == f"prompt: got {counts}; give one image for each marker"


@pytest.fixture(scope="module")
def adapter(flamingo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(*flamingo, folder)
    return folder


def test_an_adapter_on_disk_answers_as_the_model_it_was_saved_from(flamingo, files, adapter):
    loaded = Predictor.from_pretrained(adapter, max_new_tokens=8)
    for images, prompt in ((files[0], "Which digit is this?"), (files[1:], "First <image> then <image>.")):
        assert loaded(images, prompt) == Predictor(*flamingo)(images, prompt, max_new_tokens=8)
    assert answer(adapter, files[:1], "Which?", 8) == loaded(files[0], "Which?")


def test_a_predictor_loads_with_the_requested_quantization(adapter, files):
    assert quantization_formats(Predictor.from_pretrained(adapter, quantization="none").model) == set()
    predictor = Predictor.from_pretrained(adapter, quantization="nf4", max_new_tokens=4)
    assert quantization_formats(predictor.model) == {"4bit"}
    assert isinstance(predictor(files[0], "Which?"), str)
    with pytest.raises(UserError, match="quantization: must be one of none, int8, nf4, fp4, got nf5"):
        Predictor.from_pretrained(adapter, quantization="nf5")


def test_a_bad_prompt_or_image_is_reported_before_the_model_is_loaded(tmp_path):
    broken = tmp_path / "a.png"
    broken.write_text("no image")
    with pytest.raises(UserError, match="a.png: not a readable image"):
        answer(tmp_path / "no adapter", [broken], "What?")
    with pytest.raises(UserError, match="2 <image> markers and 1 image"):
        answer(tmp_path / "no adapter", [broken], "<image><image>")
