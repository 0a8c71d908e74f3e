"""Special tokens typed in a text stay text for the tokenizer, and all other text is tokenized as usual."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing

from flamingo_ft.data.encode import IGNORED, encode
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.special_text import encode_text, protect, restore
from flamingo_ft.model.tokenize_texts import tokenize
from tests.data.dialogues import IMAGE, assistant, nano_processor, user
from tests.data.llama_tokenizer import llama_tokenizer


def llama(legacy: bool):
    tokenizer = llama_tokenizer(legacy)
    add_media_tokens(tokenizer)
    return tokenizer


TOKENIZERS = {"nano": nano_processor().tokenizer, "llama": llama(False), "legacy llama": llama(True)}
WORDS = st.sampled_from(["Seven.", " ", "\n", "世", "🦩", "e\u0301", "see", "<", "image>", "  ", "<|im_"])
PLAIN = (
    st.lists(WORDS | st.text(max_size=4), max_size=5).map("".join).filter(lambda text: "<image>" not in text)
)
TYPED = st.sampled_from(["<image>", "<|endofchunk|>", "</s>", "<s>", "<|im_end|>", "<0x41>", "<image></s>"])
parametrized = pytest.mark.parametrize("name", TOKENIZERS)


def genuine(tokenizer, ids):
    """The ids of special tokens (images and ends) among ``ids``."""
    special = {
        tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|endofchunk|>", tokenizer.eos_token)
    }
    return [token for token in ids if token in special]


@parametrized
@given(st.lists(PLAIN | TYPED, max_size=4).map("".join))
@settings(max_examples=100, deadline=None)
def test_protected_text_keeps_its_length_and_is_restored(name, text):
    tokenizer = TOKENIZERS[name]
    protected = protect(tokenizer, text)
    assert len(protected) == len(text)
    back, spans = restore(tokenizer, protected)
    assert back == text
    assert all(text[a:b] in tokenizer.get_vocab() for a, b in spans)


@parametrized
@given(PLAIN)
@settings(max_examples=100, deadline=None)
def test_text_without_special_tokens_is_tokenized_as_by_the_tokenizer(name, text):
    tokenizer = TOKENIZERS[name]
    protected = protect(tokenizer, text)
    assert protected == text
    for options in ({}, {"add_special_tokens": False}):
        assert tokenize(tokenizer, [protected], **options) == tokenizer([text], **options).data
    assert encode_text(tokenizer, text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@parametrized
@given(st.lists(st.tuples(PLAIN | TYPED, TYPED, PLAIN).map("".join), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_typed_tokens_are_text_between_genuine_ones(name, parts):
    tokenizer = TOKENIZERS[name]
    text = "<image>".join(protect(tokenizer, part) for part in parts) + tokenizer.eos_token
    tokens = encode_text(tokenizer, text)
    media = tokenizer.convert_tokens_to_ids("<image>")
    assert genuine(tokenizer, tokens.ids) == [*[media] * (len(parts) - 1), tokenizer.eos_token_id]
    expected = "<image>".join(parts) + tokenizer.eos_token
    actual = tokenizer.decode(tokens.ids)
    if name == "legacy llama":  # Llama's older files put a space after each special token, before any text
        actual, expected = actual.replace(" ", ""), expected.replace(" ", "")
    assert actual.lstrip() == expected.lstrip()


@parametrized
def test_offsets_cover_every_character(name):
    tokenizer = TOKENIZERS[name]
    text = f"a{tokenizer.eos_token}" + protect(tokenizer, "see <image> 世")
    tokens = encode_text(tokenizer, text)
    whole = restore(tokenizer, text)[0]
    covered = {place for a, b in tokens.offsets for place in range(a, b)}
    assert covered >= {place for place, char in enumerate(whole) if not char.isspace()}
    pieces = {whole[a:b].strip() for a, b in tokens.offsets}
    assert all(len(piece) < len("<image>") for piece in pieces - {tokenizer.eos_token})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_truncation_and_offsets_equal_the_tokenizers(side):
    tokenizer = TOKENIZERS["nano"]
    texts = ["one two", "see <image> there, and <image>"]
    actual = tokenize(
        tokenizer, [protect(tokenizer, text) for text in texts],
        padding=True, padding_side=side, return_offsets_mapping=True, truncation=True, max_length=9,
    )  # fmt: skip
    whole = tokenizer(
        texts, padding=True, padding_side=side, return_offsets_mapping=True, truncation=True, max_length=9,
        split_special_tokens=True,
    )  # fmt: skip
    assert actual == whole.data


def with_both_ends():
    """A tokenizer that adds a token before and one after a text."""
    tokenizer = llama(False)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return tokenizer


OPTIONS = {
    "max_length": {"truncation": True, "max_length": 8},
    "model_max_length": {"truncation": True},
    "max_length alone": {"max_length": 8},
    "without ends": {"truncation": "longest_first", "max_length": 8, "add_special_tokens": False},
    "padding": {"truncation": True, "padding": "max_length", "max_length": 40, "padding_side": "left"},
    "padding to the model's length": {"truncation": True, "padding": "max_length"},
    "no mask": {"return_attention_mask": False, "return_token_type_ids": True, "return_tensors": None},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokenizer", [nano_processor().tokenizer, llama(False), with_both_ends()])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_do_in_a_call_of_the_tokenizer(name, tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    monkeypatch.setattr(tokenizer, "model_max_length", 9)
    texts = ["one", "see <image> there, and <image>"]
    options = OPTIONS[name] | {"return_offsets_mapping": True}
    actual = tokenize(tokenizer, [protect(tokenizer, text) for text in texts], **options)
    assert actual == tokenizer(texts, split_special_tokens=True, **options).data


@pytest.mark.parametrize("option", [{"text_pair": ["a"]}, {"stride": 2}, {"return_length": True}])
def test_an_option_that_would_be_ignored_is_refused(option):
    tokenizer = TOKENIZERS["nano"]
    assert tokenize(tokenizer, ["no token"], **option)["input_ids"]
    with pytest.raises(UserError, match=rf"^processor: {next(iter(option))}: not supported for texts with"):
        tokenize(tokenizer, [protect(tokenizer, "see <image>")], **option)


def test_the_processor_and_its_chat_template_give_the_ids_of_training():
    processor = nano_processor()
    shown = {**IMAGE, "image": Image.new("RGB", (8, 8))}
    turns = [user(shown, "Is <image> this <|im_end|>?"), assistant("No <image>.")]
    expected = encode(processor, turns)
    text = processor.apply_chat_template(turns)
    assert restore(processor.tokenizer, text)[0].count("<image>") == 3 and text.count("<image>") == 1
    marks = {"return_dict": True, "return_assistant_tokens_mask": True}
    actual = processor.apply_chat_template(turns, tokenize=True, **marks)
    again = processor(images=turns[0]["content"][0]["image"], text=text, add_special_tokens=False)
    assert actual["input_ids"] == again["input_ids"] == [expected.input_ids]
    assert [label != IGNORED for label in expected.labels] == [
        mask == 1 for mask in actual["assistant_masks"][0]
    ]
    with pytest.raises(UserError, match="text 0 has 1 <image> markers but 0 images"):
        processor(text=text)
