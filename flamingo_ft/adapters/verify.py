"""Verify a merged model: compare every tensor that was written with its expected value.

The expected values share no code or state with the merge: they come from a second copy of the base, from A, B
and magnitudes in the adapter's file, and from W + scale * B A (LoRA, arXiv:2106.09685) or DoRA's rescaling of
it (arXiv:2402.09353, equation 5) in float32. The written tensors are read from their shards one at a time.
There is no calibrated tolerance: a value may be off by the rounding of its dtype and by that of a sum in
float32, both of which follow from the values themselves.

Shapes: O outputs (rows) and I inputs (columns) of a matrix, r rank.
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

from flamingo_ft.backbones.attention import fused_names
from flamingo_ft.backbones.quantization import dequantized_linear, is_conv1d, is_quantized
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import SafetensorsFolder
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import is_lora, parameter_dtype

from .compat import get_model_conversion_mapping, revert_weight_conversion
from .files import read_lora_config, read_tensors

BLOCK = 2**15  # values compared at once: few enough for one core's cache, and for torch to start no threads
# float32's eps is twice the largest relative rounding error: both sides round.
EPS = torch.finfo(torch.float32).eps
LORA_TENSOR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class VerificationResult:
    """How many tensors were compared, and how many of them LoRA changed.

    worst: the matrix with LoRA that comes closest to the error that rounding allows, None without LoRA;
    worst_error: its largest error as a fraction of that, 0..1.
    """

    tensors: int
    matrices_with_lora: int
    worst: str | None
    worst_error: float


@dataclass(frozen=True)
class LoraWeights:
    """LoRA on one matrix: a (r, I), b (O, r), the scale, and with DoRA the magnitude (O,) of each row."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


@dataclass(frozen=True)
class ExpectedTensor:
    """The expected value of one tensor: ``raw`` with ``lora``, in ``dtype``.

    names: under which the model has the tensor; transposed: whether the matrix is stored as (I, O).
    """

    names: list[str]
    raw: Tensor
    dtype: torch.dtype
    lora: LoraWeights | None = None
    transposed: bool = False


def verify_merge(
    folder: Path, adapter: Path, base: FlamingoForConditionalGeneration, dtype: torch.dtype
) -> VerificationResult:
    """Compare the merged model in ``folder`` with ``adapter`` on its base.

    Args:
        base: another copy of the base that was merged into.
        dtype: of the merged weights.

    Raises:
        UserError: a tensor is missing or unknown, a matrix with LoRA is not W + scale * B A within rounding,
            or another tensor is not exactly the base's or the adapter's in ``dtype``.
    """
    errors: dict[str, float] = {}
    with_lora: list[str] = []
    converted = bool(get_model_conversion_mapping(base, add_legacy=False))
    with SafetensorsFolder(folder) as files:
        unknown = set(files.names())
        for expected in _expected_tensors(adapter, base, dtype):
            tensor_errors = _errors(files, unknown, expected, base if converted else None)
            errors |= tensor_errors
            with_lora += tensor_errors if expected.lora else []
            unknown -= tensor_errors.keys()
    if unknown:
        problem = f"{sorted(unknown)[0]} was written, which neither base nor adapter has"
        raise _merge_error(adapter, problem, len(unknown))
    _refuse_errors(adapter, errors, with_lora, dtype)
    worst = max(with_lora, key=errors.__getitem__, default=None)
    worst_error = 0.0 if worst is None else errors[worst]
    return VerificationResult(len(errors), len(with_lora), worst, worst_error)


def _refuse_errors(
    adapter: Path, errors: Mapping[str, float], with_lora: list[str], dtype: torch.dtype
) -> None:
    bad = [name for name, error in errors.items() if not error <= 1]
    if not bad:
        return
    worst = max(bad, key=errors.__getitem__)
    problem = "missing, not finite, or of another shape or dtype"
    if not math.isinf(errors[worst]):
        expected = "W + scale * B A" if worst in with_lora else "what base or adapter has"
        dtype_name = str(dtype).removeprefix("torch.")
        problem = f"{errors[worst]:.3g} times as far from {expected} as rounding to {dtype_name} allows"
    raise _merge_error(adapter, f"{worst} is {problem}", len(bad))


def _merge_error(adapter: Path, problem: str, count: int) -> UserError:
    return UserError(
        f"{adapter}: the merged model is wrong: {problem} (wrong tensors: {count}); nothing was kept: merge "
        "again, and report it as a bug of flamingo_ft if that does not help"
    )


def _expected_tensors(
    adapter: Path, base: FlamingoForConditionalGeneration, dtype: torch.dtype
) -> Iterator[ExpectedTensor]:
    """Yield every tensor that the merged model must have. Raises UserError if the adapter has others."""
    stored = read_tensors(adapter)
    whole = {
        name.replace(".base_layer.", "."): tensor for name, tensor in stored.items() if not is_lora(name)
    }
    lora = _lora_by_matrix(adapter, {name: tensor for name, tensor in stored.items() if is_lora(name)})
    fused = fused_names(base)
    for names, tensor, is_parameter, transposed in _tensors_of(base):
        raw = next((whole.pop(name) for name in names if name in whole), tensor)
        weights = next((lora.pop(name) for name in names if name in lora), None)
        is_cast = is_parameter and raw.is_floating_point()
        merged_dtype = parameter_dtype(names[0], dtype) if is_cast else raw.dtype
        written_names = [fused.get(name, name) for name in names]
        yield ExpectedTensor(written_names, raw, merged_dtype, weights, transposed)
    if left := sorted([*whole, *lora]):
        raise _merge_error(adapter, f"the adapter's {left[0]} has no place in it", len(left))


def _tensors_of(model: nn.Module) -> Iterator[tuple[list[str], Tensor, bool, bool]]:
    """Yield names, tensor, whether it is a parameter, and whether its layer stores matrices as (I, O).

    Quantized layers are dequantized one at a time.
    """
    persistent = model.state_dict().keys()
    names: dict[int, list[str]] = defaultdict(list)
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
            if prefix + leaf in persistent:
                yield [prefix + leaf], buffer, False, False


def _lora_by_matrix(adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, LoraWeights]:
    """Return LoRA by the name of the matrix that it changes.

    Raises UserError for other tensors than A, B, magnitude.
    """
    if not tensors:
        return {}
    config = read_lora_config(adapter)
    if config is None:
        raise UserError(f"{adapter}: has LoRA weights but no LoRA configuration; copy the adapter again")
    by_layer: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None:
            raise UserError(
                f"{adapter}: {name} is neither A nor B nor DoRA's magnitude; train without it to merge"
            )
        by_layer[match[1]][match[2]] = tensor
    lora = {}
    for name, weights in by_layer.items():
        scale = _scale(config, name, rank=len(weights["A"]))
        lora[f"{name}.weight"] = LoraWeights(
            weights["A"], weights["B"], scale, weights.get("magnitude_vector")
        )
    return lora


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732), for the layer ``name``."""
    by_pattern = (config.alpha_pattern or {}).items()
    matching = (alpha for key, alpha in by_pattern if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next(matching, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _errors(
    files: SafetensorsFolder,
    stored: set[str],
    expected: ExpectedTensor,
    converted: FlamingoForConditionalGeneration | None,
) -> dict[str, float]:
    """Return a tensor's largest error, as a fraction of the allowed one, by each of its names in ``files``.

    Args:
        converted: the model, if transformers saves some of its tensors in another layout than in memory (one
            tensor per expert).
    """
    names = [name for name in expected.names if name in stored]
    if names:
        return {name: _error(files[name], expected) for name in names}
    pieces = {} if converted is None else _pieces(converted, expected)
    if not pieces or not pieces.keys() <= stored:
        return {expected.names[0]: math.inf}
    exact = expected.lora is None
    return {name: _largest_error(files[name], *piece, exact=exact) for name, piece in pieces.items()}


def _pieces(
    model: FlamingoForConditionalGeneration, expected: ExpectedTensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return values and allowed errors of a tensor by the names that transformers stores it under."""
    values, allowed = _values(expected, slice(None))
    values = values if expected.lora else expected.raw.to(expected.dtype)
    stored = revert_weight_conversion(model, {expected.names[0]: values})
    bounds = revert_weight_conversion(model, {expected.names[0]: allowed})
    return {name: (value, bounds[name]) for name, value in stored.items()}


def _error(written: Tensor, expected: ExpectedTensor) -> float:
    """Return the largest error as a fraction of the allowed one; infinity if shape or dtype differ.

    Without LoRA no error is allowed.
    """
    if written.dtype != expected.dtype or written.shape != expected.raw.shape:
        return math.inf
    if expected.lora is None and torch.equal(written, expected.raw.to(expected.dtype)):
        return 0.0
    if not written.is_floating_point() or written.dim() != 2:
        return _largest_error(written, *_values(expected, slice(None)), exact=expected.lora is None)
    written = written.T if expected.transposed else written
    rows = max(1, BLOCK // written.shape[1])
    blocks = (slice(start, start + rows) for start in range(0, len(written), rows))
    exact = expected.lora is None
    return max(_largest_error(written[block], *_values(expected, block), exact=exact) for block in blocks)


def _largest_error(written: Tensor, values: Tensor, allowed: Tensor, exact: bool) -> float:
    """Return the largest error over the allowed one; above 1 for any error if ``exact``; infinity for NaN."""
    if exact and torch.equal(written, values.to(written.dtype)):
        return 0.0
    ratio = float((written.float() - values.float()).abs_().div_(allowed).max())
    return (math.inf if math.isnan(ratio) else ratio) + exact


def _values(expected: ExpectedTensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return expected values (some rows of a matrix, or a whole tensor) and the allowed error of each."""
    raw = expected.raw.T if expected.transposed and expected.raw.dim() == 2 else expected.raw
    matrix = raw[rows] if raw.dim() else raw
    if expected.lora is None:
        return matrix, _rounding(matrix.float().abs(), expected.dtype)
    lora, matrix = expected.lora, matrix.float()
    a, b, scale = lora.a.float(), lora.b[rows].float(), lora.scale
    values = torch.addmm(matrix, b, a, alpha=scale)
    # An inner product of r terms is within r roundings of its exact value, relative to the sum of their sizes
    # (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5); scaling and adding bring in two more,
    # a third for good measure.
    slack = torch.addmm(matrix.abs(), b.abs(), a.abs(), alpha=scale).mul_((len(a) + 3) * EPS)
    if lora.magnitude is not None:
        values, slack = _rescaled(values, slack, lora.magnitude[rows].float())
    return values, _rounding(values.abs().add_(slack), expected.dtype).add_(slack)


def _rescaled(values: Tensor, slack: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale rows to the length ``magnitude`` (DoRA); the sum of I squares is within I / 2 roundings."""
    norm = values.norm(dim=1, keepdim=True)
    factor = magnitude[:, None] / norm
    relative = (values.shape[1] / 2 + 4) * EPS + slack.norm(dim=1, keepdim=True) / norm
    return factor * values, factor.abs() * (slack + values.abs() * relative)


def _rounding(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half the spacing of ``dtype`` at these sizes; near zero that of its smallest numbers."""
    if not dtype.is_floating_point:
        return torch.zeros_like(sizes)
    info, smallest = torch.finfo(dtype), torch.finfo(torch.float32).smallest_normal
    return sizes * (info.eps / 2) + max(info.smallest_normal * info.eps / 2, smallest)
