"""Language models whose loss TRL would compute wrongly are refused before training."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.model import build_flamingo
from flamingo_ft.training.build import make_trainer
from flamingo_ft.training.preflight import check_loss, check_packing

from .test_train import folder, recipe  # noqa: F401  (a fixture)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def trainer_for(model_type: str, **options):
    tokenizer = load_language("nano").tokenizer
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**SIZES, **options})
    language = LanguageBackbone(AutoModelForCausalLM.from_config(config), tokenizer, {"name": model_type})
    sizes = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    model, processor = build_flamingo(load_vision("nano"), language, perceiver=sizes)
    config = recipe()
    set_trainable(model, config.trainable)
    return make_trainer(model, processor, open_data(config.data, 0), config, [])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "gemma2", "cohere"])
def test_families_with_a_plain_head_train(folder, family):  # noqa: F811
    assert trainer_for(family, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize(
    ("family", "options"), [("bert", {"is_decoder": True}), ("roberta", {"is_decoder": True})]
)
def test_families_with_a_transform_in_the_head_are_refused(folder, family, options):  # noqa: F811
    with pytest.raises(UserError, match=f"the training loss of a {family} model would not be its own"):
        trainer_for(family, **options)


def test_running_out_of_memory_in_a_check_is_not_blamed_on_the_model_family(folder, monkeypatch):  # noqa: F811
    def gpu_is_full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    trainer = trainer_for("llama", num_key_value_heads=2, head_dim=16)
    monkeypatch.setattr(trainer.model, "forward", gpu_is_full)
    with pytest.raises(torch.OutOfMemoryError):
        check_loss(trainer)
    with pytest.raises(torch.OutOfMemoryError):
        check_packing(trainer.model)
