"""An answer has the same text from `generate`, a pipeline and the processor, whole or streamed."""

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.processor import FlamingoProcessor, chunk_template
from tests.data.chat_templates import NO_PROMPT, OPENS_REASONING
from tests.data.dialogues import CHATML, LLAMA_2, VICUNA, nano_processor, user
from tests.data.llama_tokenizer import llama_tokenizer

from .conftest import make_flamingo

QUESTION = [user("Which digit is this?")]
TEMPLATES = {
    "chunk": None,
    "vicuna": VICUNA,
    "llama-2": LLAMA_2,
    "chatml": CHATML,
    "no prompt": NO_PROMPT,
    "opens reasoning": OPENS_REASONING,
}
ANSWERS = [" Seven.", "\n Seven. \n", "Yes.  No.\n   See there.\n\n", "", " "]


@pytest.fixture(scope="module")
def flamingo():
    return make_flamingo()[0]


def processor_of(kind: str, template: str | None) -> FlamingoProcessor:
    tokenizer = nano_processor().tokenizer if kind == "nano" else llama_tokenizer(legacy=kind == "legacy")
    if kind != "nano":
        add_media_tokens(tokenizer)
    return FlamingoProcessor(
        nano_processor().image_processor, tokenizer, template or chunk_template(tokenizer)
    )


def stub_generate(monkeypatch, model, processor, text) -> list[int]:
    """Let the model answer every prompt with the tokens of a text and the end token; return them."""
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [
        processor.tokenizer.eos_token_id
    ]

    def generate(input_ids, streamer=None, **options):
        if streamer is not None:
            streamer.put(input_ids)
            for token in tokens:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, torch.tensor([tokens] * len(input_ids))], 1)

    monkeypatch.setattr(model, "generate", generate)
    return tokens


@pytest.mark.parametrize("kind", ["nano", "fast", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_pipeline_processor_and_streamer_give_the_text_of_generate(flamingo, monkeypatch, name, kind):
    processor = processor_of(kind, TEMPLATES[name])
    ask = pipeline("image-text-to-text", model=flamingo, processor=processor)
    for answer in ANSWERS:
        tokens = stub_generate(monkeypatch, flamingo, processor, answer)
        expected = Predictor(flamingo, processor)([], "Which digit is this?", max_new_tokens=8)
        # the small tokenizer of Llama's kind has its line breaks among its special tokens
        assert expected == (answer.strip() if kind == "nano" else answer.replace("\n", "").strip())
        assert ask(text=QUESTION, return_full_text=False)[0]["generated_text"] == expected
        assert ask(text=QUESTION)[0]["generated_text"][-1] == {"role": "assistant", "content": expected}
        assert ask(text=[QUESTION, QUESTION], return_full_text=False)[1][0]["generated_text"] == expected
        assert processor.decode(tokens, skip_special_tokens=True) == expected
        assert processor.batch_decode([tokens], skip_special_tokens=True) == [expected]
        streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True)
        ask(text=QUESTION, generate_kwargs={"streamer": streamer})
        assert "".join(streamer) == expected


def test_text_that_continues_the_callers_keeps_its_spaces(flamingo, monkeypatch):
    processor = processor_of("nano", VICUNA)
    ask = pipeline("image-text-to-text", model=flamingo, processor=processor)
    stub_generate(monkeypatch, flamingo, processor, " Seven.")
    dialogue = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    assert ask(text=dialogue)[0]["generated_text"][-1]["content"][-1]["text"] == "It is Seven."
    assert ask(text=dialogue, return_full_text=False)[0]["generated_text"] == " Seven."
    assert ask(text="It is")[0]["generated_text"] == "It is Seven."
    assert ask(text="It is", return_full_text=False)[0]["generated_text"] == "Seven."
    assert processor.decode(processor.tokenizer(" Seven. ")["input_ids"]) == " Seven. "
    assert "generated_token_ids" in ask(text=QUESTION, return_tensors=True)[0]
