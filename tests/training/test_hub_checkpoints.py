"""Background uploads of checkpoints: one at a time, atomic, and never blocking training."""

from __future__ import annotations

import hashlib
import shutil
import threading

import pytest

from flamingo_ft import atomic
from flamingo_ft.hub import errors, upload
from flamingo_ft.training import hub_checkpoints
from flamingo_ft.training.checkpoint_folders import write_manifest
from tests.hub_server import LARGE, WRITER

REPO = "somebody/run"
ONLY_HERE = f"not uploaded to {REPO}: step-1 (on this machine only)"
COMMIT = f"POST /api/models/{REPO}/commit"


@pytest.fixture
def root(tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
    hub_checkpoints.prepare_repository(REPO, starts_new_run=True)
    return tmp_path / "root"


@pytest.fixture
def lines():
    return []


def checkpoint(root, step):
    folder = root / f"step-{step}"
    (folder / "training").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(bytes([step]) * LARGE)
    (folder / "training" / "state.json").write_text(str(step))
    write_manifest(folder, {"step": step})
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def on_hub(hub, step, revision="main"):
    start = f"checkpoints/step-{step}/"
    files = hub.files(REPO, revision)
    return {path.removeprefix(start): content for path, content in files.items() if path.startswith(start)}


def titles(hub):
    return [commit.title for commit in hub.repositories[REPO].history[1:]]


def test_training_continues_during_an_upload_and_a_newer_checkpoint_replaces_a_waiting_one(root, hub, lines):
    slow = hub.hold(COMMIT)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(checkpoint(root, 1))
        assert slow.reached.wait(10)
        for step in (2, 3):
            uploads.push_checkpoint(checkpoint(root, step))
        expected = {step: contents(root / f"step-{step}") for step in (1, 3)}
        for step in (1, 2, 3):  # as when newer ones come
            atomic.remove_folder(root / f"step-{step}")
        assert titles(hub) == []
        slow.released.set()
    assert titles(hub) == ["Checkpoint of step 1", "Checkpoint of step 3"]
    assert {step: on_hub(hub, step) for step in expected} == expected
    assert list(root.iterdir()) == [] and not any("not uploaded" in line for line in lines)


def test_a_checkpoints_commit_deletes_the_oldest_one(root, hub, lines):
    for step in (1, 2, 3):
        with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
            uploads.push_checkpoint(checkpoint(root, step))
    for number, steps in enumerate([[1], [1, 2], [2, 3]], start=1):
        revision = hub.repositories[REPO].history[number].oid
        steps_there = [step for step in (1, 2, 3) if on_hub(hub, step, revision)]
        assert steps_there == steps
        assert all(on_hub(hub, step, revision) == contents(root / f"step-{step}") for step in steps)


def test_a_failed_upload_is_logged_and_the_next_one_succeeds(root, hub, lines):
    hub.fail(COMMIT, times=errors.ATTEMPTS, status=403)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(checkpoint(root, 1))
        while not lines:
            threading.Event().wait(0.01)
        uploads.push_checkpoint(checkpoint(root, 2))
    assert len(lines) == 1 and lines[0].startswith(f"not uploaded to {REPO}: step-1 (")
    assert titles(hub) == ["Checkpoint of step 2"]


def test_a_transient_failure_is_retried_silently(root, hub, lines):
    hub.fail(COMMIT, times=errors.ATTEMPTS - 1, status=403)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(checkpoint(root, 1))
    assert titles(hub) == ["Checkpoint of step 1"] and lines == []


def test_an_unresponsive_hub_times_out_and_is_logged(root, hub, lines, monkeypatch):
    monkeypatch.setattr(upload, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(errors, "ATTEMPTS", 1)
    monkeypatch.setattr(hub_checkpoints, "NOTICE_AFTER", 0.1)
    hub.hold(COMMIT)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(checkpoint(root, 1))
    assert lines[0].startswith(f"waiting for uploads to {REPO}") and lines[-1] == ONLY_HERE


def test_waiting_for_an_unresponsive_hub_can_be_interrupted(root, hub, lines, monkeypatch):
    def interrupted(line):
        lines.append(line)
        if line.startswith("waiting"):
            raise KeyboardInterrupt

    monkeypatch.setattr(hub_checkpoints, "NOTICE_AFTER", 0.1)
    held = hub.hold(COMMIT)
    with (
        pytest.raises(KeyboardInterrupt),
        hub_checkpoints.background_uploads(REPO, 2, interrupted) as uploads,
    ):
        uploads.push_checkpoint(checkpoint(root, 1))
        assert held.reached.wait(10)
    assert lines[-1] == ONLY_HERE
    threads = [thread for thread in threading.enumerate() if thread.name == "push"]
    assert threads and all(thread.daemon for thread in threads)  # the process may end
    held.released.set()
    for thread in threads:
        thread.join()


def test_a_disk_without_links_or_room_does_not_end_training(root, hub, lines, monkeypatch):
    def full(*_, **__):
        raise shutil.Error([("adapter.bin", "there", "no space left")])

    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads, monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        uploads.push_checkpoint(checkpoint(root, 1))
    assert "no space left" in lines[0] and lines[-1] == ONLY_HERE
    assert [path.name for path in root.iterdir()] == ["step-1"]


def test_a_disk_without_links_gets_copies(root, hub, lines, monkeypatch):
    def no_links(*_, **__):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", no_links)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(checkpoint(root, 1))
    assert on_hub(hub, 1) == contents(root / "step-1") and lines == []


def test_files_already_on_the_hub_are_not_uploaded_again(root, hub, lines, trained_start):
    folder = shutil.copytree(trained_start / "start", root / "step-1")
    write_manifest(folder, {"step": 1})
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_checkpoint(folder)
        uploads.push_run(folder)
    assert titles(hub) == ["Checkpoint of step 1", "The trained adapter"]
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert hub.requests.count(f"PUT /lfs/{hashlib.sha256(weights).hexdigest()}") == 1
    assert hub.files(REPO)["adapter_model.safetensors"] == weights


def test_a_run_is_pushed_without_its_checkpoints(tmp_path, root, hub, lines, trained_start):
    run = shutil.copytree(trained_start / "start", tmp_path / "run")
    expected = {path.name for path in run.iterdir()}
    for where in ("checkpoints", "kept/here"):
        checkpoint(run / where, 1)
    with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
        uploads.push_run(run)
    assert {*hub.files(REPO)} == expected and f'"{REPO}"'.encode() in hub.files(REPO)["README.md"]


def test_the_newest_valid_checkpoint_is_fetched_unless_a_local_one_is_as_new(root, hub, lines, tmp_path):
    for step in (1, 2):
        with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
            uploads.push_checkpoint(checkpoint(root, step))
    hub.requests.clear()
    assert list(hub_checkpoints.fetch_newer_checkpoint(REPO, tmp_path / "other", 2)) == []
    assert not any("/resolve/" in request for request in hub.requests)
    assert len(list(hub_checkpoints.fetch_newer_checkpoint(REPO, tmp_path / "other", -1))) == 1
    assert contents(tmp_path / "other" / "step-2") == contents(root / "step-2")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["step-2"]


@pytest.mark.parametrize("damaged", ["adapter.bin", "checkpoint.json"])
def test_a_checkpoint_damaged_on_the_hub_is_replaced_by_the_previous_one(root, hub, lines, tmp_path, damaged):
    for step in (1, 2):
        with hub_checkpoints.background_uploads(REPO, 2, lines.append) as uploads:
            uploads.push_checkpoint(checkpoint(root, step))
    hub.repositories[REPO].history[-1].files[f"checkpoints/step-2/{damaged}"] = hub.store(b"not what it was")
    notes = list(hub_checkpoints.fetch_newer_checkpoint(REPO, tmp_path / "other", -1))
    assert len(notes) == 2 and notes[0].startswith("damaged on the Hub: ")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["step-1"]
    assert contents(tmp_path / "other" / "step-1") == contents(root / "step-1")
