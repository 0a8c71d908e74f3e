"""Epochs with and without the cache of frozen features: `python tests/benchmarks/feature_cache.py`.

A ViT-B/32 and an OPT-125M with random weights on the CPU, JPEG files of 224 pixels made from the quickstart's
images, 32 text tokens and four images a sample, and whole training steps: files to batch, forward, backward,
AdamW; all in one process. What is saved is the tower's work and the decoding, what stays is the language
model's: the more images a sample has, the more it is worth.

The first epoch with the cache fills it; its later ones are set against epochs without. Both are measured in
turn, and the fastest of each counts. On a machine that does other things beside, run with OMP_NUM_THREADS=1
and --cpu-time, which counts the seconds that this process had.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from flamingo_ft import build_flamingo, load_vision
from flamingo_ft.adapters import add_lora, set_trainable, trainable_parameters
from flamingo_ft.backbones.language import NANO_FOLDER, LanguageBackbone
from flamingo_ft.config import CacheSection, LoraPart, LoraSection, TrainableSection
from flamingo_ft.data.feature_cache import (
    FeatureCache,
    Frame,
    collate_frames,
    lookup_frame,
    open_feature_cache,
)
from flamingo_ft.data.media import open_image
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

IMAGES = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
TOKENS = 32
# What trains: LoRA on the language model beside a trained bridge that stays, the cross-attention, or the
# whole bridge.
REGIMES = {
    "lora": (
        TrainableSection(perceiver=False, cross_attention=False, new_tokens=False),
        LoraSection(language=LoraPart()),
    ),
    "cross_attention": (TrainableSection(perceiver=False), LoraSection()),
    "bridge": (TrainableSection(), LoraSection()),
}


def main() -> None:
    wanted = arguments()
    torch.manual_seed(0)
    model, processor = make_model(wanted.regime, wanted.every)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), wanted.images)
        samples = list(groups(files, wanted.images_per_sample))
        features = open_feature_cache(
            model, processor.image_processor.open_clip_preprocess, CacheSection(folder=Path(folder) / "cache")
        )
        ways = {"without": partial(pixels_of, processor), "with": partial(tokens_of, processor, features)}
        clock = time.process_time if wanted.cpu_time else time.perf_counter
        epoch = partial(run_epoch, model, samples, wanted.batch_size, clock)
        first = epoch(ways["with"])
        seconds = {name: [] for name in ways}
        for _ in range(wanted.epochs):
            for name, media in ways.items():
                seconds[name].append(epoch(media))
    best = {name: min(times) for name, times in seconds.items()}
    print(
        f"{wanted.regime}, a cross-attention block every {wanted.every} layers, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{len(samples)} samples of {wanted.images_per_sample} images, batches of {wanted.batch_size}")
    print(f"first epoch with the cache {first:.1f} s")
    print("  ".join(f"{name} the cache {best[name]:.1f} s" for name in ways))
    print(f"later epochs are {best['without'] / best['with']:.2f} times as fast with the cache")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regime", choices=REGIMES, default="lora")
    parser.add_argument("--every", type=int, default=4, help="cross_attn_every_n_layers")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--images-per-sample", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args()


def make_model(regime: str, every: int) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The Flamingo, in training mode, with what the regime trains."""
    source = {"name": "random", "revision": None, "sha256": None}
    language = LanguageBackbone(
        OPTForCausalLM(OPTConfig()), AutoTokenizer.from_pretrained(NANO_FOLDER), source
    )
    model, processor = build_flamingo(load_vision("ViT-B-32"), language, cross_attn_every_n_layers=every)
    trainable, lora = REGIMES[regime]
    set_trainable(model, trainable)
    add_lora(model, lora)
    set_trainable(model, trainable, lora)
    return model.train(), processor


def make_images(folder: Path, count: int) -> list[Path]:
    """The first so many of the quickstart's images as JPEG files of 224 x 224 pixels."""
    files = [folder / f"{path.stem}.jpg" for path in sorted(IMAGES.glob("*.png"))[:count]]
    for file in files:
        Image.open(IMAGES / f"{file.stem}.png").convert("RGB").resize(
            (224, 224), Image.Resampling.BICUBIC
        ).save(file)
    return files


def pixels_of(processor: FlamingoProcessor, samples: list[list[Path]]) -> dict[str, Tensor]:
    """What a batch of images is without the cache."""
    return {
        "pixel_values": processor.pixel_values([[open_image(file) for file in sample] for sample in samples])
    }


def tokens_of(
    processor: FlamingoProcessor, features: FeatureCache, samples: list[list[Path]]
) -> dict[str, Tensor]:
    """And what it is with it."""

    def find(file: Path) -> Frame:
        decode = lambda: processor.image_processor.transform(open_image(file))  # noqa: E731
        return lookup_frame(features.store, file.read_bytes(), decode)

    return features.complete(collate_frames([[[find(file)] for file in sample] for sample in samples]))


def run_epoch(
    model: FlamingoForConditionalGeneration,
    samples: list[list[Path]],
    batch_size: int,
    clock: Callable[[], float],
    media: Callable[[list[list[Path]]], dict[str, Tensor]],
) -> float:
    """Seconds of one epoch."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4)
    start = clock()
    for batch in groups(samples, batch_size):
        ids = torch.randint(5, 100, (len(batch), TOKENS))
        ids[:, : len(batch[0])] = model.config.media_token_id
        loss = model(ids, labels=ids, **media(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock() - start


def groups(items: list, size: int) -> Iterator[list]:
    yield from (items[start : start + size] for start in range(0, len(items), size))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
