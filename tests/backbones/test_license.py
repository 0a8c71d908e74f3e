"""The licence of a backbone is what its card states, and no error where it states none."""

from __future__ import annotations

import pytest

from flamingo_ft.backbones.language import SMALL_FILES, load_language
from flamingo_ft.backbones.license import CARD, license_in, license_on_hub
from flamingo_ft.backbones.vision import load_vision
from tests.hub_server import Repository


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [a]\n---\n", None),
        ("# No metadata", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\n- a list\n---\n", None),
        (None, None),
    ],
)
def test_a_card_states_a_licence_or_none(tmp_path, card, license):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_in(tmp_path) == license


def test_the_nano_backbones_have_the_packages_licence():
    assert load_vision("nano").license == load_language("nano").license == "apache-2.0"


def test_a_repository_that_is_out_of_reach_states_none(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert license_on_hub("nobody/nothing", None) is None


def test_a_repositorys_card_is_fetched_for_it(hub):
    repository = hub.repositories.setdefault("org/tower", Repository(private=False))
    oid = hub.store(b"---\nlicense: other\nlicense_name: openrail\n---\n")
    lines = [
        {"key": "header", "value": {"summary": "put"}},
        {"key": "lfsFile", "value": {"path": "README.md", "oid": oid}},
    ]
    repository.branches.setdefault("main", [])
    hub.commit(repository, "main", lines)
    assert license_on_hub("org/tower", None) == "openrail"
    assert CARD in SMALL_FILES, "a language model's comes with its other small files"
