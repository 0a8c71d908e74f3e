"""Downloads: what a model needs, no more, and only once."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from flamingo_ft.cli import main
from flamingo_ft.errors import UserError
from flamingo_ft.hub import HubName, fetch_model, hub_name, pinned_name
from flamingo_ft.hub.errors import ATTEMPTS
from tests.hub_server import READER, WRITER, Repository

REPO = "org/some.model-1"


def put(hub, files: dict[str, bytes], branch: str = "main", **options) -> str:
    """Commit files to a branch. Return the commit."""
    repository = hub.repositories.setdefault(REPO, Repository(**{"private": False, **options}))
    repository.branches.setdefault(branch, [*repository.history])
    digests = {path: hub.store(content) for path, content in files.items()}
    lines = [{"key": "lfsFile", "value": {"path": path, "oid": oid}} for path, oid in digests.items()]
    return hub.commit(repository, branch, [{"key": "header", "value": {"summary": "put"}}, *lines]).oid


def refusal(place: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch_model(place)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and READER not in message and WRITER not in message
    return message


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1", HubName("org/name", "v1")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        (Path("org/name@main"), HubName("org/name", "main")),
        *(
            (path, None)
            for path in (
                "name",
                "./org/name",
                "/org/name",
                "../name",
                "~/name",
                "a/b/c",
                "org/name@",
                "o n/e",
            )
        ),
    ],
)
def test_a_name_on_the_hub_is_recognized(place, expected):
    assert hub_name(place) == expected
    assert expected is None or hub_name(str(expected)) == expected


def test_an_existing_path_is_returned_as_it_is(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (REPO, f"{REPO}@main"):
        Path(place).mkdir(parents=True)
        assert fetch_model(place) == Path(place) and pinned_name(place, Path(place)) == str(tmp_path / place)
    assert refusal("/not/there/at/all") == "no folder /not/there/at/all; check the path"
    assert hub.requests == []


def test_only_what_a_model_needs_is_fetched(hub):
    needed = {"config.json": b"{}", "adapter_model.safetensors": b"a" * 2000, "chat_template.jinja": b"c"}
    needed |= {"resolved_recipe.yaml": b"r", "tokenizer.json": b"t"}
    others = [
        "checkpoints/step-1/adapter_model.safetensors",
        "tensorboard/events",
        "figures/loss.png",
        "report.html",
    ]
    others += ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "log.jsonl", "README.md"]
    put(hub, needed | {path: path.encode() for path in others})
    folder = fetch_model(REPO)
    assert files_in(folder) == {*needed}
    assert all((folder / name).read_bytes() == content for name, content in needed.items())


def test_other_weight_formats_are_downloaded_if_there_are_no_safetensors(hub):
    put(hub, {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"b" * 2000, "final.pt": b"p"})
    assert files_in(fetch_model(REPO)) == {"config.json", "pytorch_model-00001-of-00001.bin"}


def test_a_repository_with_one_checkpoint_gives_that_file(hub):
    put(hub, {"checkpoint.pt": b"p" * 2000, "README.md": b"r"})
    path = fetch_model(REPO)
    assert path.name == "checkpoint.pt" and path.read_bytes() == b"p" * 2000


def test_a_composition_without_weights_is_a_folder(hub):
    put(hub, {"config.json": b"{}", "tokenizer.json": b"t"})
    assert files_in(fetch_model(REPO)) == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    "files", [{}, {"README.md": b"r"}, {"a.pt": b"a", "b.pt": b"b"}, {"weights.safetensors": b"w"}]
)
def test_a_repository_without_a_model_is_refused(hub, files):
    put(hub, files)
    assert f"{REPO}: holds no model (got " in refusal(REPO)


def test_revisions_are_distinguished_and_a_pinned_name_does_not_move(hub):
    put(hub, {"config.json": b"1", "model.safetensors": b"w" * 2000})
    put(hub, {"config.json": b"2"}, branch="next")
    first, second = fetch_model(REPO), fetch_model(f"{REPO}@next")
    assert [(folder / "config.json").read_bytes() for folder in (first, second)] == [b"1", b"2"]
    name = pinned_name(REPO, first)
    assert name == f"{REPO}@{hub.repositories[REPO].history[-1].oid}"
    put(hub, {"config.json": b"3"})
    assert (fetch_model(name) / "config.json").read_bytes() == b"1"
    assert (fetch_model(REPO) / "config.json").read_bytes() == b"3"


def test_cached_files_are_not_downloaded_again(hub):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000})
    first = fetch_model(REPO)
    hub.requests.clear()
    assert fetch_model(REPO) == first
    assert [request for request in hub.requests if "/api/" not in request] == []
    hub.requests.clear()
    assert fetch_model(pinned_name(REPO, first)) == first and hub.requests == []


def test_only_changed_files_of_a_new_commit_are_downloaded(hub):
    put(hub, {"config.json": b"1", "model.safetensors": b"w" * 2000})
    fetch_model(REPO)
    put(hub, {"config.json": b"2"})
    hub.requests.clear()
    assert (fetch_model(REPO) / "config.json").read_bytes() == b"2"
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert len(fetched) == 1 and fetched[0].endswith("config.json")


def test_without_a_network_the_cache_is_used(hub, monkeypatch):
    put(hub, {"config.json": b"{}", "checkpoint.pt": b"p" * 2000})
    path = fetch_model(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch_model(REPO) == path and hub.requests == []


def test_offline_a_model_that_is_not_cached_is_refused(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(REPO)
    assert (
        message.startswith(f"{REPO}: HF_HUB_OFFLINE is set, and the cache is incomplete")
        and hub.requests == []
    )


def test_offline_a_model_that_is_partly_cached_is_refused(hub, monkeypatch):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000})
    (fetch_model(REPO) / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the cache is incomplete" in refusal(REPO)


@pytest.mark.parametrize(
    ("options", "token", "expected"),
    [
        (
            {"private": True},
            None,
            "neither a local folder nor a visible Hub repository (it may be private); check the name, "
            "or log in",
        ),
        ({"private": True}, "hf_unknown", "no valid token; log in with `hf auth login`"),
        ({"gated": True}, READER, "is gated; accept its terms on its page of the Hub"),
        ({"gated": True}, None, "is gated; accept its terms on its page of the Hub"),
    ],
)
def test_a_closed_repository_is_refused(hub, monkeypatch, options, token, expected):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000}, **options)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refusal(REPO)
    assert message.startswith(f"{REPO}: {expected}") and "hf_unknown" not in message


def test_a_closed_repository_is_downloaded_with_a_token(hub, monkeypatch):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000}, private=True, gated=True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert files_in(fetch_model(REPO)) == {"config.json", "model.safetensors"}


def test_a_missing_repository_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/quickstrat: neither a local folder nor a visible Hub repository" in refusal(
        "runs/quickstrat"
    )
    put(hub, {"config.json": b"{}"})
    assert f"{REPO}@nothing: is not on the Hub, though the repository is; check the revision" in refusal(
        f"{REPO}@nothing"
    )
    assert "some--body/run: not the name of a repository (" in refusal("some--body/run")


@pytest.mark.parametrize("request_", [f"GET /api/models/{REPO}/revision", "GET .*/resolve/.*/config.json"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (403, "the token may not read there"),
        (429, "the Hub limits the rate of requests from here (429)"),
        (500, "the Hub is in trouble (500)"),
        (None, "the connection to the Hub broke off ("),
    ],
)
def test_transient_errors_are_retried_and_others_reported(hub, request_, status, expected):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000})
    hub.fail(request_, times=1000, status=status)
    assert expected in refusal(REPO)
    hub.failures.clear()
    hub.fail(request_, times=1 if status == 403 else ATTEMPTS - 1, status=status)
    if status == 403:
        refusal(REPO)
    assert files_in(fetch_model(REPO)) == {"config.json", "model.safetensors"}


def test_an_unreachable_hub_is_reported(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached (" in refusal(REPO)


def test_training_without_the_hub_says_how_to_try_the_recipe(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    options = [f"model.init_from={REPO}", f"train.output_dir={tmp_path / 'run'}"]
    assert main(["train", "lora_only", *options]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert REPO in error and error.endswith("check the network; to try the recipe without one, add --smoke")


def test_an_interrupted_download_resumes(hub):
    content = bytes(range(256)) * 40
    put(hub, {"config.json": b"{}", "model.safetensors": content})
    hub.fail("GET .*/resolve/.*safetensors", half_way=True)
    assert (fetch_model(REPO) / "model.safetensors").read_bytes() == content


def test_a_deleted_cache_is_filled_again(hub, tmp_path):
    put(hub, {"config.json": b"{}", "model.safetensors": b"w" * 2000})
    fetch_model(REPO)
    shutil.rmtree(tmp_path / "hub_cache")
    assert files_in(fetch_model(REPO)) == {"config.json", "model.safetensors"}


def test_a_format_that_a_repository_lacks_and_files_in_the_cache_print_nothing(hub, caplog, capfd):
    put(hub, {"checkpoint.pt": b"w" * 2000})
    for _ in range(2):
        assert fetch_model(REPO).name == "checkpoint.pt"
    assert caplog.text == "" and capfd.readouterr() == ("", "")


def test_a_download_that_takes_a_while_has_a_progress_bar(hub, capfd, monkeypatch):
    monkeypatch.setattr("flamingo_ft.hub.fetch.BAR_DELAY_S", 0.0)
    put(hub, {"checkpoint.pt": b"w" * 2000})
    fetch_model(REPO)
    assert "Fetching 1 files: 100%" in capfd.readouterr().err
