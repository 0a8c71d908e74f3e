"""What is told to everybody names no place on this machine, and nothing else is changed."""

import json

import pytest

from flamingo_ft.hub.places import without_places
from flamingo_ft.publish.files import belongs, files_of


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/words", "words"),
        ("~/words/", "words"),
        ("local-dir:/home/me/eyes", "local-dir:eyes"),
        ({"a": [{"path": "/data/x.jsonl"}, 3]}, {"a": [{"path": "x.jsonl"}, 3]}),
        *((same, same) for same in ("org/name", "runs/a", "/", "~", "//", "a /b", "hf-hub:org/name", "/x\ny", None, 1.5)),
    ],
)
def test_of_a_place_its_last_part_stays(value, shown):
    assert without_places(value) == shown


def test_a_tokenizers_words_stay_and_its_places_do_not(tmp_path):
    words = {"eos_token": "/end", "extra_special_tokens": ["/a/b"], "name_or_path": "/home/me/words"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    shown = json.loads(files_of(tmp_path)["tokenizer_config.json"])
    assert shown == words | {"name_or_path": "words"}


@pytest.mark.parametrize(
    ("path", "is_pushed"),
    [
        *((one, True) for one in ("config.json", "model-00001-of-00002.safetensors", "figures/loss.png", "merges.txt")),
        *((one, False) for one in ("checkpoints/step-1/config.json", ".cache/x.json", "figures/answers.png", "report.html")),
        *((one, False) for one in (".env", "tensorboard/events.json", "notes.txt", "left_out.jsonl")),
    ],
)
def test_which_files_belong(path, is_pushed):
    assert belongs(path) == is_pushed
