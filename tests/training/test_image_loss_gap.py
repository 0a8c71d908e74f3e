"""The loss with swapped images minus the loss with the true ones, at evaluations during training."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flamingo_ft.data import open_data
from flamingo_ft.data.collate import load_media
from flamingo_ft.data.encode import encode
from flamingo_ft.data.feature_cache import FrozenTower
from flamingo_ft.evaluation.image_loss_gap import INDISTINGUISHABLE, ImageLossGap
from flamingo_ft.evaluation.loss_by_kind import TEXT_ONLY, WITH_IMAGES, LossByKind, log_key
from flamingo_ft.evaluation.questions import with_other_images
from flamingo_ft.report.run_folder import read_log
from flamingo_ft.training.build import build_model, make_trainer
from flamingo_ft.training.eval_batches import EvalBatches
from flamingo_ft.training.evaluation import run_evaluation
from flamingo_ft.training.image_loss import measure_losses
from flamingo_ft.training.train import train
from flamingo_ft.training.trainer import FlamingoTrainerMixin

from ..regimes import recipe as small_recipe
from ..regimes import shake
from ..thinned import slow
from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)

WEIGHTS = "adapter_model.safetensors"
KEY = "eval_image_loss_gap"
IMAGES = [1, 2, 0, 1, 3, 2, 1, 2, 0, 1]  # in each row; no other row has 3
SWAPPED = [n for n, count in enumerate(IMAGES) if count in (1, 2)]


def row(number: int, images: int, answer: str) -> dict:
    question = [{"type": "image"}] * images + [{"type": "text", "text": "Which shade?"}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": [f"{number}_{index}.png" for index in range(images)],
    }


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def mixed(small_run):
    """Held-out rows with 0 to 3 images, all of different shades, and answers of different lengths."""
    for number, count in enumerate(IMAGES):
        for index in range(count):
            Image.new("RGB", (32, 32), (20 * number + 9 * index,) * 3).save(f"{number}_{index}.png")
    answers = ["Dark.", "Light, as you see.", "It is light."]
    write("eval.jsonl", [row(n, count, answers[n % 3]) for n, count in enumerate(IMAGES)])


def recipe(*overrides: str):
    return small_recipe("data.eval=[{path: eval.jsonl}]", "eval.steps=2", "eval.batch_size=4", *overrides)


def ready(config, noise: float = 0.3):
    """Return a trainer with open gates unless ``noise`` is 0, and the batches of the held-out samples."""
    model, processor = build_model(config)
    data = open_data(config.data, config.train.seed)
    if noise:
        shake(model, noise)
    trainer = make_trainer(model, processor, data, config, [])
    features = trainer.batches.features
    return trainer, EvalBatches(data.eval_samples(), model, processor, config, features=features)


def losses_by_hand(trainer, samples) -> np.ndarray:
    """The loss of each sample in float64, summed over its label tokens."""
    processor, losses = trainer.processing_class, []
    for sample in samples:
        encoded = encode(processor, sample)
        media = load_media(processor, [{"images": sample.images, "where": ""}])
        media = {name: tensor.double() for name, tensor in media.items()}
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([encoded.input_ids]), **media).logits[0]
        log_probs = logits.log_softmax(-1)
        labels = encoded.labels[1:]
        losses.append(-sum(log_probs[t, label].item() for t, label in enumerate(labels) if label != -100))
    return np.array(losses)


def test_the_gap_and_its_standard_error_equal_float64_by_hand(mixed):
    trainer, batches = ready(recipe())
    logged = run_evaluation(trainer, batches, None)
    gap = measure_losses(trainer, batches).gap
    assert gap == ImageLossGap.of_log(logged) and gap.samples == len(SWAPPED)

    samples = open_data(recipe().data, 0).eval_samples()
    trainer.model.eval().double()
    own, other = (losses_by_hand(trainer, each) for each in (samples, with_other_images(samples, 0)))
    assert own[2] == other[2] and own[4] == other[4]  # no images, or none to swap them with
    tokens = np.array([encode(trainer.processing_class, sample).label_tokens for sample in samples])
    has_images = np.array(IMAGES) > 0
    for kind, rows in ((TEXT_ONLY, ~has_images), (WITH_IMAGES, has_images)):
        assert logged[log_key(kind)] == pytest.approx(own[rows].sum() / tokens[rows].sum(), rel=1e-4)
        assert logged[f"{log_key(kind)}_samples"] == rows.sum()
    difference, size = (other - own)[SWAPPED], tokens[SWAPPED]
    value, count = difference.sum() / size.sum(), len(SWAPPED)
    error = math.sqrt(((difference - value * size) ** 2).sum() * count / (count - 1)) / size.sum()
    assert abs(value) > 1e-3
    assert gap.value == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert gap.standard_error == pytest.approx(error, rel=1e-3)


def test_a_model_whose_gates_are_zero_has_a_gap_of_exactly_zero(mixed):
    trainer, batches = ready(recipe(), noise=0)
    logged = run_evaluation(trainer, batches, None)
    assert (logged[KEY], logged[f"{KEY}_standard_error"]) == (0.0, 0.0)


def test_swapped_batches_differ_by_their_images_alone(mixed):
    _, batches = ready(recipe())
    for (true, weight), (swapped, other_weight) in zip(batches, batches.with_images_swapped(), strict=True):
        assert weight == other_weight
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(true[name], swapped[name])
    assert [row.swapped for row in batches.own_rows] == [
        len(row.sample.images) in (1, 2) for row in batches.own_rows
    ]
    assert all(
        set(row.sample.images).isdisjoint(row.other.images) and len(row.other.images) == row.text.images
        for row in batches.own_rows
        if row.swapped
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_counts_once_for_any_number_of_processes(mixed, world_size):
    config = recipe()
    model, processor = build_model(config)
    samples = open_data(config.data, 0).eval_samples()
    rows = [
        row.sample.where
        for rank in range(world_size)
        for row in EvalBatches(samples, model, processor, config, rank=rank, world_size=world_size).own_rows
    ]
    assert sorted(rows) == sorted(sample.where for sample in samples)


def test_images_that_were_cut_with_the_text_are_not_swapped_for(mixed):
    """Of two images, one is left in the text; it is swapped with those of rows with one image."""
    whole = EvalBatches(open_data(recipe().data, 0).eval_samples(), *build_model(recipe()), recipe())
    longest = max(row.text.text_tokens for row in whole.own_rows)
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Dark."}]
    dialogue = {"messages": turns * 12, "images": ["0_0.png"] * 11 + ["1_0.png"]}
    write("eval.jsonl", [dialogue, row(3, 1, "Dark.")])
    config = recipe("data.too_long=drop_turns", f"data.max_text_tokens={longest}")
    batches = EvalBatches(open_data(config.data, 0).eval_samples(), *build_model(config), config)
    cut = next(row for row in batches.own_rows if row.text.text_tokens > 1 and len(row.sample.images) == 12)
    assert cut.text.images == len(cut.other.images) < 12


def test_nothing_is_measured_if_it_is_turned_off_or_no_image_can_be_swapped(mixed):
    trainer, batches = ready(recipe("eval.shuffled_images=false"))
    assert not any(name.startswith(KEY) for name in run_evaluation(trainer, batches, None))
    write("eval.jsonl", [row(0, 1, "Dark."), row(1, 2, "Light."), row(2, 0, "Light.")])
    assert measure_losses(*ready(recipe())).gap is None


@pytest.mark.filterwarnings("ignore")
def test_preference_training_measures_no_gap(pairs):  # noqa: F811
    trainer, batches = ready(small_recipe(*DPO, "data.eval=[{path: pairs.jsonl}]", "eval.steps=2"))
    logged = run_evaluation(trainer, batches, None)
    assert "eval_loss" in logged and KEY not in logged


def test_an_evaluation_leaves_weights_and_random_states_as_they_were(mixed):
    trainer, batches = ready(recipe("lora={language: {r: 2}, lora_dropout: 0.2}"))

    def state():
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        return weights, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    weights, *before = state()
    run_evaluation(trainer, batches, None)
    weights_after, *after = state()
    assert all(map(torch.equal, weights, weights_after)) and trainer.model.training
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not trainer.model._forward_hooks


def test_with_a_feature_cache_swapped_images_need_no_second_pass_of_the_tower(mixed, monkeypatch):
    plain = measure_losses(*ready(recipe())).gap
    trainer, batches = ready(recipe("data.cache={folder: cache, dtype: fp32}"))
    encoded, encode_images = [], FrozenTower.encode
    monkeypatch.setattr(
        FrozenTower,
        "encode",
        lambda self, images: (encoded.append(len(images)), encode_images(self, images))[1],
    )
    gap = ImageLossGap.of_log(run_evaluation(trainer, batches, None))
    assert sum(encoded) == sum(IMAGES)
    run_evaluation(trainer, batches, None)
    assert sum(encoded) == sum(IMAGES)
    assert gap.value == pytest.approx(plain.value, rel=1e-3, abs=1e-6)


# --- whole runs ---


@pytest.fixture
def shades(small_run):
    """Dark and light images, whose shade is the answer: 16 rows to train on and 24 to evaluate."""
    for number in range(40):
        shade = (number % 2) * 180 + number
        Image.new("RGB", (32, 32), (shade,) * 3).save(f"{number}_0.png")
    rows = [row(number, 1, ("Dark.", "Light.")[number % 2]) for number in range(40)]
    write("train.jsonl", rows[:16])
    write("eval.jsonl", rows[16:])


@pytest.mark.slow
def test_a_model_that_learned_to_look_has_a_gap_clearly_above_zero_everywhere(shades, whole_runs, capsys):
    options = ("eval.steps=30", "train.max_steps=60", "train.batch_size=8", "eval.answers=false",
               "train.learning_rates.gates=1.0e-2")  # fmt: skip
    metrics = train(recipe(*options, "eval.batch_size=24", "train.lr_scheduler=constant"))
    gaps = [(entry["step"], ImageLossGap.of_log(entry)) for entry in read_log(Path("run")) if KEY in entry]
    assert [step for step, _ in gaps] == [0, 30, 60]
    assert gaps[0][1] == ImageLossGap(0.0, 0.0, 24) and gaps[0][1].conclusion == INDISTINGUISHABLE
    final = gaps[-1][1]
    assert final.value > 3 * final.standard_error > 0

    assert ImageLossGap(**metrics["eval"]["image_loss_gap"]) == final
    assert metrics["eval"]["verdict"].startswith("reads the images: ")
    assert f"{final.text} nats per label token, clearly above zero" in metrics["eval"]["verdict"]
    assert f"with another image {final.text}" in capsys.readouterr().out
    page = Path("run/report.html").read_text()
    assert Path("run/figures/image_loss_gap.png").is_file()
    assert "0 means that the answers are predicted without looking" in page
    assert f"At step 60: {final.text}, clearly above zero." in page
    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("eval/image_loss_gap")] == [0, 30, 60]


def test_a_run_without_eval_steps_has_the_gap_of_its_final_model_and_refuses_no_sample(shades):
    rows = [json.loads(line) for line in Path("eval.jsonl").read_text().splitlines()]
    write("eval.jsonl", [*rows[:4], row(0, 1, "Dark. " * 30)])
    options = ("eval.steps=null", "eval.before=false", "train.max_steps=1", "data.max_text_tokens=24")
    gap = train(recipe(*options, "eval.max_new_tokens=2"))["eval"]["image_loss_gap"]
    assert gap["samples"] == 4 and gap["value"] != 0


@pytest.mark.slow
def test_the_gap_of_the_best_adapter_is_the_runs_if_that_is_kept(shades, monkeypatch):
    values = {2: 1.0, 4: 2.0}

    def scripted(trainer, batches, scores_fn):
        metrics = run_evaluation(trainer, batches, scores_fn)
        return metrics | {"eval_loss": values[trainer.state.global_step]}

    monkeypatch.setattr("flamingo_ft.training.trainer.run_evaluation", scripted)
    metrics = train(recipe("eval.keep=best", "train.max_steps=4", "eval.answers=false", "eval.before=false"))
    gaps = {entry["step"]: entry[KEY] for entry in read_log(Path("run")) if KEY in entry}
    assert metrics["train"]["best"]["step"] == 2
    assert gaps[2] != gaps[4] and metrics["eval"]["image_loss_gap"]["value"] == gaps[2]


@pytest.mark.slow
def test_training_and_resuming_are_bit_identical_with_and_without_the_gap(shades, monkeypatch):
    """With LoRA's dropout, which draws random numbers as it goes."""
    options = (
        "lora={language: {r: 2}, lora_dropout: 0.2}",
        "eval.answers=false",
        "eval.before=false",
        "train.max_steps=4",
        "train.save_steps=2",
    )
    train(recipe(*options, "eval.shuffled_images=false", "train.output_dir=without"))
    whole = train(recipe(*options, "train.output_dir=whole"))
    training_step = FlamingoTrainerMixin.training_step

    def interrupted(self, *arguments, **keywords):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FlamingoTrainerMixin, "training_step", interrupted)
        train(recipe(*options))
    resumed = train(recipe(*options), resume=True)
    assert resumed["eval"]["image_loss_gap"] == whole["eval"]["image_loss_gap"]
    logs = {name: read_log(Path(name)) for name in ("without", "whole", "run")}
    assert [e[KEY] for e in logs["run"] if KEY in e] == [e[KEY] for e in logs["whole"] if KEY in e]
    assert not any(KEY in entry for entry in logs["without"])
    for name in ("without", "run"):
        assert Path(name, WEIGHTS).read_bytes() == Path("whole", WEIGHTS).read_bytes()
        for key in ("loss", "eval_loss"):
            assert [e[key] for e in logs[name] if key in e] == [e[key] for e in logs["whole"] if key in e]


# --- rows without images ---


@pytest.mark.parametrize("steps", [slow("eval.steps=null"), "eval.steps=2"])
def test_the_text_only_loss_is_known_before_during_and_after_training(mixed, steps):
    metrics = train(recipe("train.max_steps=4", "eval.answers=false", steps))["eval"]["loss_by_kind"]
    assert metrics[TEXT_ONLY]["samples"] == 2 and metrics[WITH_IMAGES]["samples"] == 8
    logged = {
        entry["step"]: losses for entry in read_log(Path("run")) if (losses := LossByKind.of_log(entry))
    }
    assert [*logged] == ([0, 2, 4] if steps.endswith("2") else [0, 4])
    for kind in (TEXT_ONLY, WITH_IMAGES):
        before_and_after = logged[0].losses[kind].value, logged[4].losses[kind].value
        assert (metrics[kind]["before"], metrics[kind]["after"]) == before_and_after
        assert before_and_after[0] != before_and_after[1]
    card = Path("run", "README.md").read_text()
    assert (
        f"| text only | 2 | {metrics[TEXT_ONLY]['before']:.4f} | {metrics[TEXT_ONLY]['after']:.4f} |" in card
    )


def test_without_text_only_rows_nothing_is_logged_by_kind(small_run):
    config = small_recipe("data.eval=[{path: train.jsonl}]", "train.max_steps=2", "eval.steps=1")
    assert "loss_by_kind" not in train(config)["eval"]
    assert not any(LossByKind.of_log(entry) for entry in read_log(Path("run")))
