"""`generate --data` answers every row of a file, and a killed run continues to the same file."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from flamingo_ft.cli import main
from flamingo_ft.errors import UserError
from flamingo_ft.inference import generate
from flamingo_ft.inference.answers_file import AnswersFile
from flamingo_ft.inference.generate import generate_file
from flamingo_ft.inference.predictor import Predictor

from .conftest import PROMPT

LENGTH, ROOT = {"max_new_tokens": 6}, Path("/")


@pytest.fixture(scope="module")
def predictor(folders):
    return Predictor.from_pretrained(folders[0] / "adapter", **LENGTH)


@pytest.fixture
def adapter(folders, predictor, monkeypatch):
    """An adapter that is loaded once."""
    monkeypatch.setattr(generate.Predictor, "from_pretrained", lambda folder, **options: as_asked(options))

    def as_asked(options):
        options.pop("start"), options.pop("quantization"), options.pop("dtype")
        return Predictor(predictor.model, predictor.processor, image_cache_mib=1, **options)

    return folders[0] / "adapter"


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def rows(folders):
    """Questions of different lengths, with and without images and answers."""
    images = [str(path) for path in folders[1]]
    return [
        {"question": f"Which digit is this{' now' * (number % 3)}?", "image": images[number % 2]}
        | ({"answer": "7"} if number % 4 == 0 else {})
        for number in range(21)
    ]


def test_every_row_is_answered_in_order(adapter, predictor, rows, tmp_path):
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "answers.jsonl"
    summary = generate_file(adapter, data, out, image_root=ROOT, batch_size=2, **LENGTH)
    assert (summary.answered, summary.skipped) == (21, 0)
    expected = predictor.batch([(row["image"], row["question"]) for row in rows])
    assert read(out) == [
        {
            "where": f"{data}: row {number}",
            "images": [row["image"]],
            "prompt": f"<image>{row['question']}",
            **({"reference": "7"} if number % 4 == 0 else {}),
            "answer": answer,
        }
        for number, (row, answer) in enumerate(zip(rows, expected, strict=True))
    ]
    assert len(set(expected)) > 1 and not out.with_name("answers.jsonl.unfinished").exists()


@pytest.mark.parametrize("suffix, options", [(".jsonl", {"temperature": 1.5}), (".csv", {})])
def test_a_killed_run_continues_to_the_same_file(adapter, rows, tmp_path, monkeypatch, suffix, options):
    data, whole, out = write(tmp_path / "rows.jsonl", rows), tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    options = {"batch_size": 2, **LENGTH, **options}
    generate_file(adapter, data, whole, image_root=ROOT, **options)
    write_rows, windows = AnswersFile.write, []

    def killed(self, records):
        windows.append(len(records))
        if len(windows) == 2:
            self._file.write(b'{"where": "half a li')
            self._file.flush()
            raise KeyboardInterrupt
        write_rows(self, records)

    with monkeypatch.context() as patched:
        patched.setattr(AnswersFile, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            generate_file(adapter, data, out, image_root=ROOT, **options)
    assert out.read_bytes().endswith(b"half a li")
    with pytest.raises(
        UserError, match="b.* exists; pass --resume to continue it, or --overwrite to replace"
    ):
        generate_file(adapter, data, out, image_root=ROOT, **options)
    with pytest.raises(UserError, match="was begun with num_beams 1, got 2; use the same, or pass --overw"):
        generate_file(adapter, data, out, image_root=ROOT, resume=True, **LENGTH, batch_size=2, num_beams=2)
    lines = []
    generate_file(adapter, data, out, image_root=ROOT, resume=True, log=lines.append, **options)
    assert out.read_bytes() == whole.read_bytes() and lines == [f"21 rows in {out}"]
    generate_file(adapter, data, out, image_root=ROOT, resume=True, log=lines.append, **options)
    assert lines[1:] == [f"{out} is complete"] and out.read_bytes() == whole.read_bytes()


def test_a_csv_has_a_row_for_each_with_its_images(adapter, folders, tmp_path):
    images = [str(path) for path in folders[1]]
    rows = [{"messages": [{"role": "user", "content": "<image> or\n<image>?"}], "images": images}]
    out = tmp_path / "answers.csv"
    generate_file(adapter, write(tmp_path / "rows.jsonl", rows), out, image_root=ROOT, **LENGTH)
    (row,) = csv.DictReader(out.open(newline=""))
    assert row["images"].split("\n") == images and row["prompt"] == "<image> or\n<image>?"
    assert row["answer"] and row["reference"] == row["error"] == ""


def test_a_folder_of_images_is_asked_the_prompt(adapter, predictor, folders, tmp_path):
    for name in ("b/1.png", "a.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folders[1][0], tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    out = tmp_path / "answers.jsonl"
    lines = []
    generate_file(adapter, tmp_path / "photos", out, prompt=PROMPT, log=lines.append, **LENGTH)
    assert f"{tmp_path / 'photos'}: left out 1 file of other types than jpg, jpeg, png" in lines[0]
    assert [row["images"] for row in read(out)] == [
        [str(tmp_path / "photos" / name)] for name in ("a.png", "b/1.png")
    ]
    assert {row["answer"] for row in read(out)} == {predictor(folders[1][0], PROMPT)}
    generate_file(adapter, tmp_path / "photos", out, overwrite=True, **LENGTH)
    assert {row["answer"] for row in read(out)} == {predictor(folders[1][0])}


def test_the_last_turn_of_a_dialogue_and_the_end_of_a_document_are_answered(adapter, folders, tmp_path):
    dialogue = [
        {"role": "user", "content": "<image>Which?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Two."},
    ]
    image, out = str(folders[1][0]), tmp_path / "answers.jsonl"
    data = write(tmp_path / "a.jsonl", [{"messages": dialogue, "images": [image]}])
    generate_file(adapter, data, out, image_root=ROOT, **LENGTH)
    (row,) = read(out)
    assert (row["prompt"], row["reference"], row["images"]) == ("And now?", "Two.", [image])
    data = write(tmp_path / "b.jsonl", [{"image": image, "caption": "A seven."}])
    generate_file(adapter, data, out, image_root=ROOT, overwrite=True, **LENGTH)
    (row,) = read(out)
    assert (row["prompt"], row["reference"]) == ("<image>", "A seven.")


def test_bad_rows_are_named_and_on_request_skipped(adapter, folders, tmp_path):
    image, out, lines = str(folders[1][0]), tmp_path / "answers.jsonl", []
    rows = [
        {"question": "Which?", "image": image},
        {"question": "Which?", "image": "missing.png"},
        {"question": "", "image": image},
        {"question": "seven " * 3000, "image": image},
        {"question": "Which?", "image": image},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"row 1: .*missing.png.*; or pass --skip-bad"):
        generate_file(adapter, data, out, image_root=ROOT, **LENGTH)
    summary = generate_file(
        adapter, data, out, image_root=ROOT, resume=True, skip_bad=True, log=lines.append, **LENGTH
    )
    assert (summary.answered, summary.skipped) == (2, 3) and lines == [f"5 rows in {out}, 3 skipped"]
    errors = [row.get("error", "") for row in read(out)]
    assert [bool(error) for error in errors] == [False, True, True, True, False]
    with pytest.raises(UserError, match="no row could be answered, got 2; .*none.jsonl says why"):
        data, out = write(tmp_path / "bad.jsonl", rows[1:3]), tmp_path / "none.jsonl"
        generate_file(adapter, data, out, image_root=ROOT, skip_bad=True, **LENGTH)
    assert "missing.png" in errors[1] and "question: empty" in errors[2] and "shorten" in errors[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{data}"], "--out: missing; name the file to write the answers to"),
        (["--data", "{data}", "--out", "a.txt"], "--out: must end in .jsonl or .csv, got a.txt; rename it"),
        (["--data", "{data}", "--out", "a.csv", "--prompt", "Who?"],
         "--prompt: the rows of {data} ask their own questions; remove it"),
        (["--data", "{data}", "--out", "a.csv", "--image", "{data}"],
         "--image: not used with --data, whose rows have their own; remove it"),
        (["--prompt", "Which?", "--out", "a.csv"], "--out: only used with --data; remove it"),
        (["--prompt", "Which?", "--temperature", "-1"],
         "temperature: must be 0, or at least 0.001, got -1; correct it"),
        ([], "--prompt: missing; ask something, or name an --image to caption"),
        (["--data", "{empty}", "--out", "a.csv"], "no rows"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(adapter, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "rows.jsonl", [{"question": "Which?"}])
    empty = write(tmp_path / "empty.jsonl", [])
    places = {"data": data, "empty": empty}
    assert main(["generate", str(adapter), *(part.format(**places) for part in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.format(**places) in line
    assert not (tmp_path / "a.csv").exists()
