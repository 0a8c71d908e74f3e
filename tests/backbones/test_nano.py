"""The nano backbones load like any others, have learned their tasks, and saw no evaluation image."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import flamingo_ft.backbones
from flamingo_ft.backbones.build_nano.__main__ import SEED, build_language, build_vision
from flamingo_ft.backbones.build_nano.digit_questions import DIGIT_WORDS
from flamingo_ft.backbones.build_nano.language_model import (
    CONVERSATIONS_FOR_TOKENIZER,
    make_corpus,
    tokenizer_for,
)
from flamingo_ft.backbones.build_nano.quickstart_data import load_scans, split_scans

NANO = Path(flamingo_ft.backbones.__file__).parent / "nano"
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
TOKENIZER = AutoTokenizer.from_pretrained(NANO / "language")


@pytest.fixture(scope="module")
def tower():
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{NANO / 'vision'}")
    return model.eval(), transform


@pytest.fixture(scope="module")
def language():
    folder = NANO / "language"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def read_rows(split: str) -> list[dict]:
    return [
        json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def pixels(file_name: str) -> bytes:
    return Image.open(QUICKSTART / file_name).tobytes()


def eval_images() -> list[str]:
    return sorted({name for row in read_rows("eval") for name in row["images"]})


def labels_by_image() -> dict[str, int]:
    return {scan.file_name: scan.digit for scan in load_scans()}


def without_pictures(messages: list[dict]) -> list[dict]:
    """Return the messages without their pictures."""
    messages_without_pictures = []
    for message in messages:
        text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
        messages_without_pictures.append({"role": message["role"], "content": text})
    return messages_without_pictures


def test_both_backbones_together_are_a_few_megabytes():
    files = [path for part in ("vision", "language") for path in (NANO / part).iterdir()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20


def test_the_tower_has_64_spatial_tokens_of_width_64(tower):
    model, transform = tower
    image = transform(Image.open(QUICKSTART / eval_images()[0]))[None]
    out = model.visual.forward_intermediates(image, indices=1, output_fmt="NLC")
    assert out["image_intermediates"][0].shape == (1, 64, 64)


def test_the_tower_matches_evaluation_images_with_their_captions(tower):
    model, transform = tower
    names = eval_images()
    captions = [f"a {word}" for word in DIGIT_WORDS]
    with torch.no_grad():
        image_features = model.encode_image(
            torch.stack([transform(Image.open(QUICKSTART / name)) for name in names]), True
        )
        text_features = model.encode_text(
            open_clip.get_tokenizer(f"local-dir:{NANO / 'vision'}")(captions), True
        )
    digits = labels_by_image()
    guesses = (image_features @ text_features.T).argmax(1).tolist()
    assert sum(guess == digits[name] for guess, name in zip(guesses, names, strict=True)) >= 0.97 * len(names)


def test_the_tower_was_trained_on_no_evaluation_image():
    train_scans, _ = split_scans(load_scans())
    train_pictures = {scan.picture().tobytes() for scan in train_scans}
    assert not train_pictures & {pixels(name) for name in eval_images()}
    assert not {name for row in read_rows("train") for name in row["images"]} & set(eval_images())


@pytest.mark.slow
def test_the_language_model_answers_in_sentences_and_at_chance_without_images(language):
    model, tokenizer = language
    is_correct: dict[str, list[bool]] = {}
    for row in read_rows("eval")[:500]:
        messages = without_pictures(row["messages"])[:2]
        prompt = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert out[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(out, skip_special_tokens=True)
        assert answer.endswith(".") and answer[0].isupper()
        is_correct.setdefault(row["task"], []).append(answer == messages[1]["content"])
    accuracy = {task: sum(right) / len(right) for task, right in is_correct.items()}
    assert accuracy["which_digit"] < 0.25 and accuracy["name_both"] < 0.1
    assert all(0.3 < accuracy[task] < 0.7 for task in ("even_or_odd", "larger_than_five", "same_digit"))


@pytest.mark.parametrize(
    "question, answer",
    [
        ("seven. Which digit is this?", "Seven."),
        ("four. Is this digit even or odd?", "Even."),
        ("eight. Is it larger than five?", "Yes."),
        ("Image one: three image two: nine Name both digits in order.", "Three and nine."),
        ("Image one: two image two: two Are they the same digit?", "Yes."),
        ("Image one: two image two: six Are they the same digit?", "No."),
    ],
)
def test_the_language_model_answers_from_words_in_place_of_a_picture(language, question, answer):
    model, tokenizer = language
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == answer


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_decodes_what_it_encodes(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_tokenizer_has_no_media_tokens():
    assert not {"<image>", "<|endofchunk|>"} & set(TOKENIZER.get_vocab())


def test_every_digit_in_words_is_one_token():
    words = " zero one two three four five six seven eight nine"
    assert len(TOKENIZER(words)["input_ids"]) == 10


def test_the_assistant_mask_covers_the_assistants_words_and_the_end_tokens():
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which digit "}, {"type": "text", "text": "is this?"}],
        },
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Even or odd?"},
        {"role": "assistant", "content": "Odd, naïvely."},
    ]
    out = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assistant_tokens = [
        token
        for token, by_assistant in zip(out["input_ids"], out["assistant_masks"], strict=True)
        if by_assistant
    ]
    assert TOKENIZER.decode(assistant_tokens) == "Seven.<|im_end|>Odd, naïvely.<|im_end|>"


def test_a_prompt_is_the_beginning_of_the_whole_dialogue():
    messages = [
        {"role": "user", "content": "Which digit is this?"},
        {"role": "assistant", "content": "Seven."},
    ]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    prompt = TOKENIZER.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert whole == prompt + "Seven.<|im_end|>\n"


def test_the_chat_template_refuses_an_image_rather_than_dropping_it():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}
    ]
    with pytest.raises(Exception, match="text alone"):
        TOKENIZER.apply_chat_template(messages)


def test_the_script_reproduces_the_tokenizer():
    tokenizer = tokenizer_for(make_corpus(SEED, CONVERSATIONS_FOR_TOKENIZER))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template


@pytest.mark.slow
def test_building_twice_from_one_seed_gives_the_same_files(tmp_path):
    train_scans, _ = split_scans(load_scans())
    for name in ("first", "second"):
        _, tokenizer = build_language(tmp_path / name / "language", seed=1, steps=2, conversations=1600)
        build_vision(tmp_path / name / "vision", train_scans, tokenizer, seed=1, steps=2)
    files = sorted((tmp_path / "first").glob("*/*"))
    assert {path.name for path in files} >= {
        "model.safetensors",
        "open_clip_model.safetensors",
        "tokenizer.json",
    }
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.parent.name / path.name).read_bytes(), (
            path.name
        )
