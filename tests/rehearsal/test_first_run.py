"""What a user with one GPU does with the released models, from the first download to push and pull.

Every step is a command, with the recipes as they are and the real client of the Hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download

import flamingo_ft
from flamingo_ft import cli
from tests.hub_server import WRITER, Hub

from . import datasets_on_the_hub
from .conftest import empty_caches, new_machine
from .datasets_on_the_hub import LLAVA, VQA_RAD
from .hub_contents import CLIP_VIT_L, INCITE, MPT, OPEN_FLAMINGO_4B, OPEN_FLAMINGO_9B

pytestmark = pytest.mark.slow

WEIGHTS = (".bin", ".pt", ".safetensors")
SHORT = [
    "train.batch_size=2", "train.num_workers=0", "train.warmup_steps=1", "train.save_steps=1",
    "train.output_dir=runs/mine", "eval.max_samples=4", "eval.max_new_tokens=8",
]  # fmt: skip
ANSWER = ["--max-new-tokens", "8", "--min-new-tokens", "8"]


@dataclass(frozen=True)
class Job:
    """recipe: by its name. data: overrides. prompt: as in the data. weights: files that it downloads."""

    recipe: str
    data: list[str]
    prompt: str
    weights: set[str]


TOWER = f"{CLIP_VIT_L}/open_clip_model.safetensors"
PARQUET = Job(
    "open_flamingo_4b",
    [f"data.train=[{{hub: {VQA_RAD}}}]", f"data.eval=[{{hub: {VQA_RAD}, split: test}}]"],
    datasets_on_the_hub.QUESTION,
    {TOWER, f"{INCITE}/pytorch_model.bin", f"{OPEN_FLAMINGO_4B}/checkpoint.pt"},
)
CONVERSATIONS = Job(
    "open_flamingo_9b",
    ["data={train: [{path: llava_instruct_150k.json, image_root: train2017}], eval_fraction: 0.25}"],
    "What is the color of the field?",
    {
        TOWER,
        *(f"{MPT}/pytorch_model-{shard:05}-of-00003.bin" for shard in (1, 2, 3)),
        f"{OPEN_FLAMINGO_9B}/checkpoint.pt",
    },
)
JOBS = [pytest.param(job, id=job.recipe) for job in (PARQUET, CONVERSATIONS)]


def flamingo_ft_runs(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0, arguments


def fetch_data(job: Job) -> None:
    """Do what the user does before the first command: LLaVA's list and COCO's images are on this machine."""
    if job is CONVERSATIONS:
        hf_hub_download(LLAVA, "llava_instruct_150k.json", repo_type="dataset", local_dir=".")
    datasets_on_the_hub.write_coco(Path("train2017"))


def downloaded_weights(hub: Hub) -> set[str]:
    """Return the weights that were downloaded so far, as org/name/file."""
    paths = [request.removeprefix("GET /") for request in hub.requests if request.startswith("GET /")]
    files = [path.split("/resolve/") for path in paths if path.endswith(WEIGHTS)]
    return {f"{name}/{file.partition('/')[2]}" for name, file in files}


def answer(model: str, job: Job, capfd) -> str:
    """Return what `flamingo-ft generate` prints about an image."""
    capfd.readouterr()
    image = Path("train2017", datasets_on_the_hub.coco_name(0))
    flamingo_ft_runs("generate", model, "--image", str(image), "--prompt", job.prompt, *ANSWER)
    printed = capfd.readouterr().out
    assert printed.strip(), "no answer was printed"
    return printed


def answer_in_python(model: str, job: Job) -> str:
    predictor = flamingo_ft.load(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    return predictor(Path("train2017", datasets_on_the_hub.coco_name(0)), job.prompt, **options)


@pytest.mark.parametrize("job", JOBS)
def test_a_plan_and_a_check_download_no_weights(job, hub, capfd):
    fetch_data(job)
    flamingo_ft_runs("plan", job.recipe, *job.data)
    flamingo_ft_runs("check", job.recipe, *job.data)
    assert hub.requests and downloaded_weights(hub) == set()
    output, errors = capfd.readouterr()
    assert "does it fit?" in output and "full report" in output
    assert "error" not in errors and "warning" not in errors.lower()


@pytest.mark.parametrize("job", JOBS)
def test_a_released_model_is_trained_resumed_merged_pushed_and_pulled(job, hub, tmp_path, monkeypatch, capfd):
    fetch_data(job)
    train_with_a_disconnect(job, hub, monkeypatch, capfd, tmp_path / "after_the_disconnect")
    hub.requests.clear()
    flamingo_ft_runs("eval", "runs/mine", "eval.max_samples=2")
    flamingo_ft_runs("merge", "runs/mine", "merged")
    answers = {name: answer(name, job, capfd) for name in ("runs/mine", "merged")}
    assert downloaded_weights(hub) == set(), "everything is cached"
    push_both(job, hub, monkeypatch, capfd)

    coco = Path("train2017").resolve()
    new_machine(monkeypatch, tmp_path / "another")
    Path("train2017").symlink_to(coco)
    adapter, merged = f"me/{job.recipe}", f"me/{job.recipe}-merged"
    assert answer(adapter, job, capfd) == answers["runs/mine"]
    assert answer_in_python(adapter, job).strip() == answers["runs/mine"].strip()
    hub.requests.clear()
    assert answer(merged, job, capfd) == answers["merged"]
    assert answer_in_python(merged, job).strip() == answers["merged"].strip()
    assert downloaded_weights(hub) == {f"{merged}/model.safetensors"}


def train_with_a_disconnect(job: Job, hub: Hub, monkeypatch, capfd, new_caches: Path) -> None:
    """Train a step, with a download that breaks off and is continued; then another one, with empty caches."""
    hub.fail("GET /.*/checkpoint.pt", half_way=True)
    flamingo_ft_runs("train", job.recipe, *job.data, *SHORT, "train.max_steps=1")
    assert downloaded_weights(hub) == job.weights
    assert "No files matched" not in capfd.readouterr().err
    hub.requests.clear()
    empty_caches(monkeypatch, new_caches)
    flamingo_ft_runs("train", job.recipe, *job.data, *SHORT, "train.max_steps=2", "--resume")
    assert downloaded_weights(hub) == job.weights
    assert "resuming from runs/mine/checkpoints/step-1" in capfd.readouterr().err
    assert json.loads(Path("runs/mine/metrics.json").read_text())["train"]["steps"] == 2


def push_both(job: Job, hub: Hub, monkeypatch, capfd) -> None:
    """Try to push without a token; then push the adapter and the merged model with one."""
    assert cli.main(["push", "runs/mine", f"me/{job.recipe}"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: me/{job.recipe}: no valid token; log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    flamingo_ft_runs("push", "runs/mine", f"me/{job.recipe}")
    flamingo_ft_runs("push", "merged", f"me/{job.recipe}-merged")
    check_card(hub.files(f"me/{job.recipe}")["README.md"].decode(), job)


def check_card(card: str, job: Job) -> None:
    """Check that a pushed adapter's card names what it was trained from, and no folder of this machine."""
    names = (INCITE, OPEN_FLAMINGO_4B, VQA_RAD) if job is PARQUET else (MPT, OPEN_FLAMINGO_9B)
    assert all(name in card for name in (*names, CLIP_VIT_L))
    assert f'"me/{job.recipe}"' in card and str(Path.cwd()) not in card


def test_the_bridge_of_a_trained_model_is_the_released_one(hub):
    """After a step at a learning rate of almost zero, the new tokens' rows are those of the checkpoint."""
    data = [f"data={{train: [{{hub: {VQA_RAD}}}]}}"]
    few = [*SHORT, "train.max_steps=1", "train.learning_rate=1.0e-12", "trainable.dtype=fp32"]
    flamingo_ft_runs("train", PARQUET.recipe, *data, *few)
    model, _ = flamingo_ft.load_adapter("runs/mine")
    stored = torch.load(hf_hub_download(OPEN_FLAMINGO_4B, "checkpoint.pt"), weights_only=True)
    ids, rows = list(model.token_rows.token_ids), model.token_rows
    embedding, head = (
        stored[f"lang_encoder.{name}.weight"][ids] for name in ("gpt_neox.embed_in", "embed_out")
    )
    torch.testing.assert_close(rows.input.weight.cpu().float(), embedding, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.output.weight.cpu().float(), head, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("status", [500, None])
def test_a_download_that_keeps_failing_is_one_line_and_is_continued_by_the_next_command(status, hub, capfd):
    hub.fail("GET /openflamingo/.*/checkpoint.pt", times=1000, status=status)
    command = ["convert", OPEN_FLAMINGO_9B, "adapter"]
    assert cli.main(command) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    reason = "the Hub is in trouble (500)" if status else "the connection to the Hub broke off"
    assert len(errors) == 1 and f"{OPEN_FLAMINGO_9B}: {reason}" in errors[0]
    hub.failures.clear()
    flamingo_ft_runs(*command)


def test_one_of_several_lists_is_read_from_the_hub(hub, capfd):
    """LLaVA-Instruct-150K as a dataset: its largest file has a column more than the others."""
    datasets_on_the_hub.write_coco(Path("train2017"))
    data = [f"data={{train: [{{hub: {LLAVA}, image_root: train2017}}]}}"]
    assert cli.main(["check", CONVERSATIONS.recipe, *data]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"{LLAVA}[train]: cannot be read as one, its files have different columns; set data_files" in error
    name, folder = "llava_instruct_80k.json", "image_root: train2017"
    data = [f"data={{train: [{{hub: {LLAVA}, data_files: {name}, {folder}}}]}}"]
    flamingo_ft_runs("check", CONVERSATIONS.recipe, *data, "--out", "checked")
    (part,) = json.loads(Path("checked/check.json").read_text())["parts"]
    assert part["name"] == f"{LLAVA}[{name}]" and part["samples"] == 8
