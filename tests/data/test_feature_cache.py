"""Cached features: stored and fresh tokens are the same bits, and tokens of another tower are never used."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters.lora import add_lora
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.tower import quantize_tower
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import CacheSection, LoraPart, LoraSection
from flamingo_ft.data import feature_cache, feature_store
from flamingo_ft.data.feature_cache import (
    Frames,
    FrozenTower,
    collate_frames,
    lookup_frame,
    open_feature_cache,
)
from flamingo_ft.data.feature_store import FeatureStore, FeatureWriter, bytes_under
from flamingo_ft.errors import UserError

from ..model.tiny import ids, images, tiny_flamingo

PREPROCESS = {"size": [16, 16], "resize_mode": "shortest"}
NOTHING = 1e-9  # GiB: a budget in which no file fits
TOKENS = torch.arange(12.0).view(4, 3)


def opened(folder: Path, model=None, preprocess=PREPROCESS, max_gib=None, dtype="bf16", **options):
    model = tiny_flamingo() if model is None else model
    return open_feature_cache(
        model, preprocess, CacheSection(folder=folder, dtype=dtype, max_gib=max_gib), **options
    )


def contents(number: int) -> bytes:
    """Return the content of a made-up image file."""
    return f"image {number}".encode()


def pixels(number: int) -> torch.Tensor:
    return images(1, seed=number)[0]


def batch_of(store: FeatureStore, *rows: list[list[int]]) -> dict:
    """Collate samples of media of frames, each frame an image by its number."""
    find = lambda number: lookup_frame(store, contents(number), lambda: pixels(number))  # noqa: E731
    return collate_frames([[Frames([find(number) for number in medium]) for medium in row] for row in rows])


def stored(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# Exactness


def test_a_completed_batch_holds_the_towers_tokens_of_every_frame_rounded(tmp_path):
    model = tiny_flamingo()
    features = opened(tmp_path, model)
    batch = features.complete(batch_of(features.store, [[0], [1, 2]], [[2]]) | {"input_ids": ids("II", "Ia")})
    assert batch.keys() == {"vision_tokens", "frame_counts", "input_ids"}
    assert batch["frame_counts"].tolist() == [[1, 2], [1, 0]] and batch["vision_tokens"].shape[:3] == (
        2,
        2,
        2,
    )
    expected = spatial_tokens(model.vision_encoder, torch.stack([pixels(n) for n in (0, 1, 2)]))
    torch.testing.assert_close(batch["vision_tokens"][0, 1, 1].float(), expected[2], rtol=1e-2, atol=1e-2)
    assert torch.equal(batch["vision_tokens"][1, 0, 0], batch["vision_tokens"][0, 1, 1])
    assert not batch["vision_tokens"][1, 1].any() and not batch["vision_tokens"][0, 0, 1].any()
    rows = (0, 0, 1, 2), (2, 2, 0, 0)
    shown = torch.stack([torch.stack([pixels(n) for n in row]) for row in rows]).unflatten(1, (2, 2))
    from_pixels = model(batch["input_ids"], shown, frame_counts=batch["frame_counts"]).logits
    torch.testing.assert_close(model(**batch).logits, from_pixels, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_warm_cold_mixed_and_no_cache_give_the_same_bits(dtype, tmp_path):
    rows = [[0], [1]], [[2], [3]], [[4], [0]]
    none = opened(tmp_path / "none", max_gib=NOTHING, dtype=dtype)
    expected = none.complete(batch_of(none.store, *rows))["vision_tokens"]
    assert stored(tmp_path / "none") == []
    cold = opened(tmp_path / "cold", dtype=dtype)
    cold.complete(batch_of(cold.store, [[3]], [[9], [1]]))
    for already in (3, 6):  # mixed, then warm
        assert len(stored(tmp_path / "cold")) == already
        assert torch.equal(cold.complete(batch_of(cold.store, *rows))["vision_tokens"], expected)
    assert "fresh_pixels" not in batch_of(cold.store, *rows)
    assert len(stored(tmp_path / "cold")) == 6


def test_training_with_a_warm_a_cold_and_no_cache_gives_equal_losses(tmp_path):
    losses = {}
    for name, folder, budget in (("none", "a", NOTHING), ("cold", "b", None), ("warm", "b", None)):
        model = tiny_flamingo()
        features = opened(tmp_path / folder, model, max_gib=budget)
        model.perceiver.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.perceiver.parameters(), lr=1e-2)
        losses[name] = []
        for step in range(6):
            batch = features.complete(batch_of(features.store, [[step % 4]], [[(step + 1) % 4]]))
            loss = model(ids("Iab", "Icd"), labels=ids("Iab", "Icd"), **batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["none"] == losses["cold"] == losses["warm"] and len(set(losses["none"])) == 6


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
def test_an_images_tokens_do_not_depend_on_the_rest_of_its_batch(storage):
    quantization = Quantization(storage) if storage else None
    visual = load_vision("nano", quantization=quantization, device="cpu").visual
    tower = FrozenTower(visual, torch.float32)
    shown = torch.randn(11, 3, 32, 32)
    shown[4] *= 40  # activations beyond what 8 bits round
    together = tower.encode(shown)
    assert tower.batch_size == (1 if storage == "int8" else 8)
    for index in range(11):
        assert torch.equal(tower.encode(shown[index : index + 1])[0], together[index])


def test_a_tower_whose_images_affect_each_other_encodes_one_at_a_time(monkeypatch):
    leaky = lambda visual, pixels: spatial_tokens(visual, pixels) + pixels.mean()  # noqa: E731
    monkeypatch.setattr(feature_cache, "spatial_tokens", leaky)
    assert FrozenTower(load_vision("nano").visual, torch.float32).batch_size == 1


def test_each_image_is_encoded_once_and_text_needs_no_tower(tmp_path):
    model = tiny_flamingo()
    features, counts = opened(tmp_path, model), []
    model.vision_encoder.conv1.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    text = {"input_ids": ids("abc")}
    assert features.complete(text | batch_of(features.store, [], [])) == text
    batch = batch_of(features.store, [[0], [0, 0]], [[1]])
    assert len(batch["fresh_pixels"]) == 2
    for _ in range(2):
        features.complete(batch)
    assert len(stored(tmp_path)) == 2 and counts == [8, 8]


# Keys


def changed_model(name: str):
    model = tiny_flamingo()
    if name == "weights":
        with torch.no_grad():
            model.vision_encoder.ln_pre.weight[0] += 1e-6
    elif name == "dtype":
        model.vision_encoder.to(torch.bfloat16)
    elif name == "quantization":
        quantize_tower(model.vision_encoder, Quantization("nf4"))
    elif name == "architecture":
        model.config.vision_config = {**model.config.vision_config, "quick_gelu": True}
    return model


@pytest.mark.parametrize("name", ["weights", "dtype", "quantization", "architecture"])
def test_another_tower_misses(name, tmp_path):
    assert opened(tmp_path).store.folder != opened(tmp_path, changed_model(name)).store.folder


@pytest.mark.parametrize(
    "options",
    [
        {"preprocess": {**PREPROCESS, "resize_mode": "longest"}},
        {"preprocess": {**PREPROCESS, "size": [32, 32]}},
        {"dtype": "fp16"},
        {"autocast": torch.bfloat16},
    ],
)
def test_another_transform_or_dtype_misses(options, tmp_path):
    assert opened(tmp_path).store.folder != opened(tmp_path, **options).store.folder
    assert opened(tmp_path, **options).store.folder == opened(tmp_path, **options).store.folder


@pytest.mark.parametrize("package", ["torch", "torchvision", "open_clip_torch", "pillow"])
def test_another_software_version_misses(package, tmp_path, monkeypatch):
    before, real = opened(tmp_path).store.folder, feature_store.version
    monkeypatch.setattr(feature_store, "version", lambda name: "0.0" if name == package else real(name))
    assert opened(tmp_path).store.folder != before


def test_a_cache_of_an_older_image_reader_is_never_used(tmp_path, monkeypatch):
    features = opened(tmp_path)
    key = json.loads((features.store.folder / "key.json").read_text())
    before = {name: value for name, value in key.items() if name != "reader"}  # as in older versions
    older = FeatureStore(
        tmp_path / feature_store.folder_name(before), features.store.shape, features.store.dtype
    )
    older.folder.mkdir()
    FeatureWriter(older, tmp_path).add(older.key_of(contents(0)), torch.zeros(older.shape, dtype=older.dtype))
    assert older.get(older.key_of(contents(0))) is not None
    assert "fresh_pixels" in batch_of(opened(tmp_path).store, [[0]])
    monkeypatch.setattr(feature_store, "READER_VERSION", key["reader"] + 1)
    assert opened(tmp_path).store.folder not in (features.store.folder, older.folder)


def test_the_same_tower_hits_and_key_json_describes_it(tmp_path):
    model, quantized = tiny_flamingo(), changed_model("quantization")
    folder = opened(tmp_path, quantized).store.folder
    spatial_tokens(quantized.vision_encoder, images(1))
    assert opened(tmp_path, copy.deepcopy(quantized)).store.folder == folder
    described = json.loads((opened(tmp_path, model).store.folder / "key.json").read_text())
    assert (
        described["preprocess"] == PREPROCESS
        and described["device"] == "cpu"
        and described["dtype"] == "bf16"
    )
    assert {"torch", "torchvision", "open_clip_torch", "pillow"} <= described["versions"].keys()


def test_other_bytes_or_another_frame_are_another_image():
    key = FeatureStore.key_of
    assert len({key(b"a"), key(b"b"), key(b""), key(b"a", 0), key(b"a", 1), key(b"a", 11)}) == 6
    assert key(b"a", 1) == key(b"a", 1)


def test_lora_on_the_tower_is_refused(tmp_path):
    model = tiny_flamingo()
    add_lora(model, LoraSection(vision=LoraPart(r=2)))
    with pytest.raises(UserError, match="LoRA changes the tower"):
        opened(tmp_path, model)


# Files


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    folder = tmp_path / "store"
    folder.mkdir()
    return FeatureStore(folder, (4, 3), torch.float32)


KEY = FeatureStore.key_of(b"an image")


def write_tokens(store: FeatureStore, **options) -> FeatureWriter:
    writer = FeatureWriter(store, store.folder, **options)
    writer.add(KEY, TOKENS)
    return writer


def test_added_tokens_are_read_by_a_pickled_store(store):
    write_tokens(store)
    assert torch.equal(pickle.loads(pickle.dumps(store)).get(KEY), TOKENS)
    assert store.get(FeatureStore.key_of(b"another")) is None


DAMAGE = {
    "emptied": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut in the data": lambda content: content[:-1],
    "lengthened": lambda content: content + b"\0",
    "one bit of the data": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "data never written": lambda content: content[:-48] + bytes(48),
    "not safetensors": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_counts_as_missing_and_is_replaced(damage, store):
    write_tokens(store)
    path = store.path(KEY)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert store.get(KEY) is None
    write_tokens(store)
    assert torch.equal(store.get(KEY), TOKENS)


@pytest.mark.parametrize(
    "other",
    [
        lambda store: FeatureStore(store.folder, (3, 4), store.dtype),
        lambda store: FeatureStore(store.folder, store.shape, torch.bfloat16),
    ],
)
def test_tokens_of_another_shape_or_dtype_count_as_missing(other, store):
    write_tokens(store)
    assert other(store).get(KEY) is None


def test_a_file_under_another_images_name_counts_as_missing(store):
    write_tokens(store)
    wrong = FeatureStore.key_of(b"another")
    store.path(wrong).parent.mkdir(exist_ok=True)
    store.path(wrong).write_bytes(store.path(KEY).read_bytes())
    assert store.get(wrong) is None


# Budget and disk


def test_the_folder_is_not_filled_beyond_the_budget_and_nothing_is_evicted(store):
    size = len(store.content(KEY, TOKENS))
    for _ in range(2):
        writer = FeatureWriter(store, store.folder, max_bytes=int(3.5 * size))
        for number in range(5):
            writer.add(FeatureStore.key_of(contents(number)), TOKENS)
        assert [store.get(FeatureStore.key_of(contents(n))) is not None for n in range(5)] == [True] * 3 + [
            False
        ] * 2
    assert bytes_under(store.folder) <= 3.5 * size


def test_ranks_share_the_budget(store):
    size = len(store.content(KEY, TOKENS))
    ranks = [FeatureWriter(store, store.folder, max_bytes=int(4.5 * size), writers=2) for _ in range(2)]
    for number in range(10):
        ranks[number % 2].add(FeatureStore.key_of(contents(number)), TOKENS)
    assert len(stored(store.folder)) == 4


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"data.cache.folder: .*file/cache cannot be written \(Not a directory\)"
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_a_full_disk_stops_adding_with_one_warning(tmp_path):
    features = opened(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))  # no file grows beyond 64 bytes
        try:
            completed = [
                features.complete(batch_of(features.store, [[n]]))["vision_tokens"] for n in range(3)
            ]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ["cannot be written (File too large)" in str(w.message) for w in caught] == [True]
    assert len(completed) == 3 and stored(tmp_path) == [] and not list(tmp_path.rglob("partial/*"))


def test_a_folder_that_became_read_only_is_still_read(tmp_path, monkeypatch):
    features = opened(tmp_path)
    warm = features.complete(batch_of(features.store, [[0]]))["vision_tokens"]
    refuse = lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))  # noqa: E731
    monkeypatch.setattr(os, "replace", refuse)
    again = opened(tmp_path)
    with pytest.warns(UserWarning, match="Read-only file system"):
        again.complete(batch_of(again.store, [[1]]))
    assert torch.equal(again.complete(batch_of(again.store, [[0]]))["vision_tokens"], warm)


# Several processes, and killed ones


def fill(store: FeatureStore, worker: int) -> None:
    writer = FeatureWriter(store, store.folder)
    for number in range(40):
        number = (number + 7 * worker) % 40
        writer.add(store.key_of(contents(number)), TOKENS + number)


def test_processes_that_fill_one_folder_leave_each_image_whole(store):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(store, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    for number in range(40):
        assert torch.equal(store.get(store.key_of(contents(number))), TOKENS + number)
    assert not list(store.folder.rglob("partial/*"))


FILL = """
import sys, torch
from pathlib import Path
from flamingo_ft.data.feature_store import FeatureStore, FeatureWriter
store = FeatureStore(Path(sys.argv[1]), (400, 768), torch.float32)
writer = FeatureWriter(store, store.folder)
print("ready", flush=True)
for number in range(100000):
    writer.add(store.key_of(b"%d" % number), torch.full((400, 768), float(number)))
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_only_whole_files_and_its_partial_files_are_removed_later(tmp_path):
    store = FeatureStore(tmp_path, (400, 768), torch.float32)
    writing = subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path)], stdout=subprocess.PIPE)
    writing.stdout.readline()
    deadline = time.monotonic() + 30
    while len(stored(tmp_path)) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    writing.stdout.close()
    whole = stored(tmp_path)
    assert len(whole) >= 20
    for path in whole:
        tokens = store.get(path.stem)
        assert tokens is not None and (tokens == tokens[0, 0]).all()
    partial = tmp_path / "partial" / "left-behind"
    partial.write_bytes(b"half")
    FeatureWriter(store, tmp_path)
    assert partial.exists()  # another run may be writing it
    os.utime(partial, (0, 0))
    FeatureWriter(store, tmp_path)
    assert not partial.exists()
