"""What is published holds no local path, and text is never changed."""

import json

import pytest

from flamingo_ft.hub.names import strip_local_path, strip_local_paths
from flamingo_ft.publish.push import is_published, publishable_files


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/words", "words"),
        ("~/words/", "words"),
        ("local-dir:/home/me/eyes", "local-dir:eyes"),
        (["/data/x.jsonl", 3], ["x.jsonl", 3]),
        *(
            (same, same)
            for same in ("org/name", "runs/a", "/", "~", "//", "a /b", "hf-hub:org/name", "/x\ny", None, 1.5)
        ),
    ],
)
def test_the_last_component_of_a_local_path_stays(value, shown):
    assert strip_local_path(value) == shown


def test_only_the_values_of_known_keys_are_stripped():
    text = {
        "chat_template": "/no_think {{ x }}",
        "task": "/a/b",
        "nested": [{"answer": "/yes"}],
        "name": "/n",
    }
    paths = {"_name_or_path": "/home/me/words", "a_file": "/home/me/a", "nested": {"path": "/home/me/b"}}
    shown = {"_name_or_path": "words", "a_file": "a", "nested": {"path": "b"}}
    assert strip_local_paths(text) == text
    assert strip_local_paths(paths) == shown
    assert strip_local_paths({"adapter": "/home/me/run"}, ["adapter"]) == {"adapter": "run"}
    backbone = {"name": "/home/me/eyes", "pretrained": "/home/me/eyes.pt", "revision": None}
    assert strip_local_paths({"backbones": {"vision": backbone}}) == {
        "backbones": {"vision": {"name": "eyes", "pretrained": "eyes.pt", "revision": None}}
    }


def test_a_tokenizers_vocabulary_stays_and_its_paths_are_stripped(tmp_path):
    words = {"eos_token": "/end", "extra_special_tokens": ["/a/b"], "name_or_path": "/home/me/words"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    shown = json.loads(publishable_files(tmp_path)["tokenizer_config.json"])
    assert shown == words | {"name_or_path": "words"}


def test_a_processors_template_keeps_a_slash_at_its_beginning(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "/no_think {{ messages }}"}))
    assert json.loads(publishable_files(tmp_path)["processor_config.json"]) == {
        "chat_template": "/no_think {{ messages }}"
    }


def test_a_prediction_with_a_line_separator_in_its_text_stays_one_row(tmp_path):
    row = {
        "where": "/home/me/x.jsonl: row 0",
        "images": ["/home/me/0.png"],
        "question": "a\u2028b\x85c",
        "answer": "/d",
    }
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = json.loads(publishable_files(tmp_path)["predictions.jsonl"])
    assert shown == row | {"where": "x.jsonl: row 0", "images": ["0.png"]}


@pytest.mark.parametrize(
    ("path", "is_pushed"),
    [
        *(
            (one, True)
            for one in ("config.json", "model-00001-of-00002.safetensors", "figures/loss.png", "merges.txt")
        ),
        *(
            (one, False)
            for one in (
                "checkpoints/step-1/config.json",
                ".cache/x.json",
                "figures/answers.png",
                "report.html",
            )
        ),
        *((one, False) for one in (".env", "tensorboard/events.json", "notes.txt", "left_out.jsonl")),
    ],
)
def test_only_files_of_a_model_or_run_are_published(path, is_pushed):
    assert is_published(path) == is_pushed
