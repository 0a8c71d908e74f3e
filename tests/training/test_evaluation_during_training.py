"""Evaluation during training: loss and metrics, the best adapter, and that it does not change training."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flamingo_ft import atomic
from flamingo_ft.adapters import load_adapter, trainable_parameters
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.training.build import build_model, make_trainer
from flamingo_ft.training.checkpoint_folders import MANIFEST, read_manifest, write_manifest
from flamingo_ft.training.evaluation import EvalBatches, KeepBest, restore_best, run_evaluation, save_best
from flamingo_ft.training.train import train
from flamingo_ft.training.trainer import FlamingoTrainerMixin

from ..regimes import LORA, build, shake
from ..regimes import trainer as make_sft_trainer
from .test_train import folder, recipe  # noqa: F401  (a fixture)

WEIGHTS = "adapter_model.safetensors"
STEPS = "eval.steps=2"
FACTS = ("step", "processes", "seconds", "ended", "sources")  # of a checkpoint's manifest
NO_ANSWERS = "eval={steps: 2, answers: false, before: false, shuffled_images: false}"


def log(name: str = "run") -> list[dict]:
    return [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]


def test_eval_loss_and_accuracy_are_logged_and_the_last_accuracy_is_the_runs(folder):  # noqa: F811
    metrics = train(recipe(STEPS, "train.max_steps=5"))
    evaluations = [entry for entry in log() if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 5]
    assert evaluations[-1]["eval_accuracy"] == metrics["eval"]["accuracy"]
    assert [entry["step"] for entry in log() if "loss" in entry] == [1, 2, 3, 4, 5]
    assert all({"entropy", "mean_token_accuracy"} <= entry.keys() for entry in log() if "loss" in entry)


def test_eval_loss_is_the_mean_over_label_tokens_for_any_batch_size_and_world_size(folder):  # noqa: F811
    config = recipe("eval.batch_size=1", STEPS)
    model, processor, samples, sft_trainer = shaken_trainer(config)
    single = list(EvalBatches(samples, model, processor, config))
    counts = [labels for _, labels in single]
    tokens = sum(counts)
    assert len(counts) == 6 and len({*counts}) > 1
    expected = sum(model(**inputs).loss.item() * count for inputs, count in single) / tokens
    for size in (1, 4, 6):
        config = recipe(f"eval.batch_size={size}", STEPS)
        loss = run_evaluation(sft_trainer, EvalBatches(samples, model, processor, config), None)["eval_loss"]
        assert loss == pytest.approx(expected, rel=1e-5)
        assert model.training
        for world_size in (1, 2, 4):
            shards = [
                list(EvalBatches(samples, model, processor, config, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            assert len({len(shard) for shard in shards}) == 1
            weighted = [(inputs, labels) for shard in shards for inputs, labels in shard if labels]
            assert sum(labels for _, labels in weighted) == tokens
            total = sum(model(**inputs).loss.item() * labels for inputs, labels in weighted)
            assert total / tokens == pytest.approx(expected, rel=1e-5), (size, world_size)


def shaken_trainer(config):
    model, processor = build_model(config)
    shake(model, 0.3)
    data = open_data(config.data, 0)
    return model, processor, data.eval_samples(), make_trainer(model.train(), processor, data, config, [])


@pytest.mark.slow
def test_evaluations_do_not_change_training_bit_for_bit(folder):  # noqa: F811
    """With LoRA's dropout, which draws random numbers as it goes."""
    dropout = (
        "lora={language: {r: 2}, lora_dropout: 0.2}",
        "eval.before=false",
        "eval.shuffled_images=false",
    )
    train(recipe("train.output_dir=without", *dropout))
    train(recipe("train.output_dir=with", STEPS, *dropout))
    assert Path("without", WEIGHTS).read_bytes() == Path("with", WEIGHTS).read_bytes()
    losses = [[entry["loss"] for entry in log(name) if "loss" in entry] for name in ("without", "with")]
    assert losses[0] == losses[1]


def script_losses(monkeypatch, values: list[float]) -> None:
    """Replace evaluations by a script of losses."""
    left = list(values)

    def scripted(trainer, *_):
        metrics = {"eval_loss": left.pop(0)}
        trainer.log(dict(metrics))
        return metrics

    monkeypatch.setattr("flamingo_ft.training.trainer.run_evaluation", scripted)


@pytest.mark.parametrize("keep", [pytest.param("last", marks=pytest.mark.slow), "best"])
def test_the_best_adapter_is_kept_and_ends_the_run_if_keep_is_best(
    folder,  # noqa: F811 (the fixture)
    monkeypatch,
    keep,
):
    script_losses(monkeypatch, [2.0, 1.0, float("nan"), 1.5])
    written = []
    monkeypatch.setattr(
        "flamingo_ft.training.evaluation.save_best", lambda *a: (written.append(0), save_best(*a))
    )
    metrics = train(recipe(NO_ANSWERS, f"eval.keep={keep}", "train.max_steps=8"))
    best = Path("run/checkpoints/best")
    assert len(written) == 2 and {path.name for path in best.parent.iterdir()} == {"best", "step-8"}
    assert metrics["train"]["best"] == {"step": 4, "loss": 1.0} and metrics["train"]["steps"] == 8
    assert (best.joinpath(WEIGHTS).read_bytes() == Path("run", WEIGHTS).read_bytes()) == (keep == "best")
    loaded, _ = load_adapter(best)
    assert loaded.perceiver.latents.isfinite().all()


def test_the_best_adapter_is_restored_from_a_checkpoint_alone(folder, monkeypatch):  # noqa: F811
    """As on another machine that has only fetched the newest checkpoint from the Hub."""
    script_losses(monkeypatch, [2.0, 1.0, 1.25, 1.5])
    config = recipe(NO_ANSWERS, "eval.keep=best", "train.max_steps=8")
    metrics, weights = train(config), Path("run", WEIGHTS).read_bytes()
    Path("run/checkpoints").rename("checkpoints")
    shutil.rmtree("run")
    shutil.copytree("checkpoints/step-8", "run/checkpoints/step-8")
    resumed = train(config, resume=True)
    assert resumed["train"]["best"] == metrics["train"]["best"] == {"step": 4, "loss": 1.0}
    assert Path("run", WEIGHTS).read_bytes() == Path("run/checkpoints/best", WEIGHTS).read_bytes() == weights


@pytest.mark.slow
def test_a_missing_best_adapter_is_reported(folder, monkeypatch):  # noqa: F811
    """Checkpoints of earlier versions do not contain it."""
    script_losses(monkeypatch, [1.0, 2.0])
    config = recipe(NO_ANSWERS, "eval.keep=best", "train.max_steps=4")
    train(config)
    checkpoint = Path("run/checkpoints/step-4")
    for best in (checkpoint / "best", checkpoint.with_name("best")):
        shutil.rmtree(best)
    facts = {key: value for key, value in read_manifest(checkpoint).items() if key in FACTS}
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, facts)
    Path("run/metrics.json").unlink()
    with pytest.raises(UserError, match="the best adapter is missing; resume with eval.keep=last"):
        train(config, resume=True)
    assert (
        train(recipe(NO_ANSWERS, "eval.keep=last", "train.max_steps=4"), resume=True)["train"]["steps"] == 4
    )


@pytest.mark.slow
def test_training_stops_early_after_patience_evaluations(folder, monkeypatch):  # noqa: F811
    script_losses(monkeypatch, [2.0, 1.0, 1.1, 1.2, 0.5])
    metrics = train(recipe(NO_ANSWERS, "eval.patience=2", "train.max_steps=40"))
    assert metrics["train"]["steps"] == 8 and metrics["train"]["best"]["step"] == 4


@pytest.mark.slow
def test_the_best_adapter_is_chosen_by_accuracy_if_configured(folder):  # noqa: F811
    metrics = train(recipe(STEPS, "eval.metric=accuracy", "eval.keep=best", "train.max_steps=6"))
    accuracies = {entry["step"]: entry["eval_accuracy"] for entry in log() if "eval_accuracy" in entry}
    best = metrics["train"]["best"]
    assert (
        best["accuracy"]
        == max(accuracies.values())
        == accuracies[best["step"]]
        == metrics["eval"]["accuracy"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_at", [5, 8])
def test_best_adapter_and_patience_survive_a_resume(folder, monkeypatch, interrupted_at):  # noqa: F811
    """Step 8 is the last: it is the second evaluation in a row without an improvement."""
    losses = {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.25, 10: 0.5}

    def scripted(trainer, *_):
        metrics = {"eval_loss": losses[trainer.state.global_step]}
        trainer.log(dict(metrics))
        return metrics

    def killed(*_):
        raise KeyboardInterrupt

    def step(self, *arguments, **options):
        return (
            killed()
            if self.state.global_step == interrupted_at
            else training_step(self, *arguments, **options)
        )

    monkeypatch.setattr("flamingo_ft.training.trainer.run_evaluation", scripted)
    overrides = (NO_ANSWERS, "eval.patience=2", "eval.keep=best", "train.max_steps=40", "train.save_steps=2")
    whole = train(recipe(*overrides, "train.output_dir=whole"))
    training_step = FlamingoTrainerMixin.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FlamingoTrainerMixin, "training_step", step)
        patch.setattr("flamingo_ft.training.train.apply_best", killed)
        train(recipe(*overrides))
    resumed = train(recipe(*overrides), resume=True)
    assert whole["train"]["steps"] == resumed["train"]["steps"] == 8
    assert whole["train"]["best"] == resumed["train"]["best"] == {"step": 4, "loss": 1.0}
    assert Path("whole", WEIGHTS).read_bytes() == Path("run", WEIGHTS).read_bytes()


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_restoring_the_best_adapter_restores_every_parameter(small_run, start):
    model, processor = build(LORA, f"lora.init_lora_weights={start}")
    shake(model)
    then = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    best = Path("best")
    save_best(model, processor, best)
    shake(model, seed=1)
    restore_best(model, best)
    assert all(torch.equal(parameter, then[name]) for name, parameter in trainable_parameters(model).items())


def test_a_kill_between_two_renames_does_not_lose_the_best_adapter(small_run):
    model, processor = build()
    best = Path("checkpoints/best")
    save_best(model, processor, best)
    weights = (best / WEIGHTS).read_bytes()
    best.rename(best.with_name(".best.replaced"))
    atomic.begin_folder(best)
    atomic.remove_leftovers(best.parent)
    assert (best / WEIGHTS).read_bytes() == weights and [path.name for path in best.parent.iterdir()] == [
        "best"
    ]


def test_a_missing_best_adapter_resets_the_best_metric(small_run):
    sft_trainer = make_sft_trainer(*build(), "train.max_steps=1")
    sft_trainer.state.best_metric = 1.0
    KeepBest(sft_trainer.processing_class, Path("best")).on_train_begin(
        sft_trainer.args, sft_trainer.state, sft_trainer.control
    )
    assert sft_trainer.state.best_metric is None


def test_eval_samples_that_are_all_too_long_are_refused_before_training(folder):  # noqa: F811
    too_long = ("data.too_long=drop_sample", "data.max_text_tokens=8", "eval.before=false")
    with pytest.raises(UserError, match="eval.steps: no held-out sample has label tokens"):
        train(recipe(STEPS, *too_long))
