"""Record what open-flamingo 2.0.1 computes on the tiny models, for tests that need no peer installed.

    python -m tests.golden.record_open_flamingo        # from the root, in the environment of the README

Writes open_flamingo/{family}.safetensors and open_flamingo/checkpoint_keys.json. Numbers are recorded in
float32, gradients in float64 (README). Everything is computed in both, entry by entry, and the recording
refused where the two differ by more than the tests' tolerance or generate other tokens, so that a test at
that tolerance means something.

Patched on the peer at run time, because current packages differ from those of its release:

- `FlamingoLMMixin.forward` demands an `attention_mask`, which `generate` no longer passes when nothing is
  padded: it gets the default None.
- `generate` now reads the signature of `forward` to decide whether to make position ids from the padding;
  then it always did. The mixin hides that signature: it gets the one of the language model's own `forward`.
- open_clip 2.16 to 2.20 returned a ViT's tokens from before `ln_post`, 2.24 and later from after it;
  `final_ln_after_pool` makes the installed one return the former.
- GPT-Neo is not in the peer's table of decoder layers: the name is handed over, as its factory allows.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
import types
from unittest.mock import patch

import torch
from open_flamingo.src.flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.utils import extend_instance
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden import cases, measurements
from tests.golden.deterministic_weights import fill, parameter_values
from tests.golden.recorded import CHECKPOINT_INTERVAL, FOLDER, TOLERANCE
from tests.golden.sketch import sketch
from tests.golden.tiny_models import (
    DECODER_LAYERS,
    EOC_TOKEN,
    FAMILIES,
    MEDIA_TOKEN,
    WIDTH,
    tiny_clip,
    tiny_language_model,
)

LOSS_TOLERANCE = 1e-4
PACKAGES = ("open-flamingo", "torch", "transformers", "open_clip_torch", "einops", "numpy")


def peer_mixin(language_model: nn.Module) -> type:
    """OpenFlamingo's mixin with the default and the signature that `generate` looks for."""

    class Mixin(FlamingoLMMixin):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object
        ) -> object:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    Mixin.forward.__signature__ = inspect.signature(type(language_model).forward)
    return Mixin


def peer_flamingo(family: str, every: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """OpenFlamingo on the tiny backbones, and its parameters by this package's names."""
    clip = tiny_clip()
    clip.visual.output_tokens = True
    clip.visual.final_ln_after_pool = True
    language_model = tiny_language_model(family)
    parameters = {f"vision_encoder.{n}": p for n, p in clip.visual.named_parameters()}
    parameters |= {f"lang_encoder.{n}": p for n, p in language_model.named_parameters()}
    extend_instance(language_model, peer_mixin(language_model))
    language_model.set_decoder_layers_attr_name(DECODER_LAYERS[family])
    model = Flamingo(clip, language_model, EOC_TOKEN, MEDIA_TOKEN, WIDTH, cross_attn_every_n_layers=every)
    bridge = {
        "perceiver.": model.perceiver,
        "gated_cross_attn_layers.": language_model.gated_cross_attn_layers,
    }
    for prefix, module in bridge.items():
        fill(module, prefix)
        parameters |= {prefix + n: p for n, p in module.named_parameters()}
    return model.eval(), parameters


def attend_to_all_images(model: nn.Module) -> None:
    """Switch the cross-attention from the last image to all preceding ones (no argument of the peer does)."""
    for block in model.lang_encoder.gated_cross_attn_layers:
        if block is not None:
            block.attn.only_attend_immediate_media = False


def softmax_without_nan(*args: object, **kwargs: object) -> Tensor:
    """Return torch's softmax with zeros for NaN; needed for MPT in float64.

    Its softmax runs in float32, where the mask, float64's lowest value, becomes minus infinity. A padding
    token, which attends to nothing, would be NaN and spread.
    """
    return torch.softmax(*args, **kwargs).nan_to_num()


def measure(family: str, every: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """Everything recorded of one family at one interval, whole, and the names of the gradients in order."""
    model, parameters = peer_flamingo(family, every)
    model.to(dtype)
    logits, loss = measurements.logits_and_loss(model, cases.interleaved(family), masked=False)
    gradients = measurements.gradients(model, parameters, loss)
    numbers = {"logits": logits.detach(), "loss": loss.detach()}
    numbers |= {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    numbers["left_padded"] = measurements.left_padded_logits(model)
    numbers |= {f"cached.{n}": v for n, v in measurements.cached_media_logits(model).items()}
    numbers |= measurements.generated(model)
    attend_to_all_images(model)
    numbers["all_preceding"] = measurements.images_first_logits(model)
    if every == 1:
        numbers["training_losses"] = measurements.training_losses(*fresh(family, dtype))
    return numbers, sorted(gradients)


def fresh(family: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The peer as built, in training mode."""
    model, parameters = peer_flamingo(family, every=1)
    return model.to(dtype).train(), parameters


def distances(single: dict[str, Tensor], double: dict[str, Tensor]) -> dict[str, float]:
    """Name -> float32's distance from float64 in units of the largest magnitude (tokens: how many differ)."""
    largest = max(float(v.abs().max()) for n, v in double.items() if n.startswith("gradient."))
    result = {}
    for name, value in double.items():
        if name.startswith("tokens."):
            result[name] = float((single[name] != value).sum())
            continue
        unit = float(value.abs().max())
        if name.startswith("gradient."):
            unit = measurements.gradient_unit(unit, largest)
        result[name] = float((single[name].double() - value).abs().max()) / unit
    return result


def refuse_imprecise(distance_by_name: dict[str, float]) -> None:
    """SystemExit where float32 is further from float64 than the tests allow; one other token is too far."""
    for name, distance in distance_by_name.items():
        allowed = LOSS_TOLERANCE if name == "training_losses" else TOLERANCE
        if distance > allowed:
            raise SystemExit(
                f"{name}: float32 and float64 differ by {distance:.2e}; choose better conditioned inputs"
            )


def compact(numbers: dict[str, Tensor], every: int) -> dict[str, Tensor]:
    """What is stored of a float32 run: logits of interval 1 and tokens whole, the rest sketched."""
    stored = {}
    for name, value in numbers.items():
        if name.startswith("gradient."):
            continue
        whole = (
            name.startswith("tokens.")
            or name in ("loss", "training_losses")
            or (name, every) == ("logits", 1)
        )
        if not whole:
            stored[f"{name}.largest"] = value.abs().max()
        stored[name] = value if whole else sketch(value, measurements.LOGIT_BUCKETS).float()
    return stored


def record_family(family: str) -> None:
    """Write {family}.safetensors and print how far float32 is from float64."""
    tensors, gradient_names = {}, {}
    for every in (1, 2):
        single, names = measure(family, every, torch.float32)
        with patch.object(torch.nn.functional, "softmax", softmax_without_nan):
            double, _ = measure(family, every, torch.float64)
        distance_by_name = distances(single, double)
        refuse_imprecise(distance_by_name)
        worst = max(distance_by_name, key=distance_by_name.get)
        print(
            f"{family}, every {every}: float32 is within {distance_by_name[worst]:.1e} of float64 "
            f"(worst: {worst})"
        )
        table = measurements.gradient_table({name: double[f"gradient.{name}"] for name in names})
        for name, value in (compact(single, every) | {"gradients": table}).items():
            tensors[f"every{every}.{name}"] = value.contiguous()
        gradient_names[every] = names
    about = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "gradients": gradient_names,
    }
    # One entry: safetensors writes several in any order, and a second recording should give the same bytes.
    save_file(tensors, FOLDER / f"{family}.safetensors", metadata={"about": json.dumps(about)})


def trained_keys(family: str) -> list[str]:
    """The keys OpenFlamingo's training writes into checkpoint.pt for this model."""
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))  # imported there for logging alone
    from open_flamingo.train.train_utils import filter_state_dict_to_trainable

    model, _ = peer_flamingo(family, CHECKPOINT_INTERVAL)
    model.requires_grad_(False)
    for part in (
        model.perceiver,
        model.lang_encoder.gated_cross_attn_layers,
        model.lang_encoder.get_input_embeddings(),
    ):
        part.requires_grad_(True)
    return sorted(filter_state_dict_to_trainable(model, model.state_dict()))


def sources(family: str, keys: list[str]) -> dict[str, tuple[str, list[int]]]:
    """Peer's key -> this package's name of the same tensor, and its shape; SystemExit for unknown values."""
    model, parameters = peer_flamingo(family, CHECKPOINT_INTERVAL)
    names = {parameter.data_ptr(): name for name, parameter in parameters.items()}
    result = {}
    for key, tensor in model.state_dict().items():
        if key in keys:
            name, shape = names[tensor.data_ptr()], tuple(tensor.shape)
            if not torch.equal(tensor, parameter_values(name, shape)):
                raise SystemExit(f"{family}: {key} does not hold the values of {name}")
            result[key] = name, list(shape)
    return result


def record_checkpoint_keys() -> None:
    """Write the keys of training checkpoints and of a whole state dict; the perceiver's, all alike, once."""
    trained = {family: sources(family, trained_keys(family)) for family in FAMILIES}
    whole = sources("gpt_neox", list(peer_flamingo("gpt_neox", CHECKPOINT_INTERVAL)[0].state_dict()))
    perceiver = {key: entry for key, entry in whole.items() if key.startswith("perceiver.")}

    def without_perceiver(entries: dict) -> dict:
        return {key: entry for key, entry in entries.items() if key not in perceiver}

    content = {
        "perceiver": perceiver,
        "trained": {family: without_perceiver(entries) for family, entries in trained.items()},
        "whole": {"gpt_neox": without_perceiver(whole)},
    }
    (FOLDER / "checkpoint_keys.json").write_text(json.dumps(content, indent=0) + "\n")


def main() -> None:
    """Record every family."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        record_family(family)
    record_checkpoint_keys()


if __name__ == "__main__":
    main()
