"""Epochs with and without the cache of frozen features: `python tests/benchmarks/feature_cache.py`.

A ViT-B/32 and an OPT-125M with random weights on the CPU, JPEG files of 224 pixels made from the quickstart's
images, 32 text tokens and four images per sample, and whole training steps (files to batch, forward,
backward, AdamW) in one process. The cache saves the tower's work and the decoding, but not the language
model's work, so it saves more with more images per sample.

The first epoch with the cache fills it; later ones are compared with epochs without it. Both are measured
alternately, and the fastest of each counts. On a busy machine, run with OMP_NUM_THREADS=1 and --cpu-time,
which counts the CPU seconds of this process.
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
    Frames,
    collate_frames,
    lookup_frame,
    open_feature_cache,
)
from flamingo_ft.data.media import open_image
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

IMAGES = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
TOKENS = 32
# Trainable parts: LoRA on the language model with a frozen bridge, the cross-attention, or the whole bridge.
REGIMES = {
    "lora": (
        TrainableSection(perceiver=False, cross_attention=False, new_tokens=False),
        LoraSection(language=LoraPart()),
    ),
    "cross_attention": (TrainableSection(perceiver=False), LoraSection()),
    "bridge": (TrainableSection(), LoraSection()),
}


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    model, processor = make_model(args.regime, args.every)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), args.images)
        samples = list(groups(files, args.images_per_sample))
        features = open_feature_cache(
            model, processor.image_processor.transform_record, CacheSection(folder=Path(folder) / "cache")
        )
        media_fns = {
            "without": partial(load_pixels, processor),
            "with": partial(load_tokens, processor, features),
        }
        clock = time.process_time if args.cpu_time else time.perf_counter
        epoch = partial(run_epoch, model, samples, args.batch_size, clock)
        first = epoch(media_fns["with"])
        seconds = {name: [] for name in media_fns}
        for _ in range(args.epochs):
            for name, media in media_fns.items():
                seconds[name].append(epoch(media))
    best = {name: min(times) for name, times in seconds.items()}
    print(
        f"{args.regime}, a cross-attention block every {args.every} layers, {torch.get_num_threads()} threads"
    )
    print(f"{len(samples)} samples of {args.images_per_sample} images, batches of {args.batch_size}")
    print(f"first epoch with the cache {first:.1f} s")
    print("  ".join(f"{name} the cache {best[name]:.1f} s" for name in media_fns))
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
    """Return the Flamingo in training mode, trainable as in the regime, and its processor."""
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
    """Write the first ``count`` images of the quickstart as JPEG files of 224 x 224 pixels."""
    files = [folder / f"{path.stem}.jpg" for path in sorted(IMAGES.glob("*.png"))[:count]]
    for file in files:
        Image.open(IMAGES / f"{file.stem}.png").convert("RGB").resize(
            (224, 224), Image.Resampling.BICUBIC
        ).save(file)
    return files


def load_pixels(processor: FlamingoProcessor, samples: list[list[Path]]) -> dict[str, Tensor]:
    """Return the media of a batch without the cache."""
    return processor.read_media([[open_image(file) for file in sample] for sample in samples])


def load_tokens(
    processor: FlamingoProcessor, features: FeatureCache, samples: list[list[Path]]
) -> dict[str, Tensor]:
    """Return the media of a batch with the cache."""

    def lookup(file: Path) -> Frame:
        decode = lambda: processor.image_processor.transform(open_image(file))  # noqa: E731
        return lookup_frame(features.store, file.read_bytes(), decode)

    rows = [[Frames([lookup(file)]) for file in sample] for sample in samples]
    return features.complete(collate_frames(rows))


def run_epoch(
    model: FlamingoForConditionalGeneration,
    samples: list[list[Path]],
    batch_size: int,
    clock: Callable[[], float],
    media: Callable[[list[list[Path]]], dict[str, Tensor]],
) -> float:
    """Train for one epoch, and return its seconds."""
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
