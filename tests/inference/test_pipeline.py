"""transformers' own generation says what `flamingo-ft generate` says: plain, through a pipeline, from each kind of folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from flamingo_ft.adapters import merge_adapter, save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.inference.answer import answer, answer_batch, place_images
from flamingo_ft.model import build_flamingo

PROMPT = "Which digit is this?"


def make_flamingo():
    """Around the nano backbones, with a random bridge that lets images matter, and sampling as its language model's wish."""
    torch.manual_seed(0)
    small = {"heads": 2, "dim_head": 8}
    language = load_language("nano")
    language.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model, processor = build_flamingo(
        load_vision("nano"), language, perceiver={"num_latents": 2, "depth": 1, **small}, cross_attention=small
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("perceiver.", "gated_cross_attn_layers.")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval(), processor


@torch.no_grad()
def end_after(model, processor, words: int, paths) -> None:
    """Let the end of a chunk, which the language model does not know as an end, be likelier than a word of its answer."""
    head, rows = model.lang_encoder.get_output_embeddings().weight, model.token_rows.output.weight
    question = {"messages": [{"role": "user", "content": place_images(PROMPT, 1)}], "images": paths[:1], "where": "here"}
    said = processor.tokenizer(answer_batch(model, processor, [question], 64)[0], add_special_tokens=False)["input_ids"]
    end = model.token_rows.token_ids.index(model.config.eoc_token_id)
    rows[end] = 1.01 * head[said[words]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter and what it is merged to, one image for each of two prompts, two more for a third."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    model, processor = make_flamingo()
    end_after(model, processor, 5, paths)
    save_adapter(model, processor, folder / "adapter")
    merge_adapter(folder / "adapter", folder / "merged", dtype=torch.float32)
    return folder, paths


@pytest.fixture(scope="module", params=["adapter", "merged"])
def asked(request, folders):
    """A folder, and for one and for two images what `flamingo-ft generate` says."""
    folder, paths = folders
    place = folder / request.param
    return place, {n: (paths[:n], answer(place, paths[:n], PROMPT)) for n in (1, 2)}


def chat(paths, kind="image"):
    return [{"role": "user", "content": [*({"type": "image", kind: str(p)} for p in paths), {"type": "text", "text": PROMPT}]}]


def test_the_answers_differ_and_one_ends_early(asked):
    _, expected = asked
    (one, two) = (said for _, said in expected.values())
    assert one != two and len(one.split()) < 20


def test_a_pipeline_says_what_generate_says(asked):
    folder, expected = asked
    ask = pipeline("image-text-to-text", model=str(folder))
    for paths, said in expected.values():
        (found,) = ask(text=chat(paths), return_full_text=False)
        assert found["generated_text"].strip() == said
        text = ask.processor.apply_chat_template(chat(paths), add_generation_prompt=True)
        (found,) = ask(images=[Image.open(path) for path in paths], text=text, return_full_text=False)
        assert found["generated_text"].strip() == said


def test_plain_generate_says_what_generate_says(asked):
    folder, expected = asked
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for paths, said in expected.values():
        inputs = processor.apply_chat_template(chat(paths, "path"), **how)
        new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == said
