"""What people's data is wrong in, and the one line that each mistake is told in: file, row, field, found, wanted."""

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
from flamingo_ft.data import open_medium, open_source
from flamingo_ft.errors import UserError

from .fixtures import FACTS, SCANS, add_files

SCAN = (SCANS / FACTS[0][0]).read_bytes()
ASK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
HUMAN = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
MARKERS = "add the missing images or remove markers"
EMPTY = "found no words, wanted text; write it or remove the row"
EMPTY_TURN = "found no words, wanted text or an image; remove the turn"


def text_or_messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def vqa(**fields) -> dict:
    return {"question": "What?", "answer": "That.", **fields}


# The second row of a file whose first is good, the schema being that of the good one, and what is said of it.
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
    "preference": {"prompt": "What?", "chosen": "This.", "rejected": "That."},
}
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
        "messages[0].content: found NaN (an empty cell), wanted text or a list of typed blocks",
    ),
    "late system": (
        "messages",
        text_or_messages(("user", "Q"), ("system", "S"), ("assistant", "A")),
        "messages[1].content: found a system message here, wanted it first; move or join it",
    ),
    "two users": (
        "messages",
        text_or_messages(("user", "Q"), ("user", "Q"), ("assistant", "A")),
        "messages[1].content: found user after user, wanted user and assistant in turn; join them",
    ),
    "two answers": (
        "messages",
        text_or_messages(("user", "Q"), ("assistant", "A"), ("assistant", "A")),
        "messages[2].content: found assistant after assistant, wanted user and assistant in turn; join them",
    ),
    "system then answer": (
        "messages",
        text_or_messages(("system", "S"), ("assistant", "A")),
        "messages: found an assistant turn first, wanted what it answers before it",
    ),
    "loss of text": (
        "messages",
        {"messages": [ASK[0], {**ASK[1], "loss": "no"}]},
        "messages[1].loss: not true (learned) or false (not learned), got 'no'; use one of them",
    ),
    "more images": (
        "messages",
        {**text_or_messages(("user", "<image>?"), ("assistant", "A")), "images": ["a.png"] * 2},
        f"found 1 <image> markers but 2 images; {MARKERS}",
    ),
    "more markers": (
        "messages",
        {**text_or_messages(("user", "<image><image>?"), ("assistant", "A")), "images": ["a.png"]},
        f"found 2 <image> markers but 1 images; {MARKERS}",
    ),
    "more videos": (
        "messages",
        {**text_or_messages(("user", "<video>?"), ("assistant", "A")), "videos": [["a.png"]] * 2},
        "found 1 <video> markers but 2 videos; add the missing videos or remove markers",
    ),
    "no frames": (
        "messages",
        {**text_or_messages(("user", "?"), ("assistant", "A")), "videos": [[]]},
        "videos[0]: found no frames, wanted at least one image",
    ),
    "missing frame": (
        "messages",
        {**text_or_messages(("user", "?"), ("assistant", "A")), "video": ["a.png", "b.png"]},
        "video[1]: no such image FOLDER/b.png; check the path or set image_root",
    ),
    "image URL without URL": (
        "messages",
        text_or_messages(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "A")),
        "messages[0].content[0].image_url: found null, wanted the path of an image",
    ),
    "half a data URI": (
        "messages",
        text_or_messages(
            ("user", [{"type": "image_url", "image_url": "data:image/png;base64,iVBOR"}]), ("assistant", "A")
        ),
        "messages[0].content[0].image_url: not base64 (Invalid base64-encoded string: number of data characters (5) "
        "cannot be 1 more than a multiple of 4); wanted an image's file in base64",
    ),
    "empty data URI": (
        "messages",
        text_or_messages(
            ("user", [{"type": "image", "image": "data:image/png;base64,"}]), ("assistant", "A")
        ),
        "messages[0].content[0].image: found an empty file, wanted an image",
    ),
    "path upwards": (
        "messages",
        {"messages": ASK, "images": ["../b.png"]},
        "images[0]: found FOLDER/../b.png, which leads out of FOLDER; set image_root to a folder around all images",
    ),
    "path from the root": (
        "messages",
        {"messages": ASK, "images": ["/etc/hostname"]},
        "images[0]: found /etc/hostname, which leads out of FOLDER; set image_root to a folder around all images",
    ),
    "link outside": (
        "messages",
        {"messages": ASK, "images": ["link.png"]},
        "images[0]: found FOLDER/link.png, which leads out of FOLDER; set image_root to a folder around all images",
    ),
    "URL": (
        "messages",
        {"messages": ASK, "images": ["https://example.org/a.png"]},
        "images[0]: found the URL https://example.org/a.png; set data.allow_urls to true to fetch it",
    ),
    "file URL": (
        "messages",
        {"messages": ASK, "images": ["file:///etc/hostname"]},
        "images[0]: found a URL of file:, wanted a path inside image_root, or http(s)",
    ),
    "ftp URL": (
        "messages",
        {"messages": ASK, "images": ["FTP://example.org/a.png"]},
        "images[0]: found a URL of ftp:, wanted a path inside image_root, or http(s)",
    ),
    "number as image": (
        "messages",
        {"messages": ASK, "images": [7]},
        "images[0]: found a number, wanted the path of an image",
    ),
    "unknown speaker": (
        "llava",
        {"conversations": [{"from": "bard", "value": "Q"}, HUMAN[1]]},
        "conversations[0].from: found 'bard', wanted human, gpt or system",
    ),
    "no value": (
        "llava",
        {"conversations": [{"from": "human"}, HUMAN[1]]},
        "conversations[0]: found no value, wanted an object with from and value",
    ),
    "answer first": (
        "llava",
        {"conversations": HUMAN[::-1]},
        "conversations: found an assistant turn first, wanted what it answers before it",
    ),
    "conversations null": ("llava", {"conversations": None}, "conversations: found null, wanted a list"),
    "no conversation": (
        "llava",
        {"conversations": []},
        "conversations: found no assistant turn, wanted one to learn from",
    ),
    "marker without image": (
        "llava",
        {"conversations": [{"from": "human", "value": "<image>\nQ"}, HUMAN[1]]},
        f"found 1 <image> markers but 0 images; {MARKERS}",
    ),
    "system a number": (
        "sharegpt",
        {"conversations": HUMAN, "system": 3},
        "system: found a number, wanted text",
    ),
    "a turn of text": (
        "sharegpt",
        {"conversations": ["hi"]},
        "conversations[0]: found text, wanted an object with from and value",
    ),
    "instruction null": (
        "alpaca",
        {"instruction": None, "output": "A"},
        "instruction: found null, wanted text",
    ),
    "output empty": ("alpaca", {"instruction": "Q", "output": ""}, f"output: {EMPTY}"),
    "no output": ("alpaca", {"instruction": "Q"}, "output: found no such field, wanted text"),
    "input a list": (
        "alpaca",
        {"instruction": "Q", "input": [], "output": "A"},
        "input: found a list, wanted text",
    ),
    "completion null": (
        "prompt_completion",
        {"prompt": "Q", "completion": None},
        "completion: found null, wanted text",
    ),
    "completion of a user": (
        "prompt_completion",
        {"prompt": "Q", "completion": [{"role": "user", "content": "A"}]},
        "prompt: found no assistant turn, wanted one to learn from",
    ),
    "question NaN": ("vqa", vqa(question=math.nan), "question: found NaN (an empty cell), wanted text"),
    "question a list": ("vqa", vqa(question=["Q"]), "question: found a list, wanted text"),
    "answer true": ("vqa", vqa(answer=True), "answer: found true or false, wanted text"),
    "answer null": ("vqa", vqa(answer=None), "answer: found null, wanted text"),
    "no answers": (
        "vqa",
        {"question": "Q", "answers": []},
        "answers: found an empty list, wanted at least one answer",
    ),
    "an answer null": (
        "vqa",
        {"question": "Q", "answers": ["A", None]},
        "answers[1]: found null, wanted text",
    ),
    "an answer without answer": (
        "vqa",
        {"question": "Q", "answers": [{"confidence": "yes"}]},
        "answers[0]: answer: found no such field, wanted text",
    ),
    "half a character": (
        "vqa",
        vqa(question="ab\ud83d"),
        "question: found half a character at 2, wanted whole text; remove it",
    ),
    "caption without image": (
        "caption",
        {"image": None, "caption": "A"},
        "found no image, wanted one in image, images or video",
    ),
    "image without caption": (
        "caption",
        {"image": "a.png", "caption": None},
        "found no caption, wanted text in caption, text, captions, label",
    ),
    "caption empty": ("caption", {"image": "a.png", "caption": "  "}, f"caption: {EMPTY}"),
    "captions empty": (
        "caption",
        {"image": "a.png", "captions": []},
        "captions: found an empty list, wanted at least one caption",
    ),
    "text of no text": ("mmc4", {"text_list": [None]}, "text_list[0]: found null, wanted text"),
    "no text": ("mmc4", {"text_list": []}, "found no words, wanted a document with text"),
    "match beyond": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"matched_text_index": 1, "image_name": "a.png"}]},
        "image_info[0].matched_text_index: found 1, wanted the number of one of 1 texts, from 0",
    ),
    "no match": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"image_name": "a.png"}]},
        "image_info[0].matched_text_index: found null, wanted the number of one of 1 texts, from 0",
    ),
    "no picture": (
        "mmc4",
        {"text_list": ["A."], "image_info": [{"matched_text_index": 0}]},
        "image_info[0]: found no image, wanted image_base64, image_name or raw_url",
    ),
    "picture at a URL": (
        "mmc4",
        {
            "text_list": ["A."],
            "image_info": [{"matched_text_index": 0, "raw_url": "http://example.org/a.png"}],
        },
        "image_info[0].raw_url: found the URL http://example.org/a.png; set data.allow_urls to true to fetch it",
    ),
    "lists of two lengths": (
        "obelics",
        {"texts": ["A.", "B."], "images": [None]},
        "found 2 texts and 1 images, wanted lists of one length with null where the other has something",
    ),
    "text and image": (
        "obelics",
        {"texts": ["A."], "images": ["a.png"]},
        "texts[0]: found both a text and an image, wanted one of them and null in the other list",
    ),
    "neither": (
        "obelics",
        {"texts": ["A.", None], "images": [None, None]},
        "texts[1]: found neither text nor image, wanted one of them and null in the other list",
    ),
    "no rejected": (
        "preference",
        {"prompt": "Q", "chosen": "A"},
        "rejected: found no such field, wanted text",
    ),
    "the same twice": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        "rejected: found the same as chosen, wanted a worse answer; remove the row",
    ),
    "no prompt": (
        "preference",
        {"chosen": "A", "rejected": "B"},
        "prompt: found none, wanted text or messages that chosen and rejected answer",
    ),
    "rejected nothing": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": []},
        "rejected: found no assistant turn, wanted one to learn from",
    ),
    "image in rejected": (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": "<image>"},
        "rejected: found an image in the rejected answer, wanted words; move it to the prompt",
    ),
}


@pytest.fixture
def folder(tmp_path):
    """With an image, and a link to another one outside."""
    inside = tmp_path / "data"
    inside.mkdir()
    for path in (inside / "a.png", tmp_path / "b.png"):
        path.write_bytes(SCAN)
    os.symlink(tmp_path / "b.png", inside / "link.png")
    return inside


def told(entry: dict, folder) -> str:
    """The one line that a source is refused with, when it is opened or where its first bad row is read or shown."""
    source = DataSource(**entry)
    with pytest.raises(UserError) as caught:
        opened = open_source(source, DataSection(train=(source,)))
        for index, raw in enumerate(opened.stream()):
            sample = opened.sample(index, raw)
            [open_medium(medium, sample.where) for medium in sample.images]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    return message.replace(str(folder), "FOLDER")


def write(folder, name: str, content: str | bytes) -> dict:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return {"path": str(folder / name)}


def test_there_are_many_cases():
    assert len(BAD_ROWS) + len(BAD_FILES) + len(BAD_ENTRIES) >= 90


@pytest.mark.parametrize(("good", "row", "complaint"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_in_one_line(folder, good, row, complaint):
    entry = write(folder, "x.jsonl", f"{json.dumps(GOOD[good])}\n{json.dumps(row)}\n")
    assert told(entry, folder) == f"FOLDER/x.jsonl: row 1: {complaint}"


SEPARATED = "wanted 2 (question, answer); put text with commas in quotes"
BAD_FILES = {
    "ragged, short": ("x.csv", "question,answer\nQ,A\nQ\n", f"row 1: found 1 cells, {SEPARATED}"),
    "ragged, long": ("x.csv", "question,answer\nQ,A\nQ,A,A\n", f"row 1: found 3 cells, {SEPARATED}"),
    "empty cell": ("x.csv", "question,answer\nQ,A\nQ,\n", "row 1: answer: found null, wanted text"),
    "nan": (
        "x.csv",
        "question,answer\nQ,A\nnan,A\n",
        "row 1: question: found NaN (an empty cell), wanted text",
    ),
    "Latin-1": (
        "x.csv",
        b"question,answer\nQ,A\n\xe9,A\n",
        "row 1: byte 0 is not UTF-8; save the file as UTF-8",
    ),
    "open quote": (
        "x.csv",
        'question,answer\nQ,A\n"Q,A\n',
        "row 1: not ','-separated text (unexpected end of data); close every quote and end lines with a line feed",
    ),
    "line ends of old": (
        "x.csv",
        "question,answer\rQ,A\r",
        "not ','-separated text (new-line character seen in unquoted field",
    ),
    "columns twice": (
        "x.csv",
        "question,question\nQ,A\n",
        "found columns of the same name in the first line; name each once",
    ),
    "header alone": ("x.tsv", "question\tanswer\n", "found no rows; wanted at least one sample"),
    "empty CSV": ("x.csv", "", "found no rows; wanted at least one sample"),
    "UTF-16": (
        "x.csv",
        "question,answer".encode("utf-16"),
        "found UTF-16, wanted UTF-8; save the file as UTF-8",
    ),
    "deep nesting": (
        "x.jsonl",
        "[" * 100_000,
        "row 0: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode string); "
        "wanted one object a line",
    ),
    "two lists": (
        "x.json",
        '{"images": [], "annotations": []}',
        "found an object, wanted a list of rows",
    ),
    "unknown kind": (
        "x.xlsx",
        b"PK",
        "found a .xlsx file, wanted one of .jsonl, .ndjson, .json, .csv, .tsv, .tar, .tgz, .tar.gz, .parquet, .arrow, "
        "or a folder of images",
    ),
    "empty tar": ("x.tar", b"", "row 0: not a readable tar (empty file); replace FOLDER/x.tar"),
    "compressed tar of noise": (
        "x.tar.gz",
        b"noise",
        "row 0: not a readable tar (truncated header); replace FOLDER/x.tar.gz",
    ),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_told_in_one_line(folder, name, content, complaint):
    assert told(write(folder, name, content), folder).startswith(f"FOLDER/{name}: {complaint}")


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
        "FOLDER/x.tar: row 0: found a.pkl, which may run code when it is read; "
        "store images as PNG or JPEG, and the rest as JSON",
    ),
    "npy in a tar": (
        lambda f: _tar(f, a_npy=b"x", a_txt=b"A."),
        "FOLDER/x.tar: row 0: found a.npy, which may run code",
    ),
    "weights in a tar": (
        lambda f: _tar(f, a_pth=b"x", a_txt=b"A."),
        "FOLDER/x.tar: row 0: found a.pth, which may run code",
    ),
    "link in a tar": (_linked_tar, "FOLDER/x.tar: row 0: found the columns text, wanted those of"),
    "Latin-1 in a tar": (
        lambda f: _tar(f, a_png=SCAN, a_txt=b"\xe9"),
        "FOLDER/x.tar: row 0: a.txt: byte 0 is not UTF-8; save the file as UTF-8",
    ),
    "list in a tar": (
        lambda f: _tar(f, a_json=b"[]"),
        "FOLDER/x.tar: row 0: a.json: found a list, wanted an object",
    ),
    "no JSON in a tar": (
        lambda f: _tar(f, a_json=b"{"),
        "FOLDER/x.tar: row 0: a.json: not JSON (Expecting property name enclosed in double quotes at character 1); "
        "wanted an object",
    ),
    "noise for Parquet": (
        lambda f: write(f, "x.parquet", b"noise"),
        "FOLDER/x.parquet: cannot be read (Parquet",
    ),
    "noise for Arrow": (lambda f: write(f, "x.arrow", b"noise"), "FOLDER/x.arrow: cannot be read ("),
    "noise in a saved dataset": (_saved, "FOLDER/saved: cannot be read ("),
    "NaN in Parquet": (
        lambda f: _parquet(f, {"question": ["Q", "Q"], "answer": [1.0, np.nan]}),
        "FOLDER/x.parquet: row 1: answer: found NaN (an empty cell), wanted text",
    ),
    "null in Parquet": (
        lambda f: _parquet(f, {"question": ["Q", None], "answer": ["A", "A"]}),
        "FOLDER/x.parquet: row 1: question: found null, wanted text",
    ),
    "unknown columns": (
        lambda f: write(f, "x.csv", "a,b\n1,2\n"),
        "FOLDER/x.csv: row 0: found the columns a, b, wanted those of preference (prompt, chosen, rejected); messages",
    ),
    "unknown field": (
        lambda f: write(f, "x.jsonl", ROW) | {"columns": {"reply": "answer"}},
        "FOLDER/x.jsonl: columns: found 'reply', wanted fields of vqa: answer, answers, image, images, question, "
        "system, task, video, videos",
    ),
    "unknown column": (
        lambda f: write(f, "x.jsonl", ROW) | {"columns": {"answer": "label"}},
        "FOLDER/x.jsonl: row 0: columns: answer: found no column 'label', wanted one of question, answer",
    ),
    "another format": (
        lambda f: write(f, "x.jsonl", ROW) | {"format": "messages"},
        "FOLDER/x.jsonl: row 0: messages: found no such field, wanted a list",
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
        "FOLDER/D_instructions.json: found no file of its images (D_images.json, D_images.json, D.json, D_00.json); "
        "name it: columns: {images_file: PATH}",
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
def test_a_bad_source_is_told_in_one_line(folder, make, complaint, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder.parent / "cache"))
    for setting in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(setting, True)
    assert told(make(folder), folder).startswith(complaint)


def test_a_pickle_in_a_tar_is_not_unpickled(folder):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    told(_tar(folder, a_pkl=pickle.dumps(Boom()), a_txt=b"A.", a_png=SCAN), folder)
    assert not (folder / "ran").exists()


def test_a_link_to_a_folder_outside_leads_out_too(folder):
    os.symlink(folder.parent, folder / "up")
    entry = write(folder, "x.jsonl", json.dumps({"image": "up/b.png", "caption": "A."}))
    assert "row 0: image: found FOLDER/up/b.png, which leads out of FOLDER" in told(entry, folder)
    assert "b.png" in str(DataSource(**entry, image_root=folder.parent).image_root / "b.png")


def test_an_image_of_a_wide_csv_cell_is_read(folder):
    with open(folder / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("data:image/png;base64," + "A" * 200_000, "A.")])
    assert "row 0: 150000 bytes: not a readable image" in told({"path": str(folder / "x.csv")}, folder)


def test_a_url_is_let_through_when_urls_are_allowed(folder):
    url = "https://example.org/a.png"
    source = DataSource(**write(folder, "x.jsonl", json.dumps({"image": url, "caption": "A."})))
    opened = open_source(source, DataSection(train=(source,), allow_urls=True))
    assert opened.sample(0, opened.raw(0)).images == [url]


def test_paths_inside_may_go_up_and_down(folder):
    (folder / "sub").mkdir()
    source = DataSource(**write(folder, "x.jsonl", json.dumps({"image": "sub/../a.png", "caption": "A."})))
    opened = open_source(source, DataSection(train=(source,)))
    (medium,) = opened.sample(0, opened.raw(0)).images
    assert open_medium(medium)[0].size == Image.open(folder / "a.png").size
