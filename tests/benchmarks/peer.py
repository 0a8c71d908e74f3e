"""Training steps and generation beside open-flamingo 2.0.1: `python -m tests.benchmarks.peer`.

    pip install --no-deps open-flamingo==2.0.1 einops einops-exts

Both models have the same weights (a LLaMA of 6 layers of width 512, ViT-B-32, all random, cross-attention
before every layer) and get the same batches in turn; losses and generated tokens must be equal. `step` is
forward, loss, backward and AdamW as this package's trainer and as open-flamingo's training loop do them, with
the pixels of distinct images, and with the tower's tokens cached as in later epochs, which open-flamingo does
not have. Prints medians and ratios, and writes them to `--json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo_ft.adapters import set_trainable, trainable_parameters
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import TrainableSection, load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.data.encode import IGNORED
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
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
NEW_TOKENS = 32
LEARNING_RATE = 1e-4
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """This package's model with its trainer, and open-flamingo's model with an optimizer."""

    ours: FlamingoForConditionalGeneration
    trainer: FlamingoTrainer
    peer: nn.Module
    peer_optimizer: torch.optim.Optimizer


def make_pair(folder: Path) -> Pair:
    """Build both models with the same random weights."""
    torch.manual_seed(0)
    tower, nano = load_vision(TOWER), load_language("nano")
    language = LanguageBackbone(LlamaForCausalLM(LLAMA).requires_grad_(False), nano.tokenizer, nano.source)
    model, processor = build_flamingo(tower, language, cross_attn_every_n_layers=EVERY)
    trainable = TrainableSection(new_tokens=False)
    set_trainable(model, trainable)
    shake(model, 0.1)
    assert model.token_rows is not None
    model.token_rows.copy_from(model.lang_encoder)  # open-flamingo has no rows of its own
    peer = make_peer(model)
    options = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], **options)
    return Pair(model, _trainer(model, processor, folder), peer, optimizer)


def _trainer(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path
) -> FlamingoTrainer:
    """Return this package's trainer, whose own data are not used."""
    values = ("train.optimizer=adamw", "train.precision=fp32", f"train.output_dir={folder}")
    recipe = load_recipe("quickstart", values)
    trainer = make_trainer(model, processor, open_data(recipe.data, 0), recipe, [])
    assert isinstance(trainer, FlamingoTrainer)
    parameters = [*trainable_parameters(model).values()]
    trainer.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    return trainer


def make_peer(model: FlamingoForConditionalGeneration) -> nn.Module:
    """Return open-flamingo's model with copies of the backbones and of the bridge."""
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
    peer = Flamingo(clip, lm, *tokens, model.config.vision_width, cross_attn_every_n_layers=EVERY)
    copy_bridge(model, peer)
    peer.requires_grad_(False)
    for part in (peer.perceiver, lm.gated_cross_attn_layers):
        part.requires_grad_(True)
    return peer


def copy_bridge(model: FlamingoForConditionalGeneration, peer: nn.Module) -> None:
    """Give open-flamingo's model the bridge of this package's."""
    peer.perceiver.load_state_dict(model.perceiver.state_dict())
    peer.lang_encoder.gated_cross_attn_layers.load_state_dict(model.gated_cross_attn_layers.state_dict())


def make_batch(
    model: FlamingoForConditionalGeneration, size: int, images: int, tokens: int
) -> dict[str, Tensor]:
    """Return a batch of samples with ``images`` images, evenly spread over ``tokens`` tokens."""
    dice = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 3000, (size, tokens), generator=dice)
    ids[:, torch.arange(images) * (tokens // images)] = model.config.media_token_id
    labels = torch.where(ids == model.config.media_token_id, IGNORED, ids)
    labels[:, : int(tokens * (1 - ANSWER))] = IGNORED
    pixels = torch.randn(size, images, 3, 224, 224, generator=dice)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def our_step(pair: Pair, batch: dict[str, Tensor]) -> float:
    """Run one training step; return its loss."""
    pair.ours.train()
    loss = pair.trainer.compute_loss(pair.ours, dict(batch))
    loss.backward()
    pair.trainer.optimizer.step()
    pair.trainer.optimizer.zero_grad()
    return loss.item()


def peer_step(pair: Pair, batch: dict[str, Tensor]) -> float:
    """Run one training step of open-flamingo's loop; return its loss."""
    pair.peer.train()
    inputs = {"lang_x": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    loss = pair.peer(vision_x=batch["pixel_values"][:, :, None], labels=batch["labels"], **inputs).loss
    loss.backward()
    pair.peer_optimizer.step()
    pair.peer_optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def with_cached_tokens(pair: Pair, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with the tower's tokens, as the feature cache gives them, in place of the pixels."""
    pixels = batch["pixel_values"]
    tokens = spatial_tokens(pair.ours.vision_encoder, pixels.flatten(0, 1))
    others = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    return others | {"vision_tokens": tokens.unflatten(0, pixels.shape[:2])[:, :, None]}


def alternate(repeats: int, *runs: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Call each of ``runs`` in turn, the first round unmeasured; return median seconds, and last results."""
    times: list[list[float]] = [[] for _ in runs]
    results: list[Any] = [run() for run in runs]
    for _ in range(repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            results[index] = run()
            times[index].append(time.perf_counter() - start)
    return [statistics.median(one) for one in times], results


def measure_steps(pair: Pair, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of images."""
    for images in arguments.images:
        batch = make_batch(pair.ours, arguments.batch_size, images, arguments.tokens)
        cached = with_cached_tokens(pair, batch)
        copy_bridge(pair.ours, pair.peer)
        losses = our_step(pair, batch), peer_step(pair, batch)
        assert abs(losses[0] - losses[1]) < LOSS_TOLERANCE * losses[1], losses
        runs = (
            partial(our_step, pair, batch),
            partial(our_step, pair, cached),
            partial(peer_step, pair, batch),
        )
        (first, later, peer), _ = alternate(arguments.repeats, *runs)
        yield {"images": images, "first epoch": first, "later epochs": later, "open-flamingo": peer}


def our_generation(pair: Pair, batch: dict[str, Tensor], beams: int) -> Tensor:
    """Return the generated tokens."""
    ids = batch["input_ids"]
    output = pair.ours.generate(ids, pixel_values=batch["pixel_values"], **_decoding(beams))
    return output[:, ids.shape[1] :]


def peer_generation(pair: Pair, batch: dict[str, Tensor], beams: int) -> Tensor:
    """Return the tokens that open-flamingo generates."""
    ids = batch["input_ids"]
    with torch.inference_mode():
        output = pair.peer.generate(batch["pixel_values"][:, :, None], ids, **_decoding(beams))
    return output[:, ids.shape[1] :]


def _decoding(beams: int) -> dict[str, Any]:
    tokens = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return {"num_beams": beams, "do_sample": False, "eos_token_id": 1, **tokens}


def measure_generation(pair: Pair, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of beams and images."""
    pair.ours.eval(), pair.peer.eval()
    copy_bridge(pair.ours, pair.peer)  # training moves them apart by rounding
    for beams in (1, 3):
        for images in arguments.images:
            batch = make_batch(pair.ours, 1, images, 8 * images)
            runs = (partial(run, pair, batch, beams) for run in (our_generation, peer_generation))
            (ours, peer), (own, other) = alternate(arguments.repeats, *runs)
            equal = bool(torch.equal(own, other))
            yield {"beams": beams, "images": images, "ours": ours, "open-flamingo": peer, "equal": equal}


PARTS = {"step": measure_steps, "generate": measure_generation}


def print_row(row: dict[str, Any]) -> None:
    """Print a row, with how many times as fast as the peer each of our times is."""
    cells = [f"{name} {value}" for name, value in row.items() if not isinstance(value, float)]
    peer = row["open-flamingo"]
    for name, value in row.items():
        if isinstance(value, float):
            cells.append(
                f"{name} {value:.3f} s" + ("" if name == "open-flamingo" else f" ({peer / value:.2f}x)")
            )
    print(" · ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of: {', '.join(PARTS)}"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 17, 32])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), **vars(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(Path(folder))
        for part in arguments.parts or PARTS:
            record[part] = []
            for row in PARTS[part](pair, arguments):
                print_row(row)
                record[part].append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main()
