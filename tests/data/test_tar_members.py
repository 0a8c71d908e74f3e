"""Files of a tar are grouped into samples by their names, and system files are ignored."""

import gzip
import json

import pytest

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_source
from flamingo_ft.data.files import is_system_file
from flamingo_ft.data.sources.tar_samples import group_members
from flamingo_ft.errors import UserError

from .fixtures import FACTS, SCANS, add_files, put

SCAN, OTHER = ((SCANS / scan).read_bytes() for scan, _ in FACTS[:2])


def vqa(answer: str) -> bytes:
    return json.dumps({"question": "Which?", "answer": answer}).encode()


def opened(path, **options):
    source = DataSource(path=path, **options)
    return open_source(source, DataSection(train=(source,)))


def samples(path, **options) -> list:
    source = opened(path, **options)
    return [source.sample(index, raw) for index, raw in enumerate(source.stream())]


def answers(path, **options) -> list[tuple[str, list[bytes]]]:
    return [(s.messages[-1]["content"][-1]["text"], s.images) for s in samples(path, **options)]


GROUPS = {
    "the standard": (["a.png", "a.txt", "b.png", "b.txt"], [["a.png", "a.txt"], ["b.png", "b.txt"]]),
    "several images under one key": (["0.json", "0.1.png", "0.2.png"], [["0.json", "0.1.png", "0.2.png"]]),
    "compound extensions": (
        ["0.jpg", "0.caption.txt", "0.meta.json"],
        [["0.jpg", "0.caption.txt", "0.meta.json"]],
    ),
    "all compound": (
        ["0.left.png", "0.right.png", "0.meta.json"],
        [["0.left.png", "0.right.png", "0.meta.json"]],
    ),
    "one pair among compounds": (["0.i.jpg", "0.i.txt", "0.m.json"], [["0.i.jpg", "0.i.txt", "0.m.json"]]),
    "dots in names": (
        ["img.0.png", "img.0.json", "img.1.png", "img.1.json"],
        [["img.0.png", "img.0.json"], ["img.1.png", "img.1.json"]],
    ),
    "dots, text first": (
        ["img.0.json", "img.0.png", "img.1.json", "img.1.png"],
        [["img.0.json", "img.0.png"], ["img.1.json", "img.1.png"]],
    ),
    "dots, unsorted": (
        ["v1.0.png", "v1.1.png", "v1.0.txt", "v1.1.txt"],
        [["v1.0.png", "v1.0.txt"], ["v1.1.png", "v1.1.txt"]],
    ),
    "dots and a mask": (
        ["i.0.png", "i.0.seg.png", "i.0.txt", "i.1.png", "i.1.seg.png", "i.1.txt"],
        [["i.0.png", "i.0.seg.png", "i.0.txt"], ["i.1.png", "i.1.seg.png", "i.1.txt"]],
    ),
    "dots, text and JSON": (
        ["i.0.png", "i.0.txt", "i.0.json", "i.1.png", "i.1.txt", "i.1.json"],
        [["i.0.png", "i.0.txt", "i.0.json"], ["i.1.png", "i.1.txt", "i.1.json"]],
    ),
    "dots, text here and JSON there": (
        ["i.0.png", "i.0.txt", "i.1.png", "i.1.json"],
        [["i.0.png", "i.0.txt"], ["i.1.png", "i.1.json"]],
    ),
    "dots, a text is missing": (["i.0.png", "i.0.txt", "i.1.png"], [["i.0.png", "i.0.txt"], ["i.1.png"]]),
    "extension of the image kept": (
        ["p.0.jpg", "p.0.jpg.json", "p.1.jpg", "p.1.jpg.json"],
        [["p.0.jpg", "p.0.jpg.json"], ["p.1.jpg", "p.1.jpg.json"]],
    ),
    "folders": (
        ["a/1.png", "a/1.txt", "b/1.png", "b/1.txt"],
        [["a/1.png", "a/1.txt"], ["b/1.png", "b/1.txt"]],
    ),
    "dots in folders": (
        ["v1.0/1.png", "v1.0/1.txt", "v1.0/2.png"],
        [["v1.0/1.png", "v1.0/1.txt"], ["v1.0/2.png"]],
    ),
    "upper case": (
        ["A.0.PNG", "A.0.TXT", "A.1.PNG", "A.1.TXT"],
        [["A.0.PNG", "A.0.TXT"], ["A.1.PNG", "A.1.TXT"]],
    ),
}


@pytest.mark.parametrize(("names", "expected"), GROUPS.values(), ids=GROUPS)
def test_members_are_grouped_by_what_their_names_mean(names, expected):
    assert [*group_members(names, str)] == expected


def test_ten_thousand_members_under_one_key_are_grouped():
    assert len([*group_members((f"doc.{i}.png" for i in range(10_000)), str)]) == 1
    pairs = (f"doc.{i // 2}.{('png', 'txt')[i % 2]}" for i in range(20_000))
    assert len([*group_members(pairs, str)]) == 10_000


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_names_with_dots_are_samples_of_their_own(tmp_path, options):
    files = {"img.0.png": SCAN, "img.0.json": vqa("Three."), "img.1.png": OTHER, "img.1.json": vqa("Eight.")}
    path = add_files(tmp_path / "x.tar", files)
    assert answers(path, **options) == [("Three.", [SCAN]), ("Eight.", [OTHER])]


def test_a_leading_dot_slash_changes_nothing(tmp_path):
    path = add_files(
        tmp_path / "x.tar", {"./a.png": SCAN, "./a.txt": b"Three.", "b.png": OTHER, "./b.txt": b"Eight."}
    )
    assert answers(path) == [("Three.", [SCAN]), ("Eight.", [OTHER])]


def test_images_are_in_the_order_of_the_json(tmp_path):
    row = {"question": "Which?", "answer": "Eight.", "images": ["0.b.png", "a.png"]}
    path = add_files(
        tmp_path / "x.tar", {"0.a.png": SCAN, "0.b.png": OTHER, "0.json": json.dumps(row).encode()}
    )
    assert answers(path) == [("Eight.", [OTHER, SCAN])]
    row["images"] = ["c.png", "a.png"]
    path = add_files(
        tmp_path / "y.tar", {"0.a.png": SCAN, "0.b.png": OTHER, "0.json": json.dumps(row).encode()}
    )
    with pytest.raises(UserError, match=r"row 0: images\[0\]: names no file of the sample, got 'c.png'"):
        samples(path)


CLASHES = {
    "two texts": (
        {"a.png": SCAN, "a.txt": b"One.", "a.caption": b"Two."},
        "two texts, got a.txt and a.caption",
    ),
    "two JSON files": (
        {"a.png": SCAN, "a.json": vqa("A"), "a.b.json": vqa("B")},
        "JSON files, got a.json and a.b.json",
    ),
    "the same text twice": (
        {"a.l.txt": b"A.", "a.r.txt": b"A.", "a.png": SCAN},
        "two texts, got a.l.txt and a.r.txt",
    ),
    "two classes": ({"a.png": SCAN, "a.cls": b"1", "a.cls2": b"2"}, "two texts, got a.cls and a.cls2"),
    "text and JSON differ": (
        {"a.png": SCAN, "a.txt": b"One.", "a.json": b'{"text": "Two."}'},
        "a.txt: differs from 'text' in the sample's JSON file",
    ),
}


@pytest.mark.parametrize(("files", "complaint"), CLASHES.values(), ids=CLASHES)
def test_a_second_text_or_json_of_a_sample_is_rejected_by_name(tmp_path, files, complaint):
    with pytest.raises(UserError, match="row 0: ") as caught:
        samples(add_files(tmp_path / "x.tar", files))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_duplicate_name_in_a_tar_is_rejected(tmp_path, streaming):
    path = add_files(tmp_path / "x.tar", {"a.png": SCAN, "./a.png": OTHER, "a.txt": b"Three."})
    with pytest.raises(UserError, match="row 0: the tar holds a.png more than once; keep one of them"):
        samples(path, streaming=streaming)


def test_two_videos_of_a_sample_are_both_kept(tmp_path):
    text = b'{"question": "<video><video>?", "answer": "No."}'
    path = add_files(tmp_path / "x.tar", {"0.a.mp4": b"a", "0.b.mp4": b"b", "0.json": text})
    (sample,) = samples(path)
    assert [medium.file for medium in sample.images] == [b"a", b"b"]


SYSTEM_FILES = [
    "__MACOSX/._a.png", "._a.png", "x/._a.txt", ".DS_Store", "x/.DS_Store", "Thumbs.db", "thumbs.db",
    "Desktop.ini", "@eaDir/a.png/SYNOFILE_THUMB_M.jpg", ".ipynb_checkpoints/a-checkpoint.png",
    ".AppleDouble/a.png", "PaxHeaders.1/a.png", "pax_global_header", "$RECYCLE.BIN/a.png", ".Trashes/1/a.png",
]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_system_files_are_recognized(name):
    assert is_system_file(name)


@pytest.mark.parametrize(
    "name", ["a.png", "x.y/a.png", "thumbs/db.png", "_a.png", ".a.png", "macosx/a.png", "..a"]
)
def test_user_files_are_not_system_files(name):
    assert not is_system_file(name)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_system_files_in_a_tar_are_ignored(tmp_path, name):
    files = {"a.png": SCAN, "a.txt": b"Three."}
    before, after = (dict.fromkeys(names, b"x") for names in (SYSTEM_FILES[:6], SYSTEM_FILES[6:]))
    path = add_files(tmp_path / name, before | files | after)
    assert answers(path) == [("Three.", [SCAN])]


def test_system_files_in_an_image_folder_are_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "scans"
    for scan, answer in FACTS[:2]:
        put(folder / answer, scan)
    for name in SYSTEM_FILES:
        (folder / "Three." / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "Three." / name).write_bytes(SCAN)
    for streaming in (False, True):
        assert sorted(answer for answer, _ in answers(folder, streaming=streaming)) == ["Eight.", "Three."]
    rows = [{"file_name": f"{answer}/{scan}", "text": "A digit."} for scan, answer in FACTS[:2]]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [answer for answer, _ in answers(folder)] == ["A digit.", "A digit."]


def test_system_files_that_match_a_pattern_are_ignored(tmp_path):
    add_files(tmp_path / "0.tar", {"a.png": SCAN, "a.txt": b"Three."})
    (tmp_path / "._0.tar").write_bytes(gzip.compress(b"x"))
    assert answers(tmp_path / "*.tar") == [("Three.", [SCAN])]
