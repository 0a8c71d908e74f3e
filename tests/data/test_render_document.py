"""Captions and interleaved documents in OpenFlamingo's form, for every language model."""

import pytest
from tokenizers import processors

from flamingo_ft.data.encode import IGNORED, encode, encode_prompt
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.processor import FlamingoProcessor

from .dialogues import CHATML, IMAGE, blocks, nano_processor, user
from .llama_tokenizer import llama_tokenizer


def document(*parts):
    return [{"role": DOCUMENT, "content": blocks(parts)}]


def written(processor, encoded):
    """Return the text of all tokens, and of those with a label."""
    decode = processor.tokenizer.decode
    return decode(encoded.input_ids), decode([token for token in encoded.labels if token != IGNORED])


EOC = "<|endofchunk|>"
END = nano_processor().tokenizer.eos_token
FORMS = [
    ((IMAGE, " A seven. "), f"<image>A seven.<|endofchunk|>{END}", f"A seven.<|endofchunk|>{END}"),
    ((IMAGE, "1 ", IMAGE, " 2"), f"<image>1{EOC}<image>2{EOC}{END}", f"1{EOC}2{EOC}"),
    (("so ", IMAGE, "one"), f"so<image>one<|endofchunk|>{END}", "one<|endofchunk|>"),
    ((IMAGE, IMAGE, "two"), f"<image>{EOC}<image>two{EOC}{END}", "<|endofchunk|>two<|endofchunk|>"),
    (("text",), f"text<|endofchunk|>{END}", ""),
    ((IMAGE, "a <image> b"), f"<image>a <image> b<|endofchunk|>{END}", f"a <image> b<|endofchunk|>{END}"),
]  # fmt: skip


@pytest.mark.parametrize("template", [None, CHATML, "{{ raise_exception('no') }}"])
@pytest.mark.parametrize(("parts", "text", "labels"), FORMS)
def test_a_document_is_written_in_chunks_whatever_the_chat_template(template, parts, text, labels):
    processor = nano_processor(template)
    encoded = encode(processor, document(*parts))
    assert written(processor, encoded) == (text, labels)
    assert encoded.images == encoded.input_ids.count(processor.image_token_id) == parts.count(IMAGE)
    assert processor.image_token_id not in encoded.labels


def test_a_document_begins_with_the_tokenizers_bos_token():
    tokenizer = llama_tokenizer(legacy=False)
    add_media_tokens(tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    processor = FlamingoProcessor(nano_processor().image_processor, tokenizer)
    encoded = encode(processor, document(IMAGE, "Seven."))
    assert encoded.input_ids == tokenizer("<image>Seven.<|endofchunk|></s>")["input_ids"]
    assert written(processor, encoded)[1].strip() == "Seven.<|endofchunk|></s>"


def test_the_prompt_of_a_document_ends_with_its_last_image():
    processor = nano_processor()
    prompt = encode_prompt(processor, document(IMAGE, "one", IMAGE, "two"))
    assert processor.tokenizer.decode(prompt) == "<image>one<|endofchunk|><image>"
    assert prompt == encode_prompt(processor, document(IMAGE, "one", IMAGE))
    whole = encode(processor, document(IMAGE, "one", IMAGE, "two"))
    assert whole.input_ids[: len(prompt)] == prompt and whole.labels[len(prompt)] != IGNORED


def test_a_document_among_other_messages_is_refused():
    with pytest.raises(UserError, match="^messages: got a document among 2 messages"):
        encode(nano_processor(), [*document("a"), user("b")])
