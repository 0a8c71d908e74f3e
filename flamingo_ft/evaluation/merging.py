"""An adapter and its base -> one standalone model: verified tensor by tensor, and measured beside the adapter."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.adapters.files import read_config, read_processor
from flamingo_ft.adapters.load import load_adapter, load_whole_model
from flamingo_ft.adapters.merge import (
    Base,
    base_quantizations,
    check_mergeable,
    quantize_merged,
    write_merged,
)
from flamingo_ft.adapters.remote_code import write_code
from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import percent
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .merge_cost import ACCURACY_MARGIN, LOSS_MARGIN, Measured, cost, logit_difference, measure
from .merge_probe import Probe, made_up_probe, probe_of_run

MERGE_FILE = "merge.json"
SAMPLES = 64


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: Base = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization | None = None,
    tolerance: float | None = None,
    start: str | Path | None = None,
    with_code: bool = False,
    samples: int = SAMPLES,
    margin: float = LOSS_MARGIN,
    accuracy_margin: float = ACCURACY_MARGIN,
) -> dict[str, Any]:
    """Write the merged model to ``out``: safetensors shards, configuration, processor, and what was checked.

    First every written tensor is compared with W + scale * B A, or with the base: a wrong merge is always refused.
    Then loss and accuracy are measured beside the adapter's, on held-out samples of the run.

    base: the backbones' unquantized weights (bf16), or what the quantized ones stand for (dequantized).
    dtype: of the merged weights; gates stay in float32. quantization: of the written model; verified before.
    samples: how many the loss is measured on; as many questions, at most 32, are answered.
    margin, accuracy_margin: how much worse than the adapter the model may be: how much higher its loss, in nats per
        token, and how much lower its accuracy, as a share of answers; each beyond twice its standard error over the
        samples. On made-up prompts, where the run's samples are gone, four times ``margin``, and accuracy is not judged.
    tolerance: deprecated; also refuse logits that differ by more than this, relative to the largest.
    start: where the bridge that the adapter builds on lies now, if not where it lay in training.
    with_code: put the package's code beside the model, for transformers where the package is not.

    Returns what is written to ``merge.json``. Raises UserError when ``out`` exists, ``adapter`` is a merged model
    already, its base is another than it was trained on, and when the merged model is wrong, or worse than the adapter
    by more than either margin: then nothing is left at ``out``.
    """
    if tolerance is not None:
        message = (
            "merge: tolerance (distance of logits) says little about quality and is deprecated; use margin"
        )
        warnings.warn(message, FutureWarning, stacklevel=2)
    named, adapter, out = str(adapter), fetch_model(adapter), Path(out)
    check_mergeable(adapter, out)
    processor, formats = read_processor(adapter), base_quantizations(read_config(adapter))
    with folder_in_place(out) as folder:
        written = write_merged(adapter, folder, processor, base=base, dtype=dtype, start=start)
        report = {
            "adapter": named,
            "base_quantizations": formats,
            "base": base,
            "dtype": str(dtype).removeprefix("torch."),
        }
        report |= written | {"quantization": None if quantization is None else quantization.record()}
        margins = margin, accuracy_margin
        report |= _measure_all(
            adapter, folder, processor, quantization, start, samples, margins, bool(formats)
        )
        report["tolerance"] = tolerance
        _refuse_worse(report)
        if with_code:
            write_code(folder)
        (folder / MERGE_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if (adapter / RECIPE_FILE).is_file():
            shutil.copyfile(adapter / RECIPE_FILE, folder / RECIPE_FILE)
    return report


def _measure_all(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    quantization: Quantization | None,
    start: str | Path | None,
    samples: int,
    margins: tuple[float, float],
    was_quantized: bool,
) -> dict[str, Any]:
    """Measure the adapter, the merged model in ``folder``, which is quantized along the way where that is asked, and
    what quantization alone changes: the adapter on its base unquantized, and the merged model before it is
    quantized."""
    models, (models["adapter"], probe) = {}, _measured_adapter(adapter, processor, start, samples)

    def add(name: str, load: Callable[[], FlamingoForConditionalGeneration]) -> None:
        models[name] = measure(load(), processor, probe)
        gc.collect()  # two models may be too many; hooks and what they hook onto refer to each other

    if was_quantized:
        with suppress(
            torch.OutOfMemoryError
        ):  # only for comparison, and it may be larger than what is merged
            add("adapter_on_unquantized_base", lambda: load_adapter(adapter, start=start, quantized=False)[0])
    if quantization is not None:
        add("merged_before_quantization", lambda: load_whole_model(folder))
        quantize_merged(folder, quantization)
        gc.collect()
    add("merged", lambda: load_whole_model(folder))
    found = logit_difference(models["merged"], models["adapter"])
    return {**found, "prompts_from": probe.origin, "cost": cost(models, probe, *margins)}


def _measured_adapter(
    adapter: Path, processor: FlamingoProcessor, start: str | Path | None, samples: int
) -> tuple[Measured, Probe]:
    """The adapter's own figures, and the probe that they are of."""
    model = load_adapter(adapter, start=start)[0]
    probe = probe_of_run(adapter, processor, context_length(model.config), samples) or made_up_probe(
        model, processor
    )
    measured = measure(model, processor, probe)
    del model
    gc.collect()
    return measured, probe


def _refuse_worse(report: dict[str, Any]) -> None:
    """Raise UserError for a model that is worse than its adapter, or beyond the deprecated tolerance."""
    found, tolerance = report["cost"], report["tolerance"]
    if found["worse"]:
        loss, accuracy = found["loss"], found["accuracy"]
        answers = "" if accuracy["merged"] is None else f", accuracy {_against(accuracy, '{:.1%}')}"
        raise UserError(
            f"{report['adapter']}: the merged model is worse than the adapter on {found['samples']} "
            f"{report['prompts_from']}: loss {_against(loss, '{:.3f}')}{answers}, beyond the margins "
            f"of {_margins(found)}; {_remedies(report)}accept more with --margin or --accuracy-margin"
        )
    if tolerance is not None and not report["relative"] <= tolerance:
        raise UserError(
            f"{report['adapter']}: the merged model's logits are {report['relative']:.2g} of the largest away from the "
            f"adapter's (token agreement {percent(report['token_agreement'])}), beyond the tolerance of {tolerance:.2g}; "
            f"{_remedies(report)}leave --tolerance out"
        )


def _margins(found: dict[str, Any]) -> str:
    accuracy = found["accuracy_margin"]
    return f"{found['margin']:.2g} nats" + ("" if accuracy is None else f" and {percent(accuracy)}")


def _against(figures: dict[str, float], form: str) -> str:
    return f"{form.format(figures['merged'])} against {form.format(figures['adapter'])}"


def _remedies(report: dict[str, Any]) -> str:
    """What could bring the merged model closer to the adapter."""
    choices = {
        "--base dequantized": report["base_quantizations"] and report["base"] == "bf16",
        "--dtype bf16": report["dtype"] == "float16",
        "--dtype fp32": report["dtype"] == "bfloat16",
        "no --quantization": report["quantization"],
    }
    possible = " and ".join(choice for choice, is_left in choices.items() if is_left)
    return f"merge with {possible}, or " if possible else ""
