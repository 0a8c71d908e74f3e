"""Runs that push checkpoints to a Hub and resume from them, with the real client."""

from __future__ import annotations

import shutil

import pytest

from flamingo_ft.adapters import load_adapter
from flamingo_ft.cli import main
from flamingo_ft.hub import errors
from tests import killing, regimes
from tests.hub_server import READER, WRITER

REPO = "somebody/run"
COMMAND = ["train", "./recipe.yaml", "train.max_steps=6", "train.save_steps=1", f"train.push_to_hub={REPO}"]
WEIGHTS = "run/adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
    regimes.write_run(tmp_path)
    return tmp_path


def output_of(capfd) -> str:
    output = "".join(capfd.readouterr())
    assert WRITER not in output and READER not in output and "Traceback" not in output
    return output


def test_a_run_pushes_its_checkpoints_and_its_adapter(folder, hub, capfd):
    assert main(COMMAND) == 0, output_of(capfd)
    files, history = hub.files(REPO), hub.repositories[REPO].history
    steps = {path.split("/")[1] for path in files if path.startswith("checkpoints/")}
    assert hub.repositories[REPO].private and "step-6" in steps and len(steps) == 2
    assert files["adapter_model.safetensors"] == (folder / WEIGHTS).read_bytes()
    assert history[-1].title == "The trained adapter" and "adapter_model.safetensors" not in history[-2].files
    for commit in history:  # all of a checkpoint, or nothing
        for step in {path.split("/")[1] for path in commit.files if path.startswith("checkpoints/")}:
            assert f"checkpoints/{step}/checkpoint.json" in commit.files
    assert not any(WRITER.encode() in content for content in files.values())
    output_of(capfd)


@pytest.mark.slow
def test_a_run_resumes_from_the_hub_bit_for_bit_after_losing_its_machine(folder, hub, capfd):
    assert main(["train", "./recipe.yaml", "train.max_steps=6", "train.output_dir=alone"]) == 0

    def pushed() -> bool:  # the first upload is never replaced, and the run waits for the last one
        return REPO in hub.repositories and any(path.startswith("checkpoints/") for path in hub.files(REPO))

    around = killing.Around({"HF_TOKEN": WRITER}, hub=hub.constants)
    assert (
        killing.kill_when(killing.start(COMMAND, folder, folder / "log.txt", around), pushed)
        == killing.KILLED
    )
    shutil.rmtree(folder / "run")
    assert main([*COMMAND, "--resume"]) == 0
    output = output_of(capfd)
    assert f"from {REPO}" in output and "resuming from run/checkpoints/step-" in output
    assert (folder / WEIGHTS).read_bytes() == (folder / "alone" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_resume_skips_a_checkpoint_damaged_on_the_hub(folder, hub, capfd):
    assert main(COMMAND) == 0
    shutil.rmtree(folder / "run")
    files = hub.repositories[REPO].history[-1].files
    files["checkpoints/step-6/training/optimizer.pt"] = hub.store(b"not what it was")
    before = next(
        path.split("/")[1] for path in files if path.endswith("/checkpoint.json") and "step-6" not in path
    )
    assert main([*COMMAND, "--resume"]) == 0
    output = output_of(capfd)
    assert "damaged on the Hub" in output and f"resuming from run/checkpoints/{before}" in output
    load_adapter(folder / "run")


@pytest.mark.slow
def test_a_new_run_is_refused_beside_the_checkpoints_of_another(folder, hub, capfd):
    assert main([*COMMAND, "train.max_steps=2"]) == 0
    before = hub.files(REPO)
    assert main([*COMMAND, "train.output_dir=second"]) == 2
    assert f"{REPO} holds step-2 of an earlier run; resume that run with --resume" in output_of(capfd)
    assert hub.files(REPO) == before


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, None])
def test_an_unavailable_hub_does_not_end_the_run(folder, hub, capfd, status):
    hub.fail(f"POST /api/models/{REPO}/commit", times=1000, status=status)
    assert main([*COMMAND, "train.max_steps=2"]) == 0
    output = output_of(capfd)
    assert f"not uploaded to {REPO}: step-2 (" in output
    assert f"not uploaded to {REPO}: step-2 and the adapter (on this machine only)" in output
    assert (folder / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "no valid token"),
        ("hf_wrong", "no valid token"),
        (READER, "the token may not write there"),
    ],
)
def test_missing_write_access_is_reported_before_loading(folder, hub, monkeypatch, capfd, token, reason):
    monkeypatch.setattr("flamingo_ft.training.train.open_data", None)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert main(COMMAND) == 2
    output = output_of(capfd)
    assert f"train.push_to_hub: {REPO}: {reason}" in output and "hf_wrong" not in output


def test_an_invalid_repository_name_is_refused_without_a_request(folder, hub, capfd):
    assert main([*COMMAND, "train.push_to_hub=some--body/run"]) == 2
    assert "train.push_to_hub: some--body/run: not the name of a repository" in output_of(capfd)
    assert hub.requests == []
