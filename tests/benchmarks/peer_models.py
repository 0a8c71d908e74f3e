"""This package's model and open-flamingo's, with the same weights, for `tests.benchmarks.peer`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.cpu_attention import float32_attention_on_cpu
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import TrainableSection, load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.parts import cast_model, cast_parameter, cast_parameters
from flamingo_ft.training.build import make_trainer
from flamingo_ft.training.trainer import FlamingoTrainer
from tests.regimes import shake

LLAMA = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=32_000,
    max_position_embeddings=4096,
)
TOWER, EVERY = "ViT-B-32", 1
ANSWER = 0.25  # share of the tokens that are learned
LEARNING_RATE = 1e-4
BF16 = torch.bfloat16

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Ours:
    """This package's model and its trainer.

    In bf16, frozen backbones are kept in it and the bridge is trained in float32 under autocast, as
    ``train.precision: auto`` does.
    """

    model: FlamingoForConditionalGeneration
    trainer: FlamingoTrainer

    @classmethod
    def build(cls, folder: Path, precision: str = "fp32", config: PreTrainedConfig = LLAMA) -> Ours:
        """Build it with random weights, the same at every call. config: of the language model."""
        torch.manual_seed(0)
        tower, nano = load_vision(TOWER), load_language("nano")
        lm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        language = LanguageBackbone(lm, nano.tokenizer, nano.source)
        model, processor = build_flamingo(tower, language, cross_attn_every_n_layers=EVERY)
        set_trainable(model, TrainableSection(new_tokens=False))
        shake(model, 0.1)
        assert model.token_rows is not None
        model.token_rows.copy_from(model.lang_encoder)  # open-flamingo has no rows of its own
        if precision == "bf16":
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    cast_parameter(name, parameter, BF16)
        return cls(model, _trainer(model, processor, folder, precision))

    def step(self, batch: Batch) -> float:
        """Run one training step; return its loss."""
        self.model.train()
        with float32_attention_on_cpu():
            loss = self.trainer.compute_loss(self.model, dict(batch))
            loss.backward()
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def with_cached_tokens(self, batch: Batch) -> Batch:
        """Return the batch with the tower's tokens, as the feature cache gives them, and no pixels."""
        pixels = batch["pixel_values"]
        tokens = spatial_tokens(self.model.vision_encoder, pixels.flatten(0, 1))
        others = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        return others | {"vision_tokens": tokens.unflatten(0, pixels.shape[:2])[:, :, None]}

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Return the generated tokens."""
        ids = batch["input_ids"]
        output = self.model.eval().generate(ids, pixel_values=batch["pixel_values"], **options)
        return output[:, ids.shape[1] :]

    def language_model_alone(self) -> LlamaForCausalLM:
        """Return a copy of the language model that no image conditions."""
        lm = LlamaForCausalLM(LLAMA)
        lm.load_state_dict(self.model.lang_encoder.state_dict())
        cast_parameters(lm, self.model.lang_encoder.dtype)
        return lm.eval()


def _trainer(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path, precision: str
) -> FlamingoTrainer:
    """Return this package's trainer, whose own data are not used."""
    course = {"optimizer": "adamw", "learning_rate": LEARNING_RATE, "weight_decay": 0.0, "warmup_steps": 0}
    course |= {"precision": precision, "output_dir": folder}
    values = [f"train.{key}={value}" for key, value in course.items()]
    recipe = load_recipe("quickstart", values)
    trainer = make_trainer(model, processor, open_data(recipe.data, 0), recipe, [])
    assert isinstance(trainer, FlamingoTrainer)
    trainer.accelerator.prepare_model(model)  # computes under autocast from here on
    return trainer


def in_bf16_for_answers(ours: Ours) -> Ours:
    """Return a copy of the model with all weights but gates in bf16, as ``--dtype auto`` loads it."""
    twin = Ours.build(Path(ours.trainer.args.output_dir))
    twin.model.load_state_dict(ours.model.state_dict())
    cast_model(twin.model, BF16)
    return twin


class Peer:
    """Open-flamingo's model with copies of our backbones and of our bridge, and an AdamW."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.utils import extend_instance

        from tests.golden.record_open_flamingo import peer_mixin

        visual, lm = copy.deepcopy(model.vision_encoder), LlamaForCausalLM(LLAMA)
        lm.load_state_dict(model.lang_encoder.state_dict())
        visual.output_tokens = visual.final_ln_after_pool = True
        extend_instance(lm, peer_mixin(lm))
        lm.set_decoder_layers_attr_name("model.layers")
        tokens = model.config.eoc_token_id, model.config.media_token_id
        clip = SimpleNamespace(visual=visual)
        width = model.config.vision_width
        self.model: nn.Module = Flamingo(clip, lm, *tokens, width, cross_attn_every_n_layers=EVERY)
        self.copy_bridge(model)
        self.model.requires_grad_(False)
        for part in (self.model.perceiver, lm.gated_cross_attn_layers):
            part.requires_grad_(True)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def copy_bridge(self, model: FlamingoForConditionalGeneration) -> None:
        """Take over the bridge of this package's model."""
        lm = self.model.lang_encoder
        self.model.perceiver.load_state_dict(model.perceiver.state_dict())
        lm.gated_cross_attn_layers.load_state_dict(model.gated_cross_attn_layers.state_dict())

    def step(self, batch: Batch, autocast: bool = False) -> float:
        """Run one training step of open-flamingo's loop, in float32 or under bf16 autocast."""
        self.model.train()
        inputs = {"lang_x": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.autocast("cpu", BF16, enabled=autocast):
            output = self.model(vision_x=batch["pixel_values"][:, :, None], labels=batch["labels"], **inputs)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.loss.item()

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Return the generated tokens."""
        ids = batch["input_ids"]
        with torch.inference_mode():
            output = self.model.eval().generate(batch["pixel_values"][:, :, None], ids, **options)
        return output[:, ids.shape[1] :]


def make_batch(size: int, images: int, tokens: int, media_token_id: int) -> Batch:
    """Return a batch of samples with ``images`` images, evenly spread over ``tokens`` tokens."""
    dice = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 3000, (size, tokens), generator=dice)
    ids[ids == media_token_id] += 1
    ids[:, torch.arange(images) * (tokens // images)] = media_token_id
    labels = torch.where(ids == media_token_id, IGNORED, ids)
    labels[:, : int(tokens * (1 - ANSWER))] = IGNORED
    pixels = torch.randn(size, images, 3, 224, 224, generator=dice)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
