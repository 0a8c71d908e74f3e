"""Compare the measured memory of training with the planned one, on models with random weights.

Run `python tests/benchmarks/training_memory.py SHAPE REGIME`.

Builds a shape in 4 bits, layer by layer, trains it for a few steps with the package's trainer on synthetic
samples, and prints the peak memory next to that of `flamingo-ft plan` for the same recipe. On CUDA: torch's
peaks of allocated and reserved memory. On a CPU, each in a process of its own: resident memory (VmHWM during
training minus VmRSS before the model was built, after a tiny training run; includes buffers of MKL and
oneDNN), and the bytes of live tensors, counted operator by operator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from flamingo_ft.adapters import add_lora, set_trainable
from flamingo_ft.backbones.language import NANO_FOLDER, LanguageBackbone, language_files
from flamingo_ft.backbones.quantization import Quantization, quantize_linears
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import Recipe, load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.plan import plan_memory
from flamingo_ft.plan.memory_tracker import MemoryTracker
from flamingo_ft.training.build import build_model, make_trainer

GIB = 2**30
# MPT-7B, RedPajama-INCITE-3B, MPT-1B, and a shape that trains on a CPU: type, width, layers, tower, cross-
# attention interval.
SHAPES = {
    "openflamingo-9b": ("mpt", 4096, 32, "ViT-L-14", 4),
    "openflamingo-4b": ("gpt_neox", 2560, 32, "ViT-L-14", 2),
    "openflamingo-3b": ("mosaic_gpt", 2048, 24, "ViT-L-14", 1),
    "scaled": ("mpt", 1024, 8, "ViT-B-32", 2),
}
TARGETS_GIB = {
    ("openflamingo-9b", "bridge"): 12,
    ("openflamingo-9b", "lora"): 8,
    ("openflamingo-3b", "bridge"): 8,
}
SMALL = ["train.gradient_checkpointing=true", "trainable.dtype=bf16", "train.optimizer=paged_adamw_8bit"]
REGIMES = {
    "bridge": [*SMALL, "train.optimizer_in_backward=true"],
    "lora": [
        *SMALL,
        "trainable={perceiver: false, cross_attention: false, new_tokens: false, dtype: bf16}",
        "lora.language={r: 16}",
        "model.init_from=.",  # stands for a trained bridge, which may be quantized when frozen
        "model.bridge_quantization=nf4",
    ],
}
ON_CPU = ["trainable.dtype=fp32", "train.optimizer=adamw", "train.optimizer_in_backward=false"]
VOCABULARY = 50432
OTHER_TOKENS = 5  # of a sample, besides its images and the words of the answer
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # otherwise glibc keeps freed tensors in resident memory


def write_recipe(folder: Path, shape: str, text_tokens: int, images: int) -> Path:
    """Write the language model's configuration and tokenizer, samples of one size, and a recipe for both."""
    model_type, width, layers, tower, every = SHAPES[shape]
    sizes = {"d_model": width, "n_layers": layers, "n_heads": width // 128, "vocab_size": VOCABULARY}
    if model_type == "gpt_neox":
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes = dict(zip(names, (width, layers, width // 80, VOCABULARY), strict=True))
        sizes["intermediate_size"] = 4 * width
    AutoConfig.for_model(model_type, **sizes, dtype="bfloat16").save_pretrained(folder / "lm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_FOLDER / name, folder / "lm" / name)
    write_samples(folder, AutoTokenizer.from_pretrained(folder / "lm"), text_tokens, images)
    document = {
        "model": {
            "vision": {"name": tower, "quantization": "nf4"},
            "language": {"name": str(folder / "lm"), "quantization": "nf4"},
            "cross_attn_every_n_layers": every,
        },
        "data": {"train": [{"path": "train.jsonl"}]},
        "train": {"output_dir": str(folder / "run"), "max_steps": 4, "batch_size": 1, "num_workers": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path


def write_samples(folder: Path, tokenizer: object, text_tokens: int, images: int) -> None:
    """Write identical dialogues of about ``text_tokens`` tokens about blank images."""
    Image.new("RGB", (64, 64)).save(folder / "blank.png")
    word = len(tokenizer(" digit digit digit digit", add_special_tokens=False)["input_ids"]) / 4
    answer = " ".join(["digit"] * int((text_tokens - OTHER_TOKENS - images) / word))
    turns = [
        {"role": "user", "content": "<image>" * images + "which?"},
        {"role": "assistant", "content": answer},
    ]
    row = json.dumps({"messages": turns, "images": ["blank.png"] * images})
    (folder / "train.jsonl").write_text("\n".join([row] * 16))


def build(recipe: Recipe, device: str) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build the recipe's model with random weights on ``device``."""
    model_config = recipe.model
    config, tokenizer = language_files(model_config.language.name)
    quantization = Quantization.of(model_config.language)
    lm = LanguageBackbone(
        random_language(config, quantization, device), tokenizer, source(model_config.language)
    )
    tower = load_vision(
        model_config.vision.name,
        quantization=Quantization.of(model_config.vision),
        device=device,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        options = {"cross_attn_every_n_layers": model_config.cross_attn_every_n_layers}
        model, processor = build_flamingo(tower, lm, **options)
    set_trainable(model, recipe.trainable)
    if model_config.bridge_quantization != "none":
        for part in (model.perceiver, model.gated_cross_attn_layers):
            quantize_linears(part, Quantization(model_config.bridge_quantization), device)
    add_lora(model, recipe.lora)
    set_trainable(model, recipe.trainable, recipe.lora)
    return model.to(device), processor


def source(section: object) -> dict:
    return {"name": section.name, "revision": None, "sha256": "random"}


def random_language(
    config: PreTrainedConfig, quantization: Quantization | None, device: str
) -> PreTrainedModel:
    """Return a random language model, in bf16 or quantized with one matrix at most unquantized at a time."""
    dtype = torch.bfloat16 if quantization is None else quantization.dtype
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kept = get_keys_to_not_convert(lm)
    for name, layer in list(lm.named_modules()):
        if quantization is not None and isinstance(layer, nn.Linear) and name not in kept:
            holder = nn.Sequential(layer.to_empty(device=device))
            nn.init.normal_(layer.weight, std=0.02)
            quantize_linears(holder, quantization, device)
            lm.set_submodule(name, holder[0])
    for module in lm.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(
                    torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
                )
    lm.tie_weights()
    return lm.eval().requires_grad_(False)


def run(recipe: Recipe, device: str, live: bool) -> dict[str, float]:
    """Train, and return the peak memory in bytes by kind, weights included."""
    if device == "cpu" and not live:
        _load_all_code()
    before = _status("VmRSS")
    model, processor = build(recipe, device)
    trainer = make_trainer(model, processor, open_data(recipe.data, recipe.train.seed), recipe, [])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    if live:
        return {"live tensors": _live_bytes(trainer)}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    trainer.train()
    return {"resident": _status("VmHWM") - before}


def _load_all_code() -> None:
    """Train a tiny model, so that the memory of libraries is not measured."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            "quickstart", ["train.max_steps=2", f"train.output_dir={folder}", "train.batch_size=2"]
        )
        model, processor = build_model(recipe)
        make_trainer(model, processor, open_data(recipe.data, recipe.train.seed), recipe, []).train()
    del model
    gc.collect()


def _live_bytes(trainer: object) -> int:
    with MemoryTracker() as live:
        live.track(chain(trainer.model.parameters(), trainer.model.buffers(), _scales(trainer.model)))
        live.reset_peak()
        trainer.train()
    return live.peak


def _scales(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _status(field: str) -> int:
    """Return a size in /proc/self/status in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(arguments: list[str], *more: str) -> dict[str, float]:
    """Call `run` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--measure", *more]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **RETURN_FREED}
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--plan-only", action="store_true", help="plan for CUDA, and train nothing")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = ON_CPU if device == "cpu" and not args.plan_only else []
    with tempfile.TemporaryDirectory() as folder:
        path = write_recipe(Path(folder), args.shape, args.text_tokens, args.images)
        recipe = load_recipe(path, [*REGIMES[args.regime], *on_cpu, *args.overrides])
        if args.measure:
            print(json.dumps(run(recipe, device, args.live)))
            return
        plan = plan_memory(recipe, device="cuda" if args.plan_only else device)
    figures = {"planned": plan.peak}
    if not args.plan_only:
        own = [
            args.shape,
            args.regime,
            *args.overrides,
            f"--text-tokens={args.text_tokens}",
            f"--images={args.images}",
        ]
        figures |= measure(own)
        figures |= measure(own, "--live") if device == "cpu" else {}
    where = "cuda" if args.plan_only else device
    print(
        f"{args.shape} {args.regime} on {where}, "
        f"{plan.batch.text_tokens} text tokens, {plan.batch.images} images"
    )
    for name, size in figures.items():
        print(f"{name:16} {size / GIB:7.3f} GiB")
    if (args.shape, args.regime) in TARGETS_GIB:
        print(f"{'target':16} {TARGETS_GIB[args.shape, args.regime]:7.3f} GiB")


if __name__ == "__main__":
    main()
