"""Merge an adapter into its base: one standalone model, verified and compared with the adapter."""

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

from .merge_quality import (
    LOSS_MARGIN,
    EvalSet,
    Measurement,
    compare,
    eval_set_of_run,
    logit_difference,
    made_up_eval_set,
    measure,
)
from .metrics import MERGE_METRIC, metrics_in

MERGE_FILE = "merge.json"
SAMPLES = 64
TOLERANCE_DEPRECATED = (
    "merge: tolerance (distance of logits) says little about quality and is deprecated; use margin"
)


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
    accuracy_margin: float | None = MERGE_METRIC.merge_margin,
) -> dict[str, Any]:
    """Write the merged model to ``out``: safetensors shards, configuration, processor and merge.json.

    First every written tensor is compared with W + scale * B A, or with the base; a wrong merge is always
    refused. Then loss and metrics are compared with the adapter's on held-out samples of the run.

    Args:
        base: merge into the unquantized backbones (bf16) or into the dequantized ones that training used.
        dtype: of the merged weights; gates stay in float32.
        quantization: of the written model. The merge is verified before it is quantized.
        tolerance: deprecated; also refuse logits that differ by more than this, relative to the largest.
        start: where the bridge that the adapter builds on is now, if it has moved since training.
        with_code: put the package's code beside the model, for transformers without this package.
        samples: how many samples the loss is measured on; at most 32 questions are answered too.
        margin: how much higher the loss may be than the adapter's, in nats per token, beyond two standard
            errors over the samples. It is quadrupled on made-up prompts, used without the run's samples.
        accuracy_margin: how much lower the accuracy may be, 0..1, likewise; not used on made-up prompts.

    Returns:
        The content of ``merge.json``.

    Raises:
        UserError: ``out`` exists, ``adapter`` is already merged, its base is not the one it was trained on,
            or the merged model is wrong, or worse by more than a margin. Nothing is left at ``out``.
    """
    if tolerance is not None:
        warnings.warn(TOLERANCE_DEPRECATED, FutureWarning, stacklevel=2)
    name, adapter, out = str(adapter), fetch_model(adapter), Path(out)
    check_mergeable(adapter, out)
    processor, formats = read_processor(adapter), base_quantizations(read_config(adapter))
    with folder_in_place(out) as folder:
        written = write_merged(adapter, folder, processor, base=base, dtype=dtype, start=start)
        dtype_name = str(dtype).removeprefix("torch.")
        report = {"adapter": name, "trained_in": formats, "base": base, "dtype": dtype_name, **written}
        report["quantization"] = None if quantization is None else quantization.record()
        models, eval_set = _measure_models(
            adapter, folder, processor, quantization, start, samples, was_quantized=bool(formats)
        )
        report |= logit_difference(models["merged"], models["adapter"])
        cost = compare(models, eval_set, margin, accuracy_margin)
        report |= {"prompts_from": eval_set.origin, "cost": cost, "tolerance": tolerance}
        _refuse_worse(report)
        if with_code:
            write_code(folder)
        _write_report(adapter, folder, report)
    return report


def _write_report(adapter: Path, folder: Path, report: dict[str, Any]) -> None:
    """Write merge.json and a copy of the run's recipe beside the merged model."""
    (folder / MERGE_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if (adapter / RECIPE_FILE).is_file():
        shutil.copyfile(adapter / RECIPE_FILE, folder / RECIPE_FILE)


def _measure_models(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    quantization: Quantization | None,
    start: str | Path | None,
    samples: int,
    was_quantized: bool,
) -> tuple[dict[str, Measurement], EvalSet]:
    """Measure the adapter and the merged model in ``folder``, and quantize the latter if requested.

    To show what quantization alone changes, also measure the adapter on its unquantized base and the merged
    model before it is quantized.
    """
    adapter_measurement, eval_set = _measure_adapter(adapter, processor, start, samples)
    models = {"adapter": adapter_measurement}

    def add(name: str, load: Callable[[], FlamingoForConditionalGeneration]) -> None:
        models[name] = measure(load(), processor, eval_set)
        gc.collect()  # two models may not fit; a model and its hooks refer to each other

    if was_quantized:
        # only for comparison, and it may need more memory than the merge itself
        with suppress(torch.OutOfMemoryError):
            add("adapter_on_unquantized_base", lambda: load_adapter(adapter, start=start, quantized=False)[0])
    if quantization is not None:
        add("merged_before_quantization", lambda: load_whole_model(folder))
        quantize_merged(folder, quantization)
        gc.collect()
    add("merged", lambda: load_whole_model(folder))
    return models, eval_set


def _measure_adapter(
    adapter: Path, processor: FlamingoProcessor, start: str | Path | None, samples: int
) -> tuple[Measurement, EvalSet]:
    """Measure the adapter itself; also return what all models are compared on."""
    model = load_adapter(adapter, start=start)[0]
    eval_set = eval_set_of_run(adapter, processor, context_length(model.config), samples)
    if eval_set is None:
        eval_set = made_up_eval_set(model, processor)
    measurement = measure(model, processor, eval_set)
    del model
    gc.collect()
    return measurement, eval_set


def _refuse_worse(report: dict[str, Any]) -> None:
    """Raise UserError if the model is worse than its adapter, or beyond the deprecated tolerance."""
    cost, tolerance = report["cost"], report["tolerance"]
    if cost["worse"]:
        values = [f"loss {_against(cost['loss'], '{:.3f}'.format)}"]
        margins = [f"{cost['margin']:.2g} nats"]
        for metric in metrics_in(cost):
            name = metric.name
            if cost[name]["merged"] is not None:
                values.append(f"{metric.label} {_against(cost[name], metric.text)}")
            if cost[f"{name}_margin"] is not None:
                margins.append(metric.text(cost[f"{name}_margin"]))
        raise UserError(
            f"{report['adapter']}: the merged model is worse than the adapter on {cost['samples']} "
            f"{report['prompts_from']}: {', '.join(values)}, beyond the margins of {' and '.join(margins)}; "
            f"{_remedies(report)}accept more with --margin or --accuracy-margin"
        )
    if tolerance is not None and not report["relative"] <= tolerance:
        raise UserError(
            f"{report['adapter']}: the merged model's logits differ from the adapter's by "
            f"{report['relative']:.2g} of the largest "
            f"(token agreement {percent(report['token_agreement'])}), "
            f"beyond the tolerance of {tolerance:.2g}; {_remedies(report)}leave --tolerance out"
        )


def _against(values: dict[str, float], write: Callable[[float], str]) -> str:
    return f"{write(values['merged'])} against {write(values['adapter'])}"


def _remedies(report: dict[str, Any]) -> str:
    """Suggest options that may bring the merged model closer to the adapter."""
    options = {
        "--base dequantized": report["trained_in"] and report["base"] == "bf16",
        "--dtype bf16": report["dtype"] == "float16",
        "--dtype fp32": report["dtype"] == "bfloat16",
        "no --quantization": report["quantization"],
    }
    applicable = " and ".join(option for option, applies in options.items() if applies)
    return f"merge with {applicable}, or " if applicable else ""
