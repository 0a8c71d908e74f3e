"""Speed of the data pipeline compared with a plain loop over `datasets` and torchvision; cost of a long file.

    python -m tests.benchmarks.data_pipeline [--images 1000] [--rows 1000000]

Prints samples per second of this package's batches and of the plain loop, medians of rounds in turn, over
the same photo-sized JPEG files in the same process, with the nano tokenizer and a transform to 224 x 224;
then for a file of many rows, indexed and streamed: seconds to the first batch, and the growth of the
process's memory until then and after 300 more batches.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image
from torchvision import transforms

from flamingo_ft.backbones.language import load_language
from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.config.library import library_folder
from flamingo_ft.data import open_data
from flamingo_ft.data.batches import Batches, LoaderConfig, one_sample_per_row
from flamingo_ft.data.collate import collate_text
from flamingo_ft.data.encode import encode_within
from flamingo_ft.data.examples import DataStats, ExampleDataset
from flamingo_ft.data.media import PixelLoader
from flamingo_ft.data.sample_order import SampleOrder
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.views import stack_media

BATCH, SIDE, PHOTO = 32, 224, (640, 480)
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
PREPROCESS = {"size": SIDE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}


def make_processor() -> FlamingoProcessor:
    """Return a processor with the nano tokenizer and a transform of the usual size."""
    tokenizer = load_language("nano").tokenizer
    add_media_tokens(tokenizer)
    return FlamingoProcessor.for_backbones(PREPROCESS, tokenizer)


def write_photos(folder: Path, count: int) -> Path:
    """Write ``count`` JPEG files of a photo's size, resized scans, and a JSONL file with a row for each."""
    scans = sorted((library_folder() / "quickstart" / "images").glob("*.png"))
    with (folder / "photos.jsonl").open("w") as file:
        for index in range(count):
            name = f"{index}.jpg"
            Image.open(scans[index % len(scans)]).convert("RGB").resize(PHOTO, Image.BICUBIC).save(
                folder / name
            )
            file.write(json.dumps(row(index, [name])) + "\n")
    return folder / "photos.jsonl"


def row(index: int, images: list[str]) -> dict:
    answer = f"It is picture number {index}."
    return {
        "messages": [
            {"role": "user", "content": "Which picture is this?"},
            {"role": "assistant", "content": answer},
        ],
        "images": images,
    }


def our_batches(path: Path, processor: FlamingoProcessor, workers: int, streaming: bool = False) -> Batches:
    """Return batches as training prepares them."""
    section = DataSection(train=(DataSource(path=path, streaming=streaming),))
    data = open_data(section, seed=0)
    order = SampleOrder(data.train, 0, section.shuffle_buffer)
    encode = partial(encode_within, processor, max_text_tokens=512)
    return Batches(
        order.indices,
        ExampleDataset([mixed.source for mixed in data.train], encode, PixelLoader(processor)),
        one_sample_per_row(BATCH),
        lambda rows: (
            collate_text([one.encoded for (one,) in rows], 0) | stack_media([one.media for (one,) in rows])
        ),
        DataStats(False, 0.05, order.epoch_length),
        LoaderConfig(BATCH, workers),
    )


def plain_batches(path: Path, processor: FlamingoProcessor, workers: int) -> Iterator[dict]:
    """Yield the batches of a plain script: `datasets`, torchvision and a tokenizer, no labels or checks."""
    transform = transforms.Compose(
        [
            transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))

    def collate(samples: list[dict]) -> dict:
        texts = [
            processor.tokenizer.apply_chat_template(sample["messages"], tokenize=False) for sample in samples
        ]
        pictures = [
            transform(Image.open(path.parent / sample["images"][0]).convert("RGB")) for sample in samples
        ]
        return {
            **processor.tokenizer(texts, padding=True, return_tensors="pt"),
            "pixel_values": torch.stack(pictures),
        }

    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, num_workers=workers, collate_fn=collate)
    while True:
        yield from loader


def samples_per_second(batches: Iterator[dict], count: int) -> float:
    """Return the speed over ``count`` batches after the first."""
    next(batches)
    start = time.perf_counter()
    samples = sum(len(batch["input_ids"]) for batch in islice(batches, count))
    return samples / (time.perf_counter() - start)


def in_turn(
    path: Path, processor: FlamingoProcessor, workers: int, count: int, rounds: int
) -> tuple[float, float]:
    """Return the median speed of this package and of the plain loop, measured in turn."""
    loops = our_batches, plain_batches
    speeds = [
        [samples_per_second(iter(loop(path, processor, workers)), count) for loop in loops]
        for _ in range(rounds)
    ]
    ours, plain = map(statistics.median, zip(*speeds, strict=True))
    return ours, plain


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def long_file(path: Path, processor: FlamingoProcessor, streaming: bool) -> str:
    """Return seconds to the first batch, and memory, in words."""
    before, start = resident_mib(), time.perf_counter()
    batches = iter(our_batches(path, processor, workers=0, streaming=streaming))
    next(batches)
    first, at_first = time.perf_counter() - start, resident_mib()
    for _ in islice(batches, 300):
        pass
    return (
        f"first batch after {first:.2f} s, {at_first - before:.0f} MiB more; "
        f"after 300 more batches {resident_mib() - before:.0f} MiB more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    processor = make_processor()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_photos(folder, args.images)
        for workers in (0, 2):
            ours, plain = in_turn(path, processor, workers, args.batches, args.rounds)
            print(f"{workers} workers: {ours:.0f} samples/s, plain loop {plain:.0f} ({ours / plain:.2f}x)")
        rows = folder / "rows.jsonl"
        with rows.open("w") as file:
            file.writelines(json.dumps(row(index, [])) + "\n" for index in range(args.rows))
        print(f"{args.rows:,} rows, {rows.stat().st_size / 2**20:.0f} MiB")
        for streaming in (False, True):
            print(f"{'streamed' if streaming else 'indexed'}: {long_file(rows, processor, streaming)}")


if __name__ == "__main__":
    main()
