"""A check lists every row that cannot be used, and its counts equal an independent count of the rest."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from flamingo_ft import cli
from flamingo_ft.check.check_data import check_data
from flamingo_ft.cli.recipe_tables import check_tables
from flamingo_ft.config import Recipe, load_recipe
from flamingo_ft.config.library import find_recipe
from flamingo_ft.data import open_data, open_source
from flamingo_ft.data.collate import collate_text
from flamingo_ft.data.encode import IGNORED, Dropped, encode, encode_within
from flamingo_ft.errors import UserError
from flamingo_ft.model.images import CONVERSIONS
from tests.check.small_recipes import (
    asked,
    checked,
    language_without_weights,
    problem_lines,
    recipe,
    write_rows,
)
from tests.data.dialogues import nano_processor
from tests.data.fixtures import FACTS, FIXTURES, SCANS
from tests.data.test_bad_data import BAD_ROWS, GOOD, SCAN
from tests.model.kinds_of_images import KINDS

GOOD_DOCUMENTS = {  # with images, because only text after an image is learned
    "mmc4": {"text_list": ["A."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
    "obelics": {"texts": [None, "A."], "images": ["a.png", None]},
}
MEDIUM = re.compile(r"(image|video) \d+ of \d+: ")  # only a check says which of a row's images it is


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """A folder with two readable images and three unreadable ones."""
    (tmp_path / "a.png").write_bytes(SCAN)
    (tmp_path / "b.png").write_bytes((SCANS / FACTS[1][0]).read_bytes())
    (tmp_path / "cut.png").write_bytes(SCAN[: len(SCAN) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("no image")
    return tmp_path


# --- problems ---


def test_text_columns_that_the_schema_ignores_are_reported_by_check_and_train(folder, capsys):
    rows = [{**asked("<image>?", "A", ("a.png",)), "source": "web", "id": 3}] * 2 + [asked("?", "A", ())]
    path = write_rows(folder / "x.jsonl", rows)["path"]
    findings = checked(folder, [{"path": path}])
    assert findings.parts[0].unread == {"source": 2} and findings.objection is None
    line = "source 1: columns of text that the format does not read: source (2 rows)"
    assert line in [*check_tables(findings.record())]
    cli.train.print_sources(open_data(recipe(folder, [{"path": path}]).data, 0))
    assert f"{path}: columns of text that the format does not read: source\n" in capsys.readouterr().err


def test_every_kind_of_bad_row_is_listed_with_its_row(tmp_path):
    inside = tmp_path / "data"
    inside.mkdir()
    for path in (inside / "a.png", tmp_path / "b.png"):
        path.write_bytes(SCAN)
    (inside / "link.png").symlink_to(tmp_path / "b.png")
    entries, expected = [], []
    for schema, good in {**GOOD, **GOOD_DOCUMENTS}.items():
        bad = [(row, message) for of, row, message in BAD_ROWS.values() if of == schema]
        entries.append(write_rows(inside / f"{schema}.jsonl", [good, *(row for row, _ in bad), good]))
        expected += [
            f"FOLDER/{schema}.jsonl: row {i}: {message}" for i, (_, message) in enumerate(bad, start=1)
        ]
    findings = checked(tmp_path, entries)
    text = "\n".join(problem_lines(tmp_path))
    lines = MEDIUM.sub("", text.replace(str(inside), "FOLDER").replace(str(tmp_path), "PARENT")).split("\n")
    assert lines == expected
    assert findings.problems == findings.bad == len(BAD_ROWS) and findings.objection
    assert sum(part.samples for part in findings.parts) == 2 * len(GOOD)


def test_every_unreadable_image_of_a_row_is_listed_and_every_copy_of_it(folder):
    rows = [
        asked("<image><image><image>?", "A", ("cut.png", "a.png", "empty.png")),
        asked("<image>?", "A", ("words.png",)),
        asked("<image>?", "A", ("cut.png",)),
    ]
    findings = checked(folder, [write_rows(folder / "x.jsonl", rows)])
    lines = [line.removeprefix(f"{folder}/x.jsonl: ") for line in problem_lines(folder)]
    assert [line.split(": not a readable image")[0] for line in lines] == [
        f"row 0: image 1 of 3: {folder}/cut.png",
        f"row 0: image 3 of 3: {folder}/empty.png",
        f"row 1: image 1 of 1: {folder}/words.png",
        f"row 2: image 1 of 1: {folder}/cut.png",
    ]
    assert findings.bad == 3 and findings.objection == "got no usable training sample"


def test_a_broken_stream_is_reported_and_the_other_sources_are_read(folder):
    broken = FIXTURES["tar_compressed"](folder)
    content = Path(broken["path"]).read_bytes()
    Path(broken["path"]).write_bytes(content[: len(content) * 2 // 3])
    findings = checked(folder, [broken, write_rows(folder / "x.jsonl", [asked("?", "A")])])
    assert findings.parts[1].samples == 1
    assert findings.parts[0].bad == 1 and broken["path"] in problem_lines(folder)[0]


def test_a_sample_that_is_too_long_or_has_nothing_to_learn_is_a_problem_of_its_row(folder):
    no_loss = asked("?", "A")
    no_loss["messages"][1]["loss"] = False
    rows = [asked("?", "A"), asked("long " * 100, "A"), no_loss]
    checked(folder, [write_rows(folder / "x.jsonl", rows)], max_text_tokens=60)
    long, no_loss = problem_lines(folder)
    assert f"{folder}/x.jsonl: row 1: got " in long and "the limit is 60" in long
    assert no_loss == f"{folder}/x.jsonl: row 2: no assistant text to train on; remove the sample"


# --- counts ---


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The recipe with its first 60 training and 20 evaluation rows, and the report of its check."""
    few = ["data.train.0.limit=60", "data.eval.0.limit=20", "train.num_workers=0"]
    config = load_recipe(find_recipe("quickstart"), few)
    return config, check_data(config, "quickstart", tmp_path_factory.mktemp("quickstart") / "check")


def test_counts_equal_an_independent_count(quickstart):
    config, findings = quickstart
    for entry, part in zip((*config.data.train, *config.data.eval), findings.parts, strict=True):
        rows = [json.loads(line) for line in entry.path.read_text().splitlines()][: entry.limit]
        assert part.rows == part.samples == len(rows) and part.format == "messages"
        assert part.images == sum(len(row["images"]) for row in rows)
        assert part.turns == sum(len(row["messages"]) for row in rows)
        assert (part.bad, part.dropped, part.videos) == (0, 0, 0)


def test_token_counts_equal_those_of_batches(quickstart):
    config, findings = quickstart
    source = open_source(config.data.train[0], config.data)
    samples = [source.sample(i, raw) for i, raw in enumerate(source.stream())]
    batch = collate_text([encode(nano_processor(), sample) for sample in samples], pad_token_id=0)
    lengths, learned = batch["attention_mask"].sum(1), (batch["labels"] != IGNORED).sum(1)
    for name, values in (
        ("text_tokens", lengths),
        ("label_tokens", learned),
        ("loss_share", learned / lengths),
    ):
        result = findings.distributions[name]
        actual = torch.tensor([result.least, result.mean, result.most])
        expected = torch.stack([values.min(), values.double().mean(), values.max()]).float()
        torch.testing.assert_close(actual, expected)
        assert result.median == pytest.approx(values.double().quantile(0.5).item())
        assert sum(result.counts) == len(samples) and len(result.edges) == len(result.counts) + 1
    assert findings.parts[0].text_tokens == lengths.sum() and findings.parts[0].label_tokens == learned.sum()


def test_converted_images_are_counted_by_conversion(folder):
    rows, expected = [], Counter()
    for number, (name, kind) in enumerate(KINDS.items()):
        (folder / f"{number}.image").write_bytes(kind.content)
        rows.append(asked("<image>?", name, (f"{number}.image",)))
        expected.update(kind.conversions)
    rows.append(asked("<image>?", "again", rows[1]["images"]))
    expected.update(KINDS["grey"].conversions)
    train = write_rows(folder / "x.jsonl", rows)
    eval_entry = write_rows(folder / "y.jsonl", [asked("<image>?", "A", ("a.png",))])
    record = checked(folder, [train], eval=[eval_entry]).record()
    assert record["parts"][0]["conversions"] == expected
    assert {"16-bit", "float", "transparent", "palette", "CMYK", "rotated", "first frame"} <= expected.keys()
    assert json.loads((folder / "check" / "check.json").read_text())["parts"] == record["parts"]
    page = (folder / "check" / "check.html").read_text()
    console = Console(width=200)
    with console.capture() as printed:
        for table in check_tables(record):
            console.print(table)
    for name, count in expected.items():
        assert re.search(
            rf"{re.escape(name)} +{count} +\d+ +{re.escape(CONVERSIONS[name][:20])}", printed.get()
        )
        assert f'<td class="name">{name}</td><td class="n">{count}</td>' in page


def test_without_conversions_the_report_does_not_mention_them(folder):
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    record = checked(
        folder, [write_rows(folder / "x.jsonl", [asked("<image>?", "A", ("plain.png",))])]
    ).record()
    assert record["parts"][0]["conversions"] == {}
    assert "Image conversions" not in (folder / "check" / "check.html").read_text()
    assert not any("converted" in str(getattr(table, "title", table)) for table in check_tables(record))


def test_videos_are_read_and_counted(folder):
    findings = checked(folder, [FIXTURES["video"](folder)])
    (part,) = findings.parts
    assert (part.samples, part.images, part.videos) == (1, 0, 1) and findings.objection is None


def test_tiles_are_counted_and_named(folder):
    for name, size in {"long": (64, 32), "small": (32, 32)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
    rows = [asked("<image> What?", "Black.", (f"{name}.png",)) for name in ("long", "small")]
    source = [write_rows(folder / "tiles.jsonl", rows)]
    views = checked(folder, source, tiles={"max": 4}).distributions["views"]
    assert (views.least, views.most) == (1, 3)
    assert "1 x 2 tiles" in (folder / "check" / "check.html").read_text()
    assert checked(folder, source).distributions["views"].most == 1


@pytest.mark.parametrize(
    "name", ["preference", "interleaved_mmc4", "csv_captions", "tar_shards", "parquet_streamed", "llava"]
)
def test_data_of_any_schema_and_source_passes(folder, name):
    findings = checked(folder, [FIXTURES[name](folder)])
    assert findings.objection is None and findings.parts[0].samples == findings.parts[0].rows > 0


def test_duplicate_samples_and_images_are_found_by_content(folder):
    (folder / "copy.png").write_bytes(SCAN)
    same, also, other = (asked("<image>?", "A", (name,)) for name in ("a.png", "copy.png", "b.png"))
    train = write_rows(folder / "x.jsonl", [same, asked("?", "B"), also, asked("<image>!", "A", ("a.png",))])
    eval_entry = write_rows(folder / "y.jsonl", [other, same, asked("<image>new", "A", ("copy.png",))])
    findings = checked(folder, [train], eval=[eval_entry])
    repeats = findings.repeats
    assert repeats.copies == 1
    assert [(group.times, group.rows) for group in repeats.copy_groups] == [(2, {train["path"]: [0, 2]})]
    assert repeats.leaked == 1 and repeats.leaked_images == 2
    assert repeats.leaked_groups[0].rows == {train["path"]: [0, 2], eval_entry["path"]: [1]}
    assert (repeats.images, repeats.repeated_images) == (2, 1) and repeats.repeated_groups[0].times == 5
    line = "1 of 2 distinct images is used more than once"
    assert f"{line} with the same prompt" in [*check_tables(findings.record())]
    assert f"{line}, 1 of them with the same prompt." in (folder / "check" / "check.html").read_text()


def test_images_that_are_asked_different_questions_are_no_line(folder):
    rows = [asked(f"<image>{question}?", "A", ("a.png",)) for question in "xyz"]
    findings = checked(folder, [write_rows(folder / "x.jsonl", rows)])
    assert (findings.repeats.repeated_images, findings.repeats.images_asked_again) == (1, 0)
    assert not [line for line in check_tables(findings.record()) if "more than once" in str(line)]
    assert (
        "more than once, none of them with the same prompt." in (folder / "check" / "check.html").read_text()
    )


def test_rows_held_out_by_eval_fraction_are_counted_apart_and_none_leaks(folder):
    rows = [asked(f"<image>{i}?", "A", (("a.png", "b.png")[i % 2],)) for i in range(10)]
    findings = checked(folder, [write_rows(folder / "x.jsonl", rows)], eval_fraction=0.5)
    train, evaluation = findings.parts
    assert (train.split, evaluation.split) == ("train", "held out")
    assert train.rows == evaluation.rows == 5 and findings.repeats.leaked_images == 0


@pytest.mark.parametrize("policy", ["drop_sample", "drop_turns", "truncate_text"])
def test_each_policy_removes_what_it_removes_in_training(folder, policy):
    dialogues = [{"messages": asked("<image>Tell me.", "Words.")["messages"] * 4, "images": ["a.png"] * 4}]
    rows = [asked("?", "A"), asked("long " * 100, "A"), asked("?", "long " * 100), *dialogues]
    entry = write_rows(folder / "x.jsonl", rows)
    findings = checked(folder, [entry], max_text_tokens=60, too_long=policy)
    config = recipe(folder, [entry]).data
    source = open_source(config.train[0], config)
    samples = [source.sample(i, raw) for i, raw in enumerate(source.stream())]
    outcomes = [encode_within(nano_processor(), sample, 60, policy) for sample in samples]
    dropped = [one for one in outcomes if isinstance(one, Dropped)]
    kept = [one for one in outcomes if not isinstance(one, Dropped)]
    assert findings.too_long.samples == 3 and findings.bad == 0
    assert findings.parts[0].dropped == findings.too_long.policies[policy]["samples"] == len(dropped)
    assert findings.parts[0].images == sum(one.images for one in kept)
    assert findings.parts[0].text_tokens == sum(len(one.input_ids) for one in kept)
    whole = sum(len(encode_within(nano_processor(), sample, 10**6).input_ids) for sample in samples)
    assert findings.too_long.policies[policy]["tokens"] == whole - findings.parts[0].text_tokens


# --- the run of a check ---


def test_the_record_is_the_same_for_any_number_of_workers(folder):
    rows = [asked(f"<image>{i}?", "A", (("a.png", "cut.png", "b.png")[i % 3],)) for i in range(50)]
    entries = [write_rows(folder / "x.jsonl", rows), FIXTURES["parquet_streamed"](folder)]
    records = [checked(folder, entries, workers=workers).record() for workers in (0, 2)]
    assert records[0] == records[1] and records[0]["bad"] == 17
    assert json.loads((folder / "check" / "check.json").read_text()) == records[1]


def test_a_check_needs_no_weights(folder):
    backbones = {  # neither has weights on this machine
        "vision": {"name": "ViT-B-32", "pretrained": "openai"},
        "language": {"name": language_without_weights(folder / "language")},
    }
    rows = write_rows(folder / "x.jsonl", [asked("<image>?", "A", ("a.png",))])
    values = recipe(folder, [rows]).model_dump() | {"model": backbones}
    assert check_data(Recipe.model_validate(values), "test", folder / "check").objection is None


def test_only_an_earlier_check_is_replaced(folder):
    entry = write_rows(folder / "x.jsonl", [asked("?", "A")])
    (folder / "check").mkdir()
    (folder / "check" / "mine.txt").write_text("mine")
    with pytest.raises(
        UserError, match="holds files but no earlier check; choose another folder: --out FOLDER"
    ):
        checked(folder, [entry])
    assert [path.name for path in (folder / "check").iterdir()] == ["mine.txt"]
    (folder / "check" / "mine.txt").unlink()
    checked(folder, [entry])
    (folder / "check" / "mine.txt").write_text("mine")
    write_rows(folder / "x.jsonl", [asked("?", "A"), asked("?", "")])
    assert checked(folder, [entry]).bad == 1
    assert json.loads((folder / "check" / "check.json").read_text())["bad"] == 1
    assert (folder / "check" / "mine.txt").read_text() == "mine"


def test_a_check_that_fails_leaves_nothing_behind(folder):
    before = {*folder.iterdir()}
    with pytest.raises(UserError, match="no such data file"):
        checked(folder, [{"path": str(folder / "gone.jsonl")}])
    assert {*folder.iterdir()} == before


# --- the command ---


RECIPE = """\
model: {vision: {name: nano}, language: {name: nano}}
data: {train: [{path: x.jsonl}]}
train: {output_dir: run, max_steps: 1, num_workers: 0}
"""


@pytest.fixture
def here(folder, monkeypatch):
    (folder / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


def test_checks_of_the_recipes_of_two_runs_are_kept_apart(here):
    write_rows(here / "x.jsonl", [asked("?", "A")])
    for run in ("a", "b"):
        (here / "runs" / run).mkdir(parents=True)
        (here / "runs" / run / "resolved_recipe.yaml").write_text(
            RECIPE.replace("x.jsonl", str(here / "x.jsonl"))
        )
        assert cli.main(["check", f"runs/{run}/resolved_recipe.yaml"]) == 0
    folders = [path.name for path in (here / "runs").glob("check_*")]
    assert sorted(folders) == ["check_a_resolved_recipe", "check_b_resolved_recipe"]


def test_the_exit_code_is_0_for_good_data_and_2_for_bad_data_with_all_problems(here, capsys):
    write_rows(here / "x.jsonl", [asked("?", "A")])
    assert cli.main(["check", "mine.yaml"]) == 0
    output = capsys.readouterr()
    assert "error" not in output.err and Path("runs/check_mine/check.html").is_file()
    write_rows(here / "x.jsonl", [asked("?", "A"), *[asked("?", "")] * 25])
    assert cli.main(["check", "mine.yaml", "--out", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4] == (
        f"error: {here}/x.jsonl: rows 1, 2, 3 and 17 more: messages[1].content: "
        "empty; write text or an image, or remove the turn"
    )
    assert lines[-3:] == [
        "error: and 5 more problems",
        "rows are numbered from 0; blank lines and table headers do not count",
        "error: got 25 bad rows; fix or remove them, or set data.on_bad_sample to skip",
    ]
    page = Path("out/check.html").read_text()
    assert all(f'<td class="n">{row}</td>' in page for row in range(1, 26))
    assert len(Path("out/problems.jsonl").read_text().splitlines()) == 25


def test_skipped_rows_are_listed_and_allowed_up_to_max_bad_share(here, capsys):
    write_rows(here / "x.jsonl", [*[asked("?", "A")] * 3, asked("?", "")])
    skip = ["check", "mine.yaml", "data.on_bad_sample=skip"]
    assert cli.main([*skip, "data.max_bad_share=0.25"]) == 0
    assert f"skipped: {here}/x.jsonl: row 3" in capsys.readouterr().err
    assert cli.main([*skip, "data.max_bad_share=0.24"]) == 2
    assert "got 25.0 % bad training rows, the limit is 24.0 %" in capsys.readouterr().err


def test_json_output_equals_check_json(here, capsys):
    write_rows(here / "x.jsonl", [asked("?", "A"), asked("?", "")])
    assert cli.main(["check", "mine.yaml", "--json"]) == 2
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(Path("runs/check_mine/check.json").read_text())
    assert not record["usable"] and record["parts"][0]["rows"] == 2
