"""A trial of a recipe in seconds, on a CPU and without a network: small stand-ins for what it would fetch.

The nano backbones stand in for the recipe's, an untrained bridge for what it starts from, and synthetic
rows of its format for data on the Hub and for files that are not there yet. Everything else is the
recipe's own, for a few small batches: settings, data files, chat format, training method, stages, metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flamingo_ft.adapters import save_adapter
from flamingo_ft.config import DataSection, DataSource, Recipe, dump_recipe, load_recipe
from flamingo_ft.config.model_section import LoraPart, LoraSection, ModelSection, TrainableSection
from flamingo_ft.config.paths import path_exists
from flamingo_ft.config.stages import STAGE_SECTIONS, StageSection
from flamingo_ft.config.train_section import EvalSection, TrainSection
from flamingo_ft.data.synthetic_rows import write_synthetic_rows
from flamingo_ft.hub.names import NANO

from .build import build_model

STEPS, BATCH, SAMPLES, TOKENS = 2, 2, 4, 16  # TOKENS: of an answer
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the nano model
HELD_OUT = 0.25  # at least, of a source of synthetic rows
# Keys that belong to the recipe's backbone.
NOT_OF_NANO: dict[str, dict[str, Any]] = {
    "vision": {"pretrained": None, "image_size": None, "layer": -1},
    "language": {"revision": None, "decoder_layers_attr_name": None},
}

Part = TypeVar("Part", Recipe, StageSection)


class Trial:
    """The trial of a recipe.

    Attributes:
        recipe: what is run. Its output folder and stand-ins are in the folder of the trial.
        stand_ins: what stands in for what, a line each.
        missing: the data files that are not there yet, a line each.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        """Write stand-ins and the trial's recipe to ``folder``. Raises UserError as `load_recipe` does."""
        self.stand_ins: list[str] = []
        self.missing: list[str] = []
        self._folder = folder
        stages = [self._stage(stage, index, folder / "run") for index, stage in enumerate(recipe.stages)]
        shortened = (
            self._with_last_stage(recipe, stages) if stages else self._shortened(recipe, "", folder / "run")
        )
        model = self._small_model(recipe.model)
        start = recipe.model.init_from
        if start is not None:
            self.stand_ins.append(f"model.init_from {start}: replaced by an untrained bridge")
            _write_start(shortened.model_copy(update={"model": model, "stages": ()}), folder / "start")
            model = model.model_copy(
                update={
                    "init_from": str(folder / "start"),
                    "bridge_quantization": recipe.model.bridge_quantization,
                }
            )
        whole = shortened.model_copy(update={"model": model, "stages": tuple(stages)})
        self.recipe = _validated(whole, folder / "recipe.yaml")

    def _stage(self, stage: StageSection, index: int, run: Path) -> StageSection:
        return self._shortened(stage, f"stages.{index}.", run / stage.train.output_dir.name)

    def _with_last_stage(self, recipe: Recipe, stages: list[StageSection]) -> Recipe:
        """Return the recipe with the sections of its last stage, as a recipe with stages has them."""
        last = {section: getattr(stages[-1], section) for section in STAGE_SECTIONS}
        last["train"] = last["train"].model_copy(update={"output_dir": self._folder / "run"})
        return recipe.model_copy(update=last)

    def _shortened(self, part: Part, place: str, output_dir: Path) -> Part:
        """Return a recipe or a stage with few steps and samples. place: where it is in the recipe."""
        sections = {
            "lora": _lora(part.lora),
            "data": self._data(part.data, place, part.train.method),
            "train": _train(part.train, output_dir),
            "eval": _evaluation(part.eval),
        }
        return part.model_copy(update=sections)

    def _small_model(self, model: ModelSection) -> ModelSection:
        """Return the model with nano backbones, and without what it starts from."""
        backbones: dict[str, Any] = {}
        for key, section in (("vision", model.vision), ("language", model.language)):
            if section.name != NANO:
                self.stand_ins.append(f"model.{key}.name {section.name}: replaced by {NANO}")
            backbones[key] = section.model_copy(update={"name": NANO, **NOT_OF_NANO[key]})
        return model.model_copy(
            update={
                **backbones,
                "cross_attn_every_n_layers": min(model.cross_attn_every_n_layers, 2),
                "init_from": None,
                "bridge_quantization": "none",
            }
        )

    def _data(self, data: DataSection, place: str, method: str) -> DataSection:
        """Return the data, with synthetic rows where there is none, and text cut to the nano context."""
        sources = {
            split: tuple(
                self._source(source, f"{place}data.{split}.{index}", method if split == "train" else "sft")
                for index, source in enumerate(getattr(data, split))
            )
            for split in ("train", "eval")
        }
        changes: dict[str, Any] = {**sources, "max_text_tokens": None, "too_long": "truncate_text"}
        if data.cache is not None:
            changes["cache"] = data.cache.model_copy(update={"folder": self._folder / "cache"})
        if data.eval_fraction is not None and sources["train"] != data.train:
            changes["eval_fraction"] = max(data.eval_fraction, HELD_OUT)
        return data.model_copy(update=changes)

    def _source(self, source: DataSource, place: str, method: str) -> DataSource:
        absent = next(_absent_paths(source), None)
        if source.hub is None and absent is None:
            return source
        synthetic = write_synthetic_rows(source, self._folder / "rows" / place, method)
        described = f"synthetic rows of the format {synthetic.format}"
        if absent is not None:
            self.missing.append(f"{place}.{absent[0]}: {absent[1]} is not there yet; {described} were tried")
        else:
            self.stand_ins.append(f"{place}.hub {source.hub}: replaced by {described}")
        return synthetic


def _absent_paths(source: DataSource) -> Iterator[tuple[str, Path]]:
    """Yield key and path of what a source's recipe names and is not on this machine."""
    checks: dict[str, Callable[[Path], bool]] = {"path": path_exists, "image_root": Path.is_dir}
    for key, exists in checks.items():
        path = getattr(source, key)
        if path is not None and not exists(Path(path)):
            yield key, Path(path)


def _lora(lora: LoraSection) -> LoraSection:
    """Return LoRA on all matrices of a part whose own target modules the nano model does not have."""
    return lora.model_copy(update={name: _targets(part) for name, part in lora.parts.items()})


def _targets(part: LoraPart) -> LoraPart:
    names = part.target_modules
    has_all = all(name.rpartition(".")[2] in MATRICES for name in names)
    return part if has_all else part.model_copy(update={"target_modules": ("all-linear",)})


def _train(train: TrainSection, output_dir: Path) -> TrainSection:
    grpo = train.grpo
    if train.method == "grpo":
        longest = min(grpo.max_completion_tokens, TOKENS)
        grpo = grpo.model_copy(update={"num_generations": BATCH, "max_completion_tokens": longest})
    return train.model_copy(
        update={
            "output_dir": output_dir,
            "grpo": grpo,
            "max_steps": STEPS,
            "epochs": None,
            "warmup_steps": 0,
            "warmup_ratio": None,
            "batch_size": BATCH if train.method == "grpo" else min(train.batch_size, BATCH),
            "gradient_accumulation_steps": min(train.gradient_accumulation_steps, 2),
            "precision": "auto" if train.precision == "fp16" else train.precision,  # no fp16 on a CPU
            "fsdp": False,
            "num_workers": 0,
            "save_steps": None if train.save_steps is None else STEPS,
            "checkpoint_dir": None,
            "push_to_hub": None,
            "report_to": (),
        }
    )


def _evaluation(evaluation: EvalSection) -> EvalSection:
    return evaluation.model_copy(
        update={
            "max_samples": SAMPLES,
            "batch_size": min(evaluation.batch_size, SAMPLES),
            "max_new_tokens": min(evaluation.max_new_tokens, TOKENS),
            "steps": None if evaluation.steps is None else 1,
        }
    )


def _write_start(recipe: Recipe, folder: Path) -> None:
    """Save an untrained bridge of the recipe's shape, from which the trial starts as the run would."""
    whole = {
        "trainable": TrainableSection(),
        "lora": LoraSection(),
        "train": recipe.train.model_copy(update={"method": "sft"}),
    }
    save_adapter(*build_model(recipe.model_copy(update=whole)), folder)


def _validated(recipe: Recipe, file: Path) -> Recipe:
    """Return the recipe as it is read from a file, so that what was changed is checked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    return load_recipe(file)
