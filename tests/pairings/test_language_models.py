"""Each released language model, in small: trained for two steps, answering, and merged."""

from __future__ import annotations

import math
from itertools import takewhile

import pytest
import torch
from transformers import LogitsProcessor

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.answering import use_greedy_decoding
from flamingo_ft.adapters.load import load_whole_model
from flamingo_ft.adapters.merge import write_merged
from flamingo_ft.data.encode import encode_answer, encode_prompt
from tests.data.dialogues import IMAGE, user
from tests.regimes import LORA, build, inputs, logits, shake, trainer, write_run
from tests.thinned import slow_except

from .published_models import MODELS, PublishedModel, write_model

# Layers that share keys and values, a mixture of experts with a state space, linear attention.
PLAIN = {"gemma4_text", "granitemoehybrid", "qwen3_5_text"}
OVERRIDES = ("model.language.name=./lm", LORA, "train.max_steps=2", "train.warmup_steps=0")
QUESTION = [user(IMAGE, "Which shade is it, dark or light, and how sure are you of that?")]


class Dictation(LogitsProcessor):
    """Lets the model write given tokens and nothing else."""

    def __init__(self, prompt: int, ids: list[int]):
        self.prompt, self.ids = prompt, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -math.inf)
        only[:, self.ids[input_ids.shape[1] - self.prompt]] = 0
        return only


@pytest.fixture
def trained(request, tmp_path, monkeypatch):
    """Train a released model in small for two steps; return it, and the values before training."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_model(tmp_path / "lm", request.param)
    model, processor = build(*OVERRIDES)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(model, processor, *OVERRIDES)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    use_greedy_decoding(model, processor)
    return request.param, model.eval(), processor, before


def each(models) -> list:
    plain = [model for model in models if model.model_type in PLAIN]
    return slow_except(plain, models)


@pytest.mark.parametrize("trained", each(MODELS), indirect=True, ids=str)
def test_it_trains_answers_and_merges(trained, tmp_path):
    published, model, processor, before = trained
    check_what_changed(model, before)
    check_ends(published, model, processor)
    shake(model, 0.03)  # gates open wide enough for an image to matter
    check_cache(model, processor)
    check_merge(model, processor, tmp_path)


def check_what_changed(model, before) -> None:
    """Two steps change bridge and LoRA weights, every tensor of them, and no other."""
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= learned
    assert {name for name in learned - changed if "token_rows" not in name} == set()
    assert any("lora_" in name for name in changed) and any("gate" in name for name in changed)


def check_ends(published: PublishedModel, model, processor) -> None:
    """An answer ends at each of the published end tokens, and at the one that the template writes."""
    prompt = encode_prompt(processor, QUESTION)
    answer = encode_answer(processor, QUESTION, "Dark.")
    ends = processor.tokenizer.convert_tokens_to_ids([*published.stops])
    words = list(takewhile(lambda token: token not in ends, answer))
    assert processor.decode(words).strip() == "Dark."
    for end in {*ends, answer[len(words)]}:
        dictation = Dictation(len(prompt), [*words, end, *words])
        written = model.generate(
            input_ids=torch.tensor([prompt]), logits_processor=[dictation], **image_of(processor)
        )
        assert written[0, -len(words) - 1 :].tolist() == [*words, end]


def image_of(processor) -> dict[str, torch.Tensor]:
    return {"pixel_values": inputs(processor)["pixel_values"][:, :1]}


def check_cache(model, processor) -> None:
    """With its cache, the model computes what it computes without, past the end of a sliding window."""
    prompt = torch.tensor([encode_prompt(processor, QUESTION)])
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, uncached = (
        model.generate(input_ids=prompt, use_cache=use_cache, **image_of(processor), **options)
        for use_cache in (True, False)
    )
    assert prompt.shape[1] > 16 and torch.equal(cached.sequences, uncached.sequences)
    for step, expected in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(step, expected, atol=1e-4, rtol=1e-4)


def check_merge(model, processor, folder) -> None:
    """The merged model computes what the adapter computes."""
    save_adapter(model, processor, folder / "adapter")
    write_merged(folder / "adapter", folder / "merged", processor, dtype=torch.float32)
    expected = logits(model, processor)
    merged = logits(load_whole_model(folder / "merged"), processor)
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
