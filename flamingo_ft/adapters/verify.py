"""Whether a merged model is right: every tensor that was written, against what it has to be.

The expected side shares nothing with the side that writes: it has a base of its own, loaded once more, reads A, B and
magnitudes from the adapter's file, and computes W + scale * B A (LoRA, arXiv:2106.09685) or DoRA's rescaling of it
(arXiv:2402.09353, equation 5) in float32. What was written is read from its shards one tensor at a time. There is no
calibrated tolerance: a value may be off by the rounding of its dtype and by that of a sum in float32, which follow from
the values themselves.

Shapes: O rows (outputs) and I columns (inputs) of a matrix, r rank.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from flamingo_ft.backbones.attention import fused_names
from flamingo_ft.backbones.quantization import dequantized_linear, is_conv1d, is_quantized
from flamingo_ft.backbones.safetensors_folder import SafetensorsFolder
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import is_lora

from .files import read_lora_config, read_tensors
from .trainable import parameter_dtype

BLOCK = (
    2**15
)  # entries compared at once: few enough for one core's cache, and for torch not to start threads for them
FLOAT32 = torch.finfo(
    torch.float32
).eps  # twice the largest relative error of one rounding, for two sides that round
LORA_TENSOR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class VerificationResult:
    """What was compared: all tensors, and those of them that LoRA changed.

    worst: the matrix with LoRA that comes closest to what rounding allows, None without LoRA; worst_error: its largest
    error as a share of that, 0..1.
    """

    tensors: int
    matrices_with_lora: int
    worst: str | None
    worst_error: float


@dataclass(frozen=True)
class Update:
    """LoRA of one matrix: a (r, I), b (O, r), its scale, and with DoRA the magnitude (O,) of each row."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


@dataclass(frozen=True)
class Expected:
    """What one tensor has to be: ``raw`` with ``update`` in ``dtype``.

    names: of one tensor, which a model may have under several; transposed: a matrix that is kept as (I, O).
    """

    names: list[str]
    raw: Tensor
    dtype: torch.dtype
    update: Update | None = None
    transposed: bool = False


def verify_merge(
    folder: Path, adapter: Path, base: FlamingoForConditionalGeneration, dtype: torch.dtype
) -> VerificationResult:
    """Compare the model written to ``folder`` with ``adapter`` on ``base``, the base that was merged into.

    dtype: that was asked for. Raises UserError for a tensor that is missing or unknown, for a matrix with LoRA that
    is not W + scale * B A within rounding, and for any other tensor that is not exactly the base's, or the adapter's,
    in ``dtype``.
    """
    errors, with_lora = {}, []
    converted = bool(get_model_conversion_mapping(base, add_legacy=False))
    with SafetensorsFolder(folder) as files:
        unknown = set(files.names())
        for expected in _expected(adapter, base, dtype):
            found = _errors(files, unknown, expected, base if converted else None)
            errors |= found
            with_lora += found if expected.update else []
            unknown -= found.keys()
    if unknown:
        raise _wrong(
            adapter, f"{sorted(unknown)[0]} was written, which neither base nor adapter has", len(unknown)
        )
    _refuse_errors(adapter, errors, with_lora, dtype)
    worst = max(with_lora, key=errors.__getitem__, default=None)
    return VerificationResult(len(errors), len(with_lora), worst, errors.get(worst, 0.0))


def _refuse_errors(
    adapter: Path, errors: Mapping[str, float], with_lora: list[str], dtype: torch.dtype
) -> None:
    bad = [name for name, error in errors.items() if not error <= 1]
    if not bad:
        return
    worst = max(bad, key=errors.__getitem__)
    of = "W + scale * B A" if worst in with_lora else "what base or adapter has"
    rounding = f"{errors[worst]:.3g} times as far from {of} as rounding to {str(dtype).removeprefix('torch.')} allows"
    missing = "missing, not finite, or of another shape or dtype"
    raise _wrong(adapter, f"{worst} is {missing if math.isinf(errors[worst]) else rounding}", len(bad))


def _wrong(adapter: Path, what: str, count: int) -> UserError:
    return UserError(
        f"{adapter}: the merged model is wrong: {what} (wrong tensors: {count}); nothing was kept: merge again, and "
        "report it as a bug of flamingo_ft if that does not help"
    )


def _expected(
    adapter: Path, base: FlamingoForConditionalGeneration, dtype: torch.dtype
) -> Iterator[Expected]:
    """Every tensor that the merged model must have. UserError for tensors of the adapter that have no place in it."""
    stored = read_tensors(adapter)
    whole = {
        name.replace(".base_layer.", "."): tensor for name, tensor in stored.items() if not is_lora(name)
    }
    updates = _updates(adapter, {name: tensor for name, tensor in stored.items() if is_lora(name)})
    closed = fused_names(base)
    for names, tensor, is_parameter, transposed in _tensors_of(base):
        raw = next((whole.pop(name) for name in names if name in whole), tensor)
        update = next((updates.pop(name) for name in names if name in updates), None)
        kept = parameter_dtype(names[0], dtype) if is_parameter and raw.is_floating_point() else raw.dtype
        yield Expected([closed.get(name, name) for name in names], raw, kept, update, transposed)
    if left := sorted([*whole, *updates]):
        raise _wrong(adapter, f"the adapter's {left[0]} has no place in it", len(left))


def _tensors_of(model: nn.Module) -> Iterator[tuple[list[str], Tensor, bool, bool]]:
    """Names, tensor, whether it is a parameter, and whether of a layer with an (I, O) matrix; quantized ones one by
    one as what they stand for."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for path, module in model.named_modules():
        prefix, conv1d = f"{path}." if path else "", is_conv1d(module)
        if is_quantized(module):
            plain = dequantized_linear(module, torch.float32, path)
            yield from (
                ([prefix + leaf], tensor.data, True, conv1d) for leaf, tensor in plain.named_parameters()
            )
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if names[id(parameter)][0] == prefix + leaf:
                yield names[id(parameter)], parameter.data, True, conv1d
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield [prefix + leaf], buffer, False, False


def _updates(adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    """LoRA by the name of the matrix that it changes. UserError for what is no A, B or magnitude."""
    config, parts = read_lora_config(adapter), defaultdict(dict)
    for name, tensor in tensors.items():
        found = LORA_TENSOR.fullmatch(name)
        if found is None:
            raise UserError(
                f"{adapter}: {name} is neither A nor B nor DoRA's magnitude; train without it to merge"
            )
        parts[found[1]][found[2]] = tensor
    scales = {name: _scale(config, name, len(part["A"])) for name, part in parts.items()}
    return {
        f"{name}.weight": Update(part["A"], part["B"], scales[name], part.get("magnitude_vector"))
        for name, part in parts.items()
    }


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732), for the alpha that the configuration has for
    ``name``."""
    patterns = (key for key in config.alpha_pattern or {} if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next((config.alpha_pattern[key] for key in patterns), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _errors(
    files: SafetensorsFolder,
    stored: set[str],
    expected: Expected,
    converted: FlamingoForConditionalGeneration | None,
) -> dict[str, float]:
    """The largest error of a tensor by each name that it was written under, as a share of what is allowed.

    converted: the model, where transformers stores some of its tensors otherwise than it holds them (experts one by
    one).
    """
    names = [name for name in expected.names if name in stored]
    if names:
        return {name: _error(files[name], expected) for name in names}
    pieces = {} if converted is None else _pieces(converted, expected)
    if not pieces or not pieces.keys() <= stored:
        return {expected.names[0]: math.inf}
    return {
        name: _largest(files[name], *piece, exact=expected.update is None) for name, piece in pieces.items()
    }


def _pieces(model: FlamingoForConditionalGeneration, expected: Expected) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and allowed errors of a tensor as transformers stores it: under another name, or in several."""
    values, allowed = _values(expected, slice(None))
    values = values if expected.update else expected.raw.to(expected.dtype)
    stored = revert_weight_conversion(model, {expected.names[0]: values})
    bounds = revert_weight_conversion(model, {expected.names[0]: allowed})
    return {name: (value, bounds[name]) for name, value in stored.items()}


def _error(written: Tensor, expected: Expected) -> float:
    """The largest error as a share of what is allowed; infinite where shape or dtype differ. Without LoRA no error is
    allowed."""
    if written.dtype != expected.dtype or written.shape != expected.raw.shape:
        return math.inf
    if expected.update is None and torch.equal(written, expected.raw.to(expected.dtype)):
        return 0.0
    if not written.is_floating_point() or written.dim() != 2:
        return _largest(written, *_values(expected, slice(None)), exact=expected.update is None)
    written = written.T if expected.transposed else written
    rows = max(1, BLOCK // written.shape[1])
    blocks = (slice(start, start + rows) for start in range(0, len(written), rows))
    return max(
        _largest(written[rows], *_values(expected, rows), exact=expected.update is None) for rows in blocks
    )


def _largest(written: Tensor, values: Tensor, allowed: Tensor, exact: bool) -> float:
    """The largest error over what is allowed; more than 1 for any where the values should be exact, infinite for
    NaN."""
    if exact and torch.equal(written, values.to(written.dtype)):
        return 0.0
    share = float((written.float() - values.float()).abs_().div_(allowed).max())
    return (math.inf if math.isnan(share) else share) + exact


def _values(expected: Expected, rows: slice) -> tuple[Tensor, Tensor]:
    """Some rows of a matrix, or a whole tensor, and how far from each value the written one may be."""
    raw = expected.raw.T if expected.transposed and expected.raw.dim() == 2 else expected.raw
    matrix = raw[rows] if raw.dim() else raw
    if expected.update is None:
        return matrix, _rounding(matrix.float().abs(), expected.dtype)
    update, matrix = expected.update, matrix.float()
    a, b, scale = update.a.float(), update.b[rows].float(), update.scale
    values = torch.addmm(matrix, b, a, alpha=scale)
    # An inner product of r terms is within r roundings of its exact value, relative to the sum of the terms' sizes
    # (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5); scaling and adding bring in two more, a third
    # for good measure.
    slack = torch.addmm(matrix.abs(), b.abs(), a.abs(), alpha=scale).mul_((len(a) + 3) * FLOAT32)
    if update.magnitude is not None:
        values, slack = _rescaled(values, slack, update.magnitude[rows].float())
    return values, _rounding(values.abs().add_(slack), expected.dtype).add_(slack)


def _rescaled(values: Tensor, slack: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """DoRA: rows scaled to the length ``magnitude``; a length of I terms, squared and summed, is within I / 2
    roundings."""
    norm = values.norm(dim=1, keepdim=True)
    factor = magnitude[:, None] / norm
    relative = (values.shape[1] / 2 + 4) * FLOAT32 + slack.norm(dim=1, keepdim=True) / norm
    return factor * values, factor.abs() * (slack + values.abs() * relative)


def _rounding(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of ``dtype`` at these sizes: relative to them, and near zero that of its smallest numbers."""
    if not dtype.is_floating_point:
        return torch.zeros_like(sizes)
    form, smallest = torch.finfo(dtype), torch.finfo(torch.float32).smallest_normal
    return sizes * (form.eps / 2) + max(form.smallest_normal * form.eps / 2, smallest)
