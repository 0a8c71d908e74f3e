"""Mistakes in data, and the one-line error of each: file, row, field, what was expected, what was found."""

import csv
import json
import math
import os
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_medium, open_source, read_samples
from flamingo_ft.errors import UserError

from .fixtures import FACTS, SCANS, add_files

SCAN = (SCANS / FACTS[0][0]).read_bytes()
ASK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
HUMAN = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
MARKERS = "add the missing images or remove markers"
EMPTY = "empty; write text or remove the row"
EMPTY_TURN = "empty; write text or an image, or remove the turn"


def text_or_messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def vqa(**fields) -> dict:
    return {"question": "What?", "answer": "That.", **fields}


# The first row of a file, by its schema.
GOOD = {
    "messages": {"messages": ASK},
    "llava": {"conversations": HUMAN},
    "sharegpt": {"conversations": HUMAN, "images": []},
    "alpaca": {"instruction": "What?", "output": "That."},
    "prompt_completion": {"prompt": "What?", "completion": "That."},
    "vqa": vqa(),
    "caption": {"image": "a.png", "caption": "A digit."},
    "mmc4": {"text_list": ["A."], "image_info": []},
    "obelics": {"texts": ["A."], "images": [None]},
    "cauldron": {"texts": [{"user": "What?", "assistant": "That."}], "images": []},
    "preference": {"prompt": "What?", "chosen": "This.", "rejected": "That."},
    "unpaired_preference": {"prompt": "What?", "completion": "This.", "label": True},
}
# Mistake -> schema of the first row, the second row, and the error that it raises.
BAD_ROWS = {
    "empty user turn": (
        "messages",
        text_or_messages(("user", ""), ("assistant", "A")),
        f"messages[0].content: {EMPTY_TURN}",
    ),
    "blank answer": (
        "messages",
        text_or_messages(("user", "Q"), ("assistant", " \n")),
        f"messages[1].content: {EMPTY_TURN}",
    ),
    "no blocks": (
        "messages",
        text_or_messages(("user", []), ("assistant", "A")),
        f"messages[0].content: {EMPTY_TURN}",
    ),
    "content NaN": (
        "messages",
        text_or_messages(("user", math.nan), ("assistant", "A")),
        "messages[0].content: expected text or a list of typed blocks, got NaN (an empty cell)",
    ),
    "late system": (
        "messages",
        text_or_messages(("user", "Q"), ("system", "S"), ("assistant", "A")),
        "messages[1].content: a system message must come first; move or join it",
    ),
    "two users": (
        "messages",
        text_or_messages(("user", "Q"), ("user", "Q"), ("assistant", "A")),
        "messages[1].content: expected user and assistant in turn, got user after user; join them",
    ),
    "two answers": (
        "messages",
        text_or_messages(("user", "Q"), ("assistant", "A"), ("assistant", "A")),
        "messages[2].content: expected user and assistant in turn, got assistant after assistant; join them",
    ),
    "system then answer": (
        "messages",
        text_or_messages(("system", "S"), ("assistant", "A")),
        "messages: the assistant speaks first; add the user message that it answers",
    ),
    "loss of text": (
        "messages",
        {"messages": [ASK[0], {**ASK[1], "loss": "no"}]},
        "messages[1].loss: expected true (train on it) or false, got 'no'; use one of them",
    ),
    "more images": (
        "messages",
        {**text_or_messages(("user", "<image>?"), ("assistant", "A")), "images": ["a.png"] * 2},
        f"got 1 <image> markers but 2 images; {MARKERS}",
    ),
    "more markers": (
        "messages",
        {**text_or_messages(("user", "<image><image>?"), ("assistant", "A")), "images": ["a.png"]},
        f"got 2 <image> markers but 1 image; {MARKERS}",
    ),
    "more videos": (
        "messages",
        {**text_or_messages(("user", "<video>?"), ("assistant", "A")), "videos": [["a.png"]] * 2},
        "got 1 <video> markers but 2 videos; add the missing videos or remove markers",
    ),
    "no frames": (
        "messages",
        {**text_or_messages(("user", "?"), ("assistant", "A")), "videos": [[]]},
        "videos[0]: expected at least one frame, got an empty list",
    ),
    "missing frame": (
        "messages",
        {**text_or_messages(("user", "?"), ("assistant", "A")), "video": ["a.png", "b.png"]},
        "video[1]: no such image FOLDER/b.png; check the path or set image_root",
    ),
    "image URL without URL": (
        "messages",
        text_or_messages(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "A")),
        "messages[0].content[0].image_url: expected the path of an image, got null (no value)",
    ),
    "half a data URI": (
        "messages",
        text_or_messages(
            ("user", [{"type": "image_url", "image_url": "data:image/png;base64,iVBOR"}]), ("assistant", "A")
        ),
        "messages[0].content[0].image_url: not base64 (Invalid base64-encoded string: number of data "
        "characters (5) cannot be 1 more than a multiple of 4); expected an image file in base64",
    ),
    "empty data URI": (
        "messages",
        text_or_messages(
            ("user", [{"type": "image", "image": "data:image/png;base64,"}]), ("assistant", "A")
        ),
        "messages[0].content[0].image: expected an image, got an empty file",
    ),
    "path upwards": (
        "messages",
        {"messages": ASK, "images": ["../b.png"]},
        "images[0]: outside of FOLDER, got FOLDER/../b.png; set image_root to a folder around all images",
    ),
    "path from the root": (
        "messages",
        {"messages": ASK, "images": ["/etc/hostname"]},
        "images[0]: outside of FOLDER, got /etc/hostname; set image_root to a folder around all images",
    ),
    "link outside": (
        "messages",
        {"messages": ASK, "images": ["link.png"]},
        "images[0]: outside of FOLDER, got FOLDER/link.png, a link to PARENT/b.png; set image_root to a "
        "folder around all images",
    ),
    "URL": (
        "messages",
        {"messages": ASK, "images": ["https://example.org/a.png"]},
        "images[0]: URLs are not fetched, got https://example.org/a.png; "
        "set data.allow_urls to true to allow it",
    ),
    "file URL": (
        "messages",
        {"messages": ASK, "images": ["file:///etc/hostname"]},
        "images[0]: expected a path inside image_root or an http(s) URL, got a URL of file:",
    ),
    "ftp URL": (
        "messages",
        {"messages": ASK, "images": ["FTP://example.org/a.png"]},
        "images[0]: expected a path inside image_root or an http(s) URL, got a URL of ftp:",
    ),
    "number as image": (
        "messages",
        {"messages": ASK, "images": [7]},
        "images[0]: expected the path of an image, got a number",
    ),
    "unknown speaker": (
        "llava",
        {"conversations": [{"from": "bard", "value": "Q"}, HUMAN[1]]},
        "conversations[0].from: expected human, gpt or system, got 'bard'",
    ),
    "no value": (
        "llava",
        {"conversations": [{"from": "human"}, HUMAN[1]]},
        "conversations[0]: expected an object with from and value, got no value",
    ),
    "answer first": (
        "llava",
        {"conversations": HUMAN[::-1]},
        "conversations: the assistant speaks first; add the user message that it answers",
    ),
    "conversations null": (
        "llava",
        {"conversations": None},
        "conversations: expected a list, got null (no value)",
    ),
    "no conversation": (
        "llava",
        {"conversations": []},
        "conversations: no assistant message; add an answer to train on",
    ),
    "marker without image": (
        "llava",
        {"conversations": [{"from": "human", "value": "<image>\nQ"}, HUMAN[1]]},
        f"got 1 <image> markers but 0 images; {MARKERS}",
    ),
    "system a number": (
        "sharegpt",
        {"conversations": HUMAN, "system": 3},
        "system: expected text, got a number",
    ),
    "a turn of text": (
        "sharegpt",
        {"conversations": ["hi"]},
        "conversations[0]: expected an object with from and value, got text",
    ),
    "instruction null": (
        "alpaca",
        {"instruction": None, "output": "A"},
        "instruction: expected text, got null (no value)",
    ),
    "output empty": ("alpaca", {"instruction": "Q", "output": ""}, f"output: {EMPTY}"),
    "no output": ("alpaca", {"instruction": "Q"}, "output: missing; expected text"),
    "input a list": (
        "alpaca",
        {"instruction": "Q", "input": [], "output": "A"},
        "input: expected text, got a list",
    ),
    "completion null": (
        "prompt_completion",
        {"prompt": "Q", "completion": None},
        "completion: expected text, got null (no value)",
    ),
    "completion of a user": (
        "prompt_completion",
        {"prompt": "Q", "completion": [{"role": "user", "content": "A"}]},
        "prompt: no assistant message; add an answer to train on",
    ),
    "question NaN": ("vqa", vqa(question=math.nan), "question: expected text, got NaN (an empty cell)"),
    "question a list": ("vqa", vqa(question=["Q"]), "question: expected text, got a list"),
    "answer true": ("vqa", vqa(answer=True), "answer: expected text, got true or false"),
    "answer null": ("vqa", vqa(answer=None), "answer: expected text, got null (no value)"),
    "no answers": (
        "vqa",
        {"question": "Q", "answers": []},
        "answers: expected at least one answer, got an empty list",
    ),
    "an answer null": (
        "vqa",
        {"question": "Q", "answers": ["A", None]},
        "answers[1]: expected text, got null (no value)",
    ),
    "an answer object without answer": (
        "vqa",
        {"question": "Q", "answers": [{"confidence": "yes"}]},
        "answers[0]: answer: missing; expected text",
    ),
    "half a character": (
        "vqa",
        vqa(question="ab\ud83d"),
        "question: half a character (an unpaired surrogate) at position 2; remove it",
    ),
    "caption without image": (
        "caption",
        {"image": None, "caption": "A"},
        "no image; give one in image, images or video",
    ),
    "image without caption": (
        "caption",
        {"image": "a.png", "caption": None},
        "no caption; give text in caption, text, captions, label",
    ),
    "caption empty": ("caption", {"image": "a.png", "caption": "  "}, f"caption: {EMPTY}"),
    "captions empty": (
        "caption",
        {"image": "a.png", "captions": []},
        "captions: expected at least one caption, got an empty list",
    ),
    "text of no text": ("mmc4", {"text_list": [None]}, "text_list[0]: expected text, got null (no value)"),
    "no text": ("mmc4", {"text_list": []}, "the document has no text; remove the row"),
    "match beyond": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"matched_text_index": 1, "image_name": "a.png"}]},
        "image_info[0].matched_text_index: expected the index of one of 1 texts, from 0, got 1",
    ),
    "no match": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"image_name": "a.png"}]},
        "image_info[0].matched_text_index: expected the index of one of 1 texts, from 0, got null (no value)",
    ),
    "no picture": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"matched_text_index": 0}]},
        "image_info[0]: no image; give image_base64, image_name or raw_url",
    ),
    "picture at a URL": (
        "mmc4",
        {
            "text_list": ["A."],
            "image_info": [{"matched_text_index": 0, "raw_url": "http://example.org/a.png"}],
        },
        "image_info[0].raw_url: URLs are not fetched, got http://example.org/a.png; "
        "set data.allow_urls to true to allow it",
    ),
    "no pairs": (
        "cauldron",
        {"texts": [], "images": []},
        "texts: expected at least one pair of user and assistant, got an empty list",
    ),
    "a pair that is text": (
        "cauldron",
        {"texts": ["What?"], "images": []},
        "texts[0]: expected an object with user and assistant, got text",
    ),
    "a pair without an answer": (
        "cauldron",
        {"texts": [{"user": "What?"}], "images": []},
        "texts[0]: assistant: missing; expected text",
    ),
    "lists of two lengths": (
        "obelics",
        {"texts": ["A.", "B."], "images": [None]},
        "expected texts and images as lists of equal length, exactly one of the two non-null at each index, "
        "got 2 texts and 1 images",
    ),
    "text and image": (
        "obelics",
        {"texts": ["A."], "images": ["a.png"]},
        "texts[0]: expected null in one of texts and images, got both a text and an image",
    ),
    "neither": (
        "obelics",
        {"texts": ["A.", None], "images": [None, None]},
        "texts[1]: expected null in one of texts and images, got neither text nor image",
    ),
    "no rejected": (
        "preference",
        {"prompt": "Q", "chosen": "A"},
        "rejected: missing; expected text",
    ),
    "the same twice": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        "rejected: the same as chosen; remove the row",
    ),
    "no prompt": (
        "preference",
        {"chosen": "A", "rejected": "B"},
        "prompt: missing; give the text or messages that chosen and rejected answer",
    ),
    "rejected nothing": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": []},
        "rejected: no assistant message; add an answer to train on",
    ),
    "no label": (
        "unpaired_preference",
        {"prompt": "Q", "completion": "A"},
        "label: missing; expected true or false",
    ),
    "a label between good and bad": (
        "unpaired_preference",
        {"prompt": "Q", "completion": "A", "label": 0.5},
        "label: expected true or false, got a number",
    ),
    "image in rejected": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": "<image>"},
        "rejected: the rejected answer has an image; move it to the prompt",
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with an image, and a link to an image outside of it."""
    inside = tmp_path / "data"
    inside.mkdir()
    for path in (inside / "a.png", tmp_path / "b.png"):
        path.write_bytes(SCAN)
    os.symlink(tmp_path / "b.png", inside / "link.png")
    return inside


def error_of(entry: dict, folder) -> str:
    """Return the one-line error of a source, raised when it is opened or a row or image of it is read."""
    source = DataSource(**entry)
    with pytest.raises(UserError) as caught:
        opened = open_source(source, DataSection(train=(source,)))
        for index, raw in enumerate(opened.stream()):
            sample = opened.sample(index, raw)
            [open_medium(medium, sample.where) for medium in sample.images]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    return message.replace(str(folder), "FOLDER").replace(str(folder.parent), "PARENT")


def write(folder, name: str, content: str | bytes) -> dict:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return {"path": str(folder / name)}


def test_at_least_ninety_mistakes_are_covered():
    assert len(BAD_ROWS) + len(BAD_FILES) + len(BAD_ENTRIES) >= 90


@pytest.mark.parametrize(("good", "row", "complaint"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_raises_a_one_line_error(folder, good, row, complaint):
    entry = write(folder, "x.jsonl", f"{json.dumps(GOOD[good])}\n{json.dumps(row)}\n")
    assert error_of(entry, folder) == f"FOLDER/x.jsonl: row 1: {complaint}"


SEPARATED = "put text with commas in quotes"
BAD_FILES = {
    "ragged, short": (
        "x.csv",
        "question,answer\nQ,A\nQ\n",
        f"row 1: expected 2 cells (question, answer), got 1; {SEPARATED}",
    ),
    "ragged, long": (
        "x.csv",
        "question,answer\nQ,A\nQ,A,A\n",
        f"row 1: expected 2 cells (question, answer), got 3; {SEPARATED}",
    ),
    "empty cell": (
        "x.csv",
        "question,answer\nQ,A\nQ,\n",
        "row 1: answer: expected text, got null (no value)",
    ),
    "nan": (
        "x.csv",
        "question,answer\nQ,A\nnan,A\n",
        "row 1: question: expected text, got NaN (an empty cell)",
    ),
    "Latin-1": (
        "x.csv",
        b"question,answer\nQ,A\n\xe9,A\n",
        "row 1: byte 0 is not UTF-8; save the file as UTF-8",
    ),
    "open quote": (
        "x.csv",
        'question,answer\nQ,A\n"Q,A\n',
        "row 1: not ','-separated text (unexpected end of data); "
        "close every quote and end lines with a line feed",
    ),
    "line ends of old": (
        "x.csv",
        "question,answer\rQ,A\r",
        "not ','-separated text (new-line character seen in unquoted field",
    ),
    "columns twice": (
        "x.csv",
        "question,question\nQ,A\n",
        "the first line has several columns of the same name; name each once",
    ),
    "header alone": ("x.tsv", "question\tanswer\n", "no rows; provide at least one sample"),
    "empty CSV": ("x.csv", "", "no rows; provide at least one sample"),
    "UTF-16": (
        "x.csv",
        "question,answer".encode("utf-16"),
        "expected UTF-8, got UTF-16; save the file as UTF-8",
    ),
    "deep nesting": (
        "x.jsonl",
        "[" * 100_000,
        "row 0: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode "
        "string); expected one object a line",
    ),
    "two lists": (
        "x.json",
        '{"images": [], "annotations": []}',
        "expected a list of rows, got an object",
    ),
    "unknown kind": (
        "x.xlsx",
        b"PK",
        "expected one of .jsonl, .ndjson, .json, .csv, .tsv, .tar, .tgz, .tar.gz, .parquet, .arrow, "
        "or a folder of images, got a .xlsx file",
    ),
    "no extension": (
        "rows",
        b"{}",
        "expected one of .jsonl, .ndjson, .json, .csv, .tsv, .tar, .tgz, .tar.gz, .parquet, .arrow, "
        "or a folder of images, got a file without an extension",
    ),
    "empty tar": ("x.tar", b"", "row 0: not a readable tar (empty file); replace FOLDER/x.tar"),
    "compressed tar of noise": (
        "x.tar.gz",
        b"noise",
        "row 0: not a readable tar (truncated header); replace FOLDER/x.tar.gz",
    ),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_raises_a_one_line_error(folder, name, content, complaint):
    assert error_of(write(folder, name, content), folder).startswith(f"FOLDER/{name}: {complaint}")


def _tar(folder, **files: bytes) -> dict:
    return {
        "path": str(
            add_files(folder / "x.tar", {name.replace("_", "."): data for name, data in files.items()})
        )
    }


def _linked_tar(folder) -> dict:
    entry = _tar(folder, a_txt=b"A digit.")
    with tarfile.open(entry["path"], "a") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return entry


def _parquet(folder, table: dict) -> dict:
    pq.write_table(pa.table(table), folder / "x.parquet")
    return {"path": str(folder / "x.parquet")}


def _images(folder, name: str, content: bytes) -> dict:
    (folder / name).write_bytes(content)
    return write(folder, "x.jsonl", json.dumps({"image": name, "caption": "A."}))


def _saved(folder) -> dict:
    datasets.Dataset.from_list([vqa()]).save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    arrow.write_bytes(b"noise")
    return {"path": str(folder / "saved")}


ROW = json.dumps(vqa())
BAD_ENTRIES = {
    "pickle in a tar": (
        lambda f: _tar(f, a_png=SCAN, a_txt=b"A.", a_pkl=pickle.dumps(print)),
        "FOLDER/x.tar: row 0: a file that may run code when it is read, got a.pkl; "
        "store images as PNG or JPEG, and the rest as JSON",
    ),
    "npy in a tar": (
        lambda f: _tar(f, a_npy=b"x", a_txt=b"A."),
        "FOLDER/x.tar: row 0: a file that may run code when it is read, got a.npy; ",
    ),
    "weights in a tar": (
        lambda f: _tar(f, a_pth=b"x", a_txt=b"A."),
        "FOLDER/x.tar: row 0: a file that may run code when it is read, got a.pth; ",
    ),
    "link in a tar": (_linked_tar, "FOLDER/x.tar: row 0: no format has these columns, got text; name them"),
    "Latin-1 in a tar": (
        lambda f: _tar(f, a_png=SCAN, a_txt=b"\xe9"),
        "FOLDER/x.tar: row 0: a.txt: byte 0 is not UTF-8; save the file as UTF-8",
    ),
    "list in a tar": (
        lambda f: _tar(f, a_json=b"[]"),
        "FOLDER/x.tar: row 0: a.json: expected an object, got a list",
    ),
    "no JSON in a tar": (
        lambda f: _tar(f, a_json=b"{"),
        "FOLDER/x.tar: row 0: a.json: not JSON (Expecting property name enclosed in double quotes at "
        "character 1); expected an object",
    ),
    "noise for Parquet": (
        lambda f: write(f, "x.parquet", b"noise"),
        "FOLDER/x.parquet: cannot be read (Parquet",
    ),
    "noise for Arrow": (lambda f: write(f, "x.arrow", b"noise"), "FOLDER/x.arrow: cannot be read ("),
    "noise in a saved dataset": (_saved, "FOLDER/saved: cannot be read ("),
    "NaN in Parquet": (
        lambda f: _parquet(f, {"question": ["Q", "Q"], "answer": [1.0, np.nan]}),
        "FOLDER/x.parquet: row 1: answer: expected text, got NaN (an empty cell)",
    ),
    "null in Parquet": (
        lambda f: _parquet(f, {"question": ["Q", None], "answer": ["A", "A"]}),
        "FOLDER/x.parquet: row 1: question: expected text, got null (no value)",
    ),
    "unknown columns": (
        lambda f: write(f, "x.csv", "a,b\n1,2\n"),
        "FOLDER/x.csv: row 0: no format has these columns, got a, b; name them in the recipe, such as "
        "columns: {image: COLUMN, question: COLUMN, answer: COLUMN}, or for a new recipe with "
        "--column image=COLUMN --column question=COLUMN --column answer=COLUMN, or use those of a format",
    ),
    "unknown columns of images": (
        lambda f: write(f, "x.csv", "ort,bild,antwort,frage\nSee,a.png,Ein Boot,Was ist das?\n"),
        "FOLDER/x.csv: row 0: no format has these columns, got ort, bild, antwort, frage; name them in the "
        "recipe, such as columns: {image: bild, question: frage, answer: ort}, or for",
    ),
    "unknown columns of captions": (
        lambda f: write(f, "x.csv", "bild;frau frage\na.png;Ein Boot.\n"),
        "FOLDER/x.csv: row 0: no format has these columns, got bild, frau frage; name them in the recipe, "
        "such as columns: {image: bild, caption: frau frage}, or for a new recipe with --column image=bild "
        "--column 'caption=frau frage', or use",
    ),
    "unknown columns of preference pairs": (
        lambda f: write(f, "x.csv", "photo,worse,kind,ask,Better\na.png,Two,price,What is it?,One\n"),
        "FOLDER/x.csv: row 0: no format has these columns, got photo, worse, kind, ask, Better; name them in "
        "the recipe, such as columns: {image: photo, prompt: ask, chosen: Better, rejected: worse}, or for",
    ),
    "unknown field and columns": (
        lambda f: write(f, "x.csv", "a,b\n1,2\n") | {"columns": {"frage": "a"}},
        "FOLDER/x.csv: row 0: columns: expected fields, got 'frage'; use answer, answers, ",
    ),
    "unknown field": (
        lambda f: write(f, "x.jsonl", ROW) | {"columns": {"reply": "answer"}},
        "FOLDER/x.jsonl: columns: expected fields of vqa, got 'reply'; use answer, answers, boxes, image, "
        "images, question, system, task, video, videos",
    ),
    "unknown column": (
        lambda f: write(f, "x.jsonl", ROW) | {"columns": {"answer": "label"}},
        "FOLDER/x.jsonl: row 0: columns: answer: no such column, got 'label'; use one of question, answer",
    ),
    "another format": (
        lambda f: write(f, "x.jsonl", ROW) | {"format": "messages"},
        "FOLDER/x.jsonl: row 0: messages: missing; expected a list",
    ),
    "empty pattern": (
        lambda f: {"path": str(f / "*.tar")},
        "FOLDER/*.tar: no such data file; check the path",
    ),
    "hub offline": (lambda f: {"hub": "some-one/some-set"}, "some-one/some-set[train]: cannot be read ("),
    "unknown split": (
        lambda f: write(f, "x.jsonl", ROW) and {"hub": str(f), "split": "val"},
        "FOLDER[val]: cannot be read (Unknown split",
    ),
    "MIMIC-IT without images": (
        lambda f: write(
            f, "D_instructions.json", '{"data": {"i": {"instruction": "Q", "answer": "A", "image_ids": []}}}'
        ),
        "FOLDER/D_instructions.json: no file with its images, looked for D_images.json, D_images.json, "
        "D.json, D_00.json; name it: columns: {images_file: PATH}",
    ),
    "empty image": (
        lambda f: _images(f, "c.png", b""),
        "FOLDER/x.jsonl: row 0: FOLDER/c.png: not a readable image (an empty file); replace it",
    ),
    "cut image": (
        lambda f: _images(f, "c.png", SCAN[:60]),
        "FOLDER/x.jsonl: row 0: FOLDER/c.png: not a readable image (",
    ),
    "text for an image": (
        lambda f: _images(f, "c.png", b"<html>"),
        "FOLDER/x.jsonl: row 0: FOLDER/c.png: not a readable image (of no known image format); replace it",
    ),
}


@pytest.mark.parametrize(("make", "complaint"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_source_raises_a_one_line_error(folder, make, complaint, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder.parent / "cache"))
    for setting in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(setting, True)
    assert error_of(make(folder), folder).startswith(complaint)


def test_a_pickle_in_a_tar_is_not_unpickled(folder):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    error_of(_tar(folder, a_pkl=pickle.dumps(Boom()), a_txt=b"A.", a_png=SCAN), folder)
    assert not (folder / "ran").exists()


def test_a_link_to_a_folder_outside_the_root_is_refused(folder):
    os.symlink(folder.parent, folder / "up")
    entry = write(folder, "x.jsonl", json.dumps({"image": "up/b.png", "caption": "A."}))
    assert "row 0: image: outside of FOLDER, got FOLDER/up/b.png" in error_of(entry, folder)
    inside = {**entry, **write(folder, "y.jsonl", json.dumps({"image": "data/up/b.png", "caption": "A."}))}
    (sample,) = read_samples(DataSource(**inside, image_root=folder.parent))
    assert sample.images == [str(folder / "up" / "b.png")]


def test_an_image_of_a_wide_csv_cell_is_read(folder):
    with open(folder / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("data:image/png;base64," + "A" * 200_000, "A.")])
    assert "row 0: 150000 bytes: not a readable image" in error_of({"path": str(folder / "x.csv")}, folder)


def test_a_url_is_accepted_if_urls_are_allowed(folder):
    url = "https://example.org/a.png"
    source = DataSource(**write(folder, "x.jsonl", json.dumps({"image": url, "caption": "A."})))
    opened = open_source(source, DataSection(train=(source,), allow_urls=True))
    assert opened.sample(0, opened.raw(0)).images == [url]


def test_paths_may_go_up_within_the_root(folder):
    (folder / "sub").mkdir()
    source = DataSource(**write(folder, "x.jsonl", json.dumps({"image": "sub/../a.png", "caption": "A."})))
    opened = open_source(source, DataSection(train=(source,)))
    (medium,) = opened.sample(0, opened.raw(0)).images
    assert open_medium(medium)[0].size == Image.open(folder / "a.png").size
