"""Samples of JSON files, and the one-line errors of malformed rows and files: file, row, field, reason."""

import json
import os

import pytest
from PIL import Image

from flamingo_ft.data import read_samples
from flamingo_ft.data.sample import UNNAMED_TASK
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, assistant, user

QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}
TURNS = [QUESTION, ANSWER]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def jsonl(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(folder, row):
    return read_samples(jsonl(folder, row))[0]


def refused(path, **options) -> str:
    """Return the one-line error of a file, without the folder's name."""
    with pytest.raises(UserError) as caught:
        read_samples(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message.replace(str(path), "FILE").replace(str(path.parent), "FOLDER")


def with_content(content, role="user"):
    return {"messages": [{"role": role, "content": content}, ANSWER]}


MALFORMED = {
    "a row of text": ("hello", ": expected an object with messages and images, got text"),
    "a row of null": (None, ": expected an object with messages and images, got null (no value)"),
    "a row of rows": ([{}], ": expected an object with messages and images, got a list"),
    "no messages": ({"images": []}, ": messages: missing; expected a list"),
    "messages null": ({"messages": None}, ": messages: expected a list, got null (no value)"),
    "messages text": ({"messages": "hi"}, ": messages: expected a list, got text"),
    "messages an object": ({"messages": QUESTION}, ": messages: expected a list, got an object"),
    "messages empty": ({"messages": []}, ": messages: no assistant message; add an answer to train on"),
    "no assistant turn": (
        {"messages": [QUESTION, QUESTION]},
        ": messages: no assistant message; add an answer to train on",
    ),
    "an assistant turn first": (
        {"messages": [ANSWER, *TURNS]},
        ": messages: the assistant speaks first; add the user message that it answers",
    ),
    "a message of text": (
        {"messages": ["hi", ANSWER]},
        ": messages[0]: expected an object with role and content, got text",
    ),
    "a message of null": (
        {"messages": [QUESTION, None]},
        ": messages[1]: expected an object with role and content, got null (no value)",
    ),
    "no role": (
        {"messages": [QUESTION, {"content": "x"}]},
        ": messages[1]: expected an object with role and content, got no role",
    ),
    "no content": (
        {"messages": [{"role": "user"}, ANSWER]},
        ": messages[0]: expected an object with role and content, got no content",
    ),
    "an unknown role": (
        {"messages": [{"role": "human", "content": "x"}, ANSWER]},
        ": messages[0].role: expected one of system, user, assistant, got 'human'",
    ),
    "a role of the wrong type": (
        {"messages": [{"role": ["user"], "content": "x"}, ANSWER]},
        ": messages[0].role: expected one of system, user, assistant, got ['user']",
    ),
    "content null": (
        with_content(None),
        ": messages[0].content: expected text or a list of typed blocks, got null (no value)",
    ),
    "content a number": (
        with_content(3),
        ": messages[0].content: expected text or a list of typed blocks, got a number",
    ),
    "content an object": (
        with_content({"type": "text", "text": "x"}),
        ": messages[0].content: expected text or a list of typed blocks, got an object",
    ),
    "half a character": (
        with_content("ab\ud83d"),
        ": messages[0].content: half a character (an unpaired surrogate) at position 2; remove it",
    ),
    "half a character in a block": (
        with_content([{"type": "text", "text": "\ude00"}]),
        ": messages[0].content[0]: text: half a character (an unpaired surrogate) at position 0; remove it",
    ),
    "a block of text": (
        with_content(["x"]),
        ": messages[0].content[0]: expected a block of type text, image or video, got text",
    ),
    "a block of null": (
        with_content([IMAGE, None]),
        ": messages[0].content[1]: expected a block of type text, image or video, got null (no value)",
    ),
    "a block of another type": (
        with_content([{"type": "audio"}]),
        ": messages[0].content[0].type: expected text, image or video, got 'audio'",
    ),
    "a block without type": (
        with_content([{"text": "x"}]),
        ": messages[0].content[0].type: expected text, image or video, got None",
    ),
    "a text block without text": (
        with_content([{"type": "text"}]),
        ": messages[0].content[0]: text: missing; expected text",
    ),
    "a text block of null": (
        with_content([{"type": "text", "text": None}]),
        ": messages[0].content[0]: text: expected text, got null (no value)",
    ),
    "images text": (
        {"messages": TURNS, "images": "a.png"},
        ": images: expected a list, got text; the path of one image belongs in the field image",
    ),
    "images an object": (
        {"messages": TURNS, "images": {"0": "a.png"}},
        ": images: expected a list, got an object",
    ),
    "image and images": (
        {"messages": TURNS, "image": "a.png", "images": ["a.png"]},
        ": expected image or images, got both; join them in images",
    ),
    "a task of the wrong type": (
        {"messages": TURNS, "task": ["colour"]},
        ": task: expected text, got a list",
    ),
    "an image of null": (
        {"messages": TURNS, "images": ["a.png", None]},
        ": images[1]: expected the path of an image, got null (no value)",
    ),
    "an image of bytes": (
        {"messages": TURNS, "images": [{"content": ""}]},
        ": images[0]: expected the path of an image, got an object",
    ),
    "a missing image": (
        {"messages": TURNS, "images": ["gone.png"]},
        ": images[0]: no such image FOLDER/gone.png; check the path or set image_root",
    ),
    "a folder for an image": (
        {"messages": TURNS, "images": ["."]},
        ": images[0]: no such image FOLDER; check the path or set image_root",
    ),
    "a path with a line break": (
        {"messages": TURNS, "images": ["a\nb.png"]},
        r": images[0]: no such image FOLDER/a\nb.png; check the path or set image_root",
    ),
    "a path with a null byte": (
        {"messages": TURNS, "images": ["a\0.png"]},
        ": images[0]: no such image FOLDER/a\0.png; check the path or set image_root",
    ),
    "more markers than images": (
        {**with_content("<image> or <image>?"), "images": ["a.png"]},
        ": got 2 <image> markers but 1 image; add the missing images or remove markers",
    ),
    "fewer markers than images": (
        {**with_content([IMAGE]), "images": ["a.png", "b.png"]},
        ": got 1 <image> markers but 2 images; add the missing images or remove markers",
    ),
    "a marker without images": (
        with_content("<image>"),
        ": got 1 <image> markers but 0 images; add the missing images or remove markers",
    ),
    "a marker and images null": (
        {**with_content("<image>"), "images": None},
        ": got 1 <image> markers but 0 images; add the missing images or remove markers",
    ),
}


@pytest.mark.parametrize(("row", "complaint"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_refused_in_one_line(folder, row, complaint):
    path = jsonl(folder, {"messages": TURNS}, row)
    assert refused(path) == f"FILE: row 1{complaint}"
    whole = folder / "data.json"
    whole.write_text(json.dumps([{"messages": TURNS}, row]))
    assert refused(whole) == f"FILE: row 1{complaint}"


def test_a_long_text_in_place_of_a_path_is_refused_in_a_short_line(folder):
    message = refused(jsonl(folder, {"messages": TURNS, "images": ["A" * 10_000]}))
    assert "row 0: images[0]: no such image FOLDER/AAA" in message and len(message) < 500


LIST_EXPECTED = "expected a list of rows (one object a line belongs in a .jsonl file)"
BROKEN_FILES = {
    "empty": ("x.jsonl", b"", "FILE: no rows; provide at least one sample"),
    "blank lines alone": ("x.jsonl", b"\n \n", "FILE: no rows; provide at least one sample"),
    "an empty list": ("x.json", b"[]", "FILE: no rows; provide at least one sample"),
    "an empty JSON file": (
        "x.json",
        b"",
        f"FILE: not JSON (Expecting value at character 0); {LIST_EXPECTED}",
    ),
    "an object": ("x.json", b"{}", "FILE: expected a list of rows, got an object"),
    "lines in a JSON file": (
        "x.json",
        b"{}\n{}",
        f"FILE: not JSON (Extra data at character 3); {LIST_EXPECTED}",
    ),
    "no JSON": (
        "x.jsonl",
        b"messages",
        "FILE: row 0: not JSON (Expecting value at character 0); expected one object a line",
    ),
    "cut off": (
        "x.jsonl",
        json.dumps({"messages": TURNS}).encode() + b'\n{"messages": [',
        "FILE: row 1: not JSON (Expecting value at character 14); expected one object a line",
    ),
    "Latin-1": (
        "x.jsonl",
        b'{"messages": "\xe9"}',
        "FILE: row 0: byte 14 is not UTF-8; save the file as UTF-8",
    ),
    "Latin-1 in JSON": (
        "x.json",
        b'[{"messages": "\xe9"}]',
        "FILE: byte 15 is not UTF-8; save the file as UTF-8",
    ),
    "UTF-16": ("x.jsonl", "{}".encode("utf-16"), "FILE: expected UTF-8, got UTF-16; save the file as UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name) == complaint


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    for name in ("gone.jsonl", "*.jsonl"):
        assert "FILE: no such data file; check the path" in refused(tmp_path / name)
    assert "FILE: cannot be read" in refused(tmp_path)


def test_each_marker_in_a_text_is_an_image(folder):
    messages = [{"role": "user", "content": "<image>One.<image><image> Three?"}, ANSWER]
    sample = read_one(folder, {"messages": messages, "images": ["a.png", "b.png", "a.png"]})
    assert sample.messages == [user(IMAGE, "One.", IMAGE, IMAGE, " Three?"), assistant("That.")]
    assert [os.path.basename(path) for path in sample.images] == ["a.png", "b.png", "a.png"]


def test_typed_blocks_are_unchanged(folder):
    turns = [user("First ", IMAGE, " second ", IMAGE), assistant("Yes."), user("Sure?"), assistant("Yes.")]
    assert read_one(folder, {"messages": turns, "images": ["a.png", "b.png"]}).messages == turns


def test_images_without_a_marker_come_first_in_the_first_user_message(folder):
    messages = [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]
    sample = read_one(folder, {"messages": messages, "images": ["a.png", "b.png"]})
    assert sample.messages[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert sample.messages[1] == user(IMAGE, IMAGE, "What?")
    assert sample.messages[3] == user("What?")


def test_images_and_task_are_optional(folder):
    for more in ({}, {"images": None, "task": None}, {"images": [], "task": ""}):
        sample = read_one(folder, {"messages": TURNS, **more})
        assert (sample.images, sample.task) == ([], UNNAMED_TASK)
    assert read_one(folder, {"messages": TURNS, "task": "colour"}).task == "colour"


def test_image_paths_are_relative_to_the_image_root_or_the_file(folder):
    row = {"messages": TURNS, "images": ["a.png"]}
    (folder / "lists").mkdir()
    path = jsonl(folder / "lists", row)
    assert "no such image" in refused(path)
    outside = jsonl(folder / "lists", {**row, "images": [str(folder / "a.png")]}, name="outside.jsonl")
    assert "outside of FOLDER" in refused(outside)
    assert read_samples(path, folder)[0].images == [str(folder / "a.png")]
    absolute = jsonl(folder / "lists", {**row, "images": [str(folder / "a.png")]})
    assert read_samples(absolute, folder)[0].images == [str(folder / "a.png")]


def without_where(samples):
    return [(sample.messages, sample.images, sample.task) for sample in samples]


def test_json_and_jsonl_are_read_the_same(folder):
    rows = [
        {"messages": TURNS, "images": ["a.png"], "task": "é 世 🦩 \u2028 \"'\n"},
        {"messages": [{"role": "user", "content": "a <image> b"}, ANSWER], "images": ["b.png"]},
        {"messages": [*TURNS, *TURNS]},
    ]
    by_line = read_samples(jsonl(folder, *rows))
    compact = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, text, encoding in [
        ("x.json", json.dumps(rows, indent=2), "utf-8"),
        ("x.JSON", json.dumps(rows), "utf-8"),
        ("x.jsonl", compact, "utf-8"),
        ("windows.jsonl", compact.replace("\n", "\r\n"), "utf-8-sig"),
        ("windows.json", json.dumps(rows), "utf-8-sig"),
    ]:
        (folder / name).write_bytes(text.encode(encoding))
        samples = read_samples(folder / name)
        assert without_where(samples) == without_where(by_line)
        assert [sample.where for sample in samples] == [f"{folder / name}: row {i}" for i in range(3)]
