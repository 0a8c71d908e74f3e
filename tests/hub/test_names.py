"""A name that exists, or that looks like a path, is a path; every other name is on the Hub."""

from pathlib import Path

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model, hub_name
from flamingo_ft.hub.names import (
    local_language,
    local_path,
    local_start,
    local_tower,
    local_weights,
    looks_like_path,
    missing_path_message,
    nearest_path,
)

PATHS = [
    *(
        "./x",
        "../x",
        ".",
        "..",
        ".hidden/x",
        "/abs",
        "/abs/x",
        "~",
        "~/x",
        "x/",
        "org/name/",
        "a/b/c",
        "runs\\quickstart",
    ),
    *("local-dir:eyes", "x.pt", "runs/x.pt", "mine/recipe.yaml", "a/model.safetensors", "X/Y.PT"),
]
NAMES = [
    *("gpt2", "nano", "org/name", "org/Llama-3.2-1B", "org/name@main", "org/name@refs/pr/1", "org/x.pt@v1"),
    *("some--body/run", "ViT-L-14", "laion2b_s34b_b79k"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with one run and one model of each kind."""
    for folder in ("runs/quickstart", "words", "eyes", "Runs.old"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "words" / "config.json").write_text("{}")
    (tmp_path / "eyes" / "open_clip_config.json").write_text("{}")
    (tmp_path / "checkpoint.pt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PATHS)
def test_a_name_written_like_a_path_is_a_path(here, name):
    assert looks_like_path(name) and local_path(name) is not None and hub_name(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_an_existing_first_component_is_not_a_path(here, name):
    assert not looks_like_path(name) and local_path(name) is None


def test_a_name_whose_first_component_is_a_folder_here_is_a_path(here):
    assert local_path("runs/quickstrt") == Path("runs/quickstrt") and hub_name("runs/quickstrt") is None
    assert local_path("runs/quickstart") == Path("runs/quickstart")
    assert hub_name("runs/quickstrt@main") is not None, "a name with a revision is on the Hub"
    assert hub_name("run/quickstart") is not None
    assert local_path("checkpoint.pt") == Path("checkpoint.pt") and hub_name("checkpoint.pt/x") is not None


def test_relative_paths_start_from_the_first_folder_that_has_them(here):
    other = here / "elsewhere"
    (other / "runs").mkdir(parents=True)
    assert local_path("words", [other, here]) == here / "words"
    assert local_path("runs/quickstart", [other, here]) == here / "runs" / "quickstart"
    assert local_path("runs/gone", [other, here]) == other / "runs" / "gone"
    assert local_path("./gone", [other, here]) == other / "gone"


def test_a_plain_name_is_a_local_backbone_only_if_that_folder_is_one(here):
    (here / "gpt2").mkdir()
    assert local_language("words", None) == Path("words") and local_language("gpt2", None) is None
    assert local_language("./gpt2", None) == Path("gpt2") and local_language("nano", None) is None
    assert local_language("words", "0" * 40) is None, "a commit is on the Hub in every directory"
    assert local_tower("eyes", None) == Path("eyes") and local_tower("local-dir:eyes", None) == Path("eyes")
    assert local_tower("eyes", "openai") is None and local_tower("hf-hub:org/eyes", None) is None
    assert local_weights("checkpoint.pt") == Path("checkpoint.pt") and local_weights("words") is None
    assert local_start("gone") == Path("gone") and local_start("org/gone") is None


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            "runs/quickstrt",
            "no folder runs/quickstrt; did you mean runs/quickstart? (on the Hub: runs/quickstrt@main)",
        ),
        ("./runs/quickstrt/", "no folder ./runs/quickstrt/; did you mean runs/quickstart?"),
        ("runs\\quickstart", "no folder runs\\quickstart; did you mean runs/quickstart?"),
        ("Run/quickstart/x/y", "no folder Run/quickstart/x/y; check the path"),
        ("rusn/QuickStart/", "no folder rusn/QuickStart/; did you mean runs/quickstart?"),
        ("chekpoint.pt", "no file chekpoint.pt; did you mean checkpoint.pt?"),
        ("checkpoint.pt/x/y", "no folder checkpoint.pt/x/y; check the path"),
        ("/no/such/folder", "no folder /no/such/folder; check the path"),
        ("*.pt", "no file *.pt; check the path"),
        ("", "no folder ''; check the path"),
    ],
)
def test_a_missing_path_is_refused_with_the_nearest_existing_one(here, hub, place, expected):
    assert missing_path_message(place) == expected
    with pytest.raises(UserError) as caught:
        fetch_model(place)
    assert str(caught.value) == expected and hub.requests == []


def test_absolute_and_home_paths_have_a_nearest_path_too(here, monkeypatch):
    assert nearest_path(here / "runs" / "quikstart") == here / "runs" / "quickstart"
    monkeypatch.setenv("HOME", str(here))
    assert nearest_path("~/wrods") == here / "words" and fetch_model("~/words") == here / "words"
