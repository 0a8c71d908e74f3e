"""A whole run on a few samples: its files, reproducibility, skipped rows."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flamingo_ft.adapters import load_adapter
from flamingo_ft.cli import main
from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.evaluate import evaluate_adapter
from flamingo_ft.training import train as train_module
from flamingo_ft.training.train import train
from flamingo_ft.training.trainer import FlamingoTrainer

RECIPE = """\
# a small run
model:
  vision: {name: nano}
  language: {name: nano}
  perceiver: {num_latents: 4, depth: 1, heads: 2, dim_head: 16}
data:
  train: [{path: train.jsonl}]
  eval: [{path: eval.jsonl}]
train: {output_dir: run, max_steps: 4, batch_size: 4, learning_rate: 1.0e-2, logging_steps: 1, num_workers: 0}
eval: {batch_size: 4, max_new_tokens: 6}
"""


def row(index: int, images: int) -> dict:
    blocks = [{"type": "image"}] * images + [{"type": "text", "text": "Which shade?"}]
    answer = "Dark." if index % 2 else "Light."
    return {
        "task": f"{images} images",
        "messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}],
        "images": [f"{index}.png"] * images,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(8):
        Image.new("RGB", (32, 32), (30 + 200 * (index % 2 == 0),) * 3).save(f"{index}.png")
    rows = [json.dumps(row(index, index % 3)) for index in range(8)]
    Path("train.jsonl").write_text("\n".join(rows))
    Path("eval.jsonl").write_text("\n".join(rows[:6]))
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def recipe(*overrides):
    return load_recipe("./recipe.yaml", overrides)


def test_a_run_writes_adapter_recipe_metrics_predictions_and_log(folder):
    metrics = train(recipe())
    run = folder / "run"
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["train"]["steps"] == 4 and metrics["train"]["seconds"] > 0
    model, _ = load_adapter(run)
    bridge = (model.perceiver, model.gated_cross_attn_layers, model.token_rows)
    assert metrics["train"]["trainable_parameters"] == sum(
        p.numel() for part in bridge for p in part.parameters()
    )
    scores = {f"accuracy{suffix}" for suffix in ("", "_before", "_shuffled_images", "_majority")}
    assert set(metrics["eval"]) == scores | {"per_task", "verdict", "image_loss_gap", "loss_by_kind"}
    assert metrics["eval"]["verdict"].startswith("too few held-out questions with images")
    assert set(metrics["eval"]["per_task"]) == {"0 images", "1 images", "2 images"}
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6 and {"before", "after", "shuffled_images"} <= set(predictions[0])
    assert load_recipe(run / "resolved_recipe.yaml") == recipe().model_copy()


@pytest.mark.slow
def test_the_reloaded_adapter_evaluates_as_the_run_did(folder):
    metrics = train(recipe("train.max_steps=12"))
    evaluated = evaluate_adapter("run")
    assert evaluated["eval"]["accuracy"] == metrics["eval"]["accuracy"]
    for task, result in evaluated["eval"]["per_task"].items():
        assert result["accuracy"] == metrics["eval"]["per_task"][task]["accuracy"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(folder):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(recipe(f"train.output_dir={name}", f"train.seed={seed}", "data.eval=[]"))
    first, again, other = (Path(name, "adapter_model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_accumulated_batches_equal_one_large_batch(folder):
    """With answers of different lengths, for which a mean of the batches' means would differ."""
    rows = [row(index, index % 3) for index in range(8)]
    for index, one in enumerate(rows):
        one["messages"][1]["content"] = "Dark, " * index + "or light."
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    losses, adapters = [], []
    for name, batch, accumulate in (("whole", 8, 1), ("accumulated", 1, 8)):
        settings = [
            f"train.batch_size={batch}",
            f"train.gradient_accumulation_steps={accumulate}",
            "train.max_steps=2",
            "data.eval=[]",
        ]
        assert main(["train", "./recipe.yaml", f"train.output_dir={name}", *settings]) == 0
        lines = [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]
        losses.append(torch.tensor([entry["loss"] for entry in lines if "loss" in entry]))
        adapters.append(load_file(Path(name, "adapter_model.safetensors")))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=0, atol=1e-3, msg=name)


def test_deprecated_argument_names_work_and_warn(folder, monkeypatch):
    monkeypatch.setattr(train_module, "_train_whole_run", lambda *arguments: arguments[-2:])
    with pytest.warns(FutureWarning, match="on_data= and log="):
        assert train(recipe(), tell=print, say=repr) == (print, repr)
    with pytest.warns(FutureWarning, match="on_data= and log="):
        assert train(recipe(), print, say=repr) == (print, repr)


def test_save_steps_writes_checkpoints_that_load_as_adapters(folder):
    train(recipe("train.save_steps=2", "data.eval=[]"))
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert kept == ["step-2", "step-4"]
    model, _ = load_adapter(folder / "run" / "checkpoints" / "step-2")
    final, _ = load_adapter(folder / "run")
    assert not torch.equal(model.perceiver.latents, final.perceiver.latents)


def test_sources_are_drawn_by_weight(folder, monkeypatch):
    """Weights of 3 and 1 on sources of 8 and 6 rows: an epoch of 24 + 6 draws."""
    Path("other.jsonl").write_text(Path("eval.jsonl").read_text())
    sources = "data.train=[{path: train.jsonl, weight: 3}, {path: other.jsonl}]"
    training_step, trained = FlamingoTrainer.training_step, Counter()

    def counted(trainer, *arguments, **options):
        trained.update(Path(row.split(": ")[0]).name for row in trainer.pending[0].rows)
        return training_step(trainer, *arguments, **options)

    monkeypatch.setattr(FlamingoTrainer, "training_step", counted)
    train(recipe(sources, "data.eval=[]", "train.max_steps=5", "train.batch_size=6"))
    assert trained == {"train.jsonl": 24, "other.jsonl": 6}


@pytest.mark.slow
def test_checkpointed_training_gives_the_same_losses(folder):
    losses = []
    for name, switch in (("plain", "false"), ("checkpointed", "true")):
        train(recipe(f"train.output_dir={name}", f"train.gradient_checkpointing={switch}", "data.eval=[]"))
        lines = [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]
        losses.append(torch.tensor([entry["loss"] for entry in lines if "loss" in entry]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_bad_data_is_reported_before_anything_is_written(folder):
    Path("train.jsonl").write_text(json.dumps(row(0, 1) | {"images": []}))
    with pytest.raises(UserError, match="row 0: got 1 <image> markers but 0 images"):
        train(recipe())
    assert not any(path.is_file() for path in (folder / "run").rglob("*"))


def test_an_earlier_run_is_never_overwritten(folder):
    train(recipe("data.eval=[]"))
    before = (folder / "run" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe("data.eval=[]"))
    assert (folder / "run" / "adapter_model.safetensors").read_bytes() == before


def test_a_question_longer_than_the_context_is_refused_before_training(folder):
    question = {"question": "Which shade? " * 400, "answer": "Dark.", "image": "0.png"}
    Path("eval.jsonl").write_text(json.dumps(question))
    with pytest.raises(UserError, match=r"eval.jsonl: row 0: got \d+ text tokens .* context is 512; shorten"):
        train(recipe())
    assert not (folder / "run" / "log.jsonl").exists()


def test_answers_end_at_the_context_length(folder):
    train(recipe("eval.max_new_tokens=2000", "train.max_steps=1"))
    answers = [json.loads(line)["after"] for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 6


def test_skipped_rows_are_counted_and_listed(folder):
    Path("0.png").write_bytes(b"no image")
    eval_rows = json.dumps(row(0, 2)) + "\n" + json.dumps(row(1, 1))
    Path("eval.jsonl").write_text(eval_rows)
    Path("train.jsonl").write_text("\n".join(json.dumps(row(index, 1)) for index in range(8)))
    skip = "data.on_bad_sample=skip"
    metrics = train(recipe(skip, "data.max_bad_share=0.2"))
    assert metrics["train"]["data"]["held_out_skipped"] == 1 and metrics["train"]["data"]["skipped"] >= 1
    listed = [json.loads(line)["where"] for line in Path("run/left_out.jsonl").read_text().splitlines()]
    assert listed == [f"{folder}/eval.jsonl: row 0", f"{folder}/train.jsonl: row 0"]
    with pytest.raises(UserError, match="max_bad_share"):
        train(recipe(skip, "data.max_bad_share=0.1", "train.output_dir=ended"))
    assert "train.jsonl: row 0" in Path("ended/left_out.jsonl").read_text()


@pytest.mark.slow
def test_a_refused_run_leaves_its_output_directory_usable(folder):
    Path("pairs.jsonl").write_text(
        json.dumps({"prompt": "Which shade?", "chosen": "Dark.", "rejected": "Light."})
    )
    with pytest.raises(UserError, match="got preference pairs"):
        train(recipe("data.train=[{path: pairs.jsonl}]"))
    train(recipe("train.max_steps=1"))
