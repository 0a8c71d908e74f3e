"""A prompt unlike all training samples is answered with one line of warning; other prompts without any."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flamingo_ft import Predictor, cli, train
from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.files import read_config
from flamingo_ft.adapters.trained_on import generate_options, joined_record, never_trained, record_of_samples
from flamingo_ft.data import Sample
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.evaluation.evaluate import evaluate_adapter
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.inference.conversation import Conversation
from flamingo_ft.inference.prompts import make_prompt
from tests.data.dialogues import IMAGE, assistant, user
from tests.regimes import LORA, NOTHING_WHOLE, recipe, write_run

STORED = Path(__file__).parents[1] / "stored" / "adapter"
QUESTION = Sample([user(IMAGE, "Which?"), assistant("A heron.")], ["a.png"], "birds", "row 0")
TEXT = Sample([user("Which?"), assistant("A heron.")], [], "birds", "row 1")
CAPTION = Sample([{"role": DOCUMENT, "content": [{"type": "image"}]}], ["a.png"], "birds", "row 2")
UNCAPTIONED = Sample([user(IMAGE), assistant("A heron.")], ["a.png"], "birds", "row 3")


def lines(samples, images, text):
    prompt = make_prompt(images, text)
    return list(never_trained(record_of_samples(samples), prompt.messages, len(prompt.images)))


@pytest.mark.parametrize(
    "samples, images, text, expected",
    [
        ([QUESTION], [], "Which?", "got no image, but none of 1 training sample looked at was without one"),
        (
            [QUESTION] * 2,
            ["a"] * 2,
            "Which?",
            "got 2 images, but none of 2 training samples looked at had more than 1",
        ),
        ([QUESTION], ["a"], None, "got no question, but none of 1 training sample looked at was without one"),
        ([CAPTION], ["a"], "Which?", "got a question, but none of 1 training sample looked at had one"),
        ([UNCAPTIONED], ["a"], "Which?", "got a question, but none of 1 training sample looked at had one"),
        ([QUESTION, TEXT], [], "Which?", None),
        ([QUESTION, CAPTION], ["a"], "Which?", None),
        ([QUESTION, CAPTION], ["a"], None, None),
        ([QUESTION], ["a"], "Where?", None),
        ([], [], "Which?", None),
    ],
)
def test_what_no_training_sample_was_like_is_named(samples, images, text, expected):
    assert [line.partition(";")[0] for line in lines(samples, images, text)] == (
        [expected] if expected else []
    )


@pytest.mark.parametrize(
    "samples, expected",
    [
        ([QUESTION, CAPTION], "--image FILE --prompt TEXT"),
        ([CAPTION], "--image FILE"),
        ([TEXT], "--prompt TEXT"),
        ([], "--image FILE --prompt TEXT"),
    ],
)
def test_the_command_to_try_a_model_asks_as_it_was_trained(tmp_path, samples, expected):
    (tmp_path / "config.json").write_text(json.dumps({"trained_on": record_of_samples(samples)}))
    assert generate_options(tmp_path) == expected


def test_what_was_trained_before_counts_too():
    images, texts = record_of_samples([QUESTION]), record_of_samples([TEXT, CAPTION])
    both = joined_record(images, texts)
    assert both == record_of_samples([QUESTION, TEXT, CAPTION])
    assert joined_record(None, images) is joined_record(images, None) is None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a trained adapter whose samples all have one image and a question."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    train(recipe())
    return Path("run")


def test_a_run_records_its_samples_and_its_adapter_warns_once(run, caplog):
    record = {"samples": 2, "forms": ["questions"], "images": [1, 1]}
    assert read_config(run).trained_on == record
    predictor = Predictor.from_pretrained(run, max_new_tokens=2)
    predictor("0.png", "Which shade?")
    predictor.answer(questions_of([TEXT]))  # an evaluation
    assert caplog.messages == []
    predictor([], "Which shade?")
    assert [*predictor.stream([], "Which shade?")] and Conversation(predictor).ask("Hello?") is not None
    assert caplog.messages == [
        "prompt: got no image, but none of 2 training samples looked at was without one; add an image"
    ]


def test_generate_prints_the_warning_as_one_line_apart_from_the_answer(run, capsys, caplog):
    predictor = Predictor.from_pretrained(run, max_new_tokens=2)
    expected = predictor([], "Which shade?")
    assert cli.main(["generate", "run", "--prompt", "Which shade?", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert printed.err.splitlines()[-1] == f"warning: {caplog.messages[0]}"


def test_an_evaluation_of_other_data_names_what_no_training_sample_was_like(run):
    Path("captions.jsonl").write_text('{"image": "0.png", "caption": "dark"}\n')
    lines = []
    evaluate_adapter(run, "captions.jsonl", report=lines.append)
    evaluate_adapter(run, "train.jsonl", report=lines.append)
    assert lines == [
        "warning: got no question, but none of 2 training samples looked at was without one; ask one"
    ]


@pytest.mark.slow
def test_a_merged_model_and_a_run_on_top_keep_the_record(run):
    record = read_config(run).trained_on
    merge_adapter(run, "merged")
    assert json.loads(Path("merged", "config.json").read_text())["trained_on"] == record
    Path("captions.jsonl").write_text('{"image": "0.png", "caption": "dark"}\n')
    lines = []
    evaluate_adapter("merged", "captions.jsonl", report=lines.append)
    assert len(lines) == 1 and lines[0].startswith("warning: got no question")
    run.rename("start")
    rows = [{"messages": [user("Hello."), assistant("Good day.")]}]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(recipe(NOTHING_WHOLE, LORA, "model.init_from=start"))
    assert read_config(run).trained_on == {"samples": 3, "forms": ["questions"], "images": [0, 1]}


def test_an_adapter_without_a_record_says_nothing_and_keeps_none(tmp_path, caplog):
    shutil.copytree(STORED, tmp_path / "adapter")
    predictor = Predictor.from_pretrained(tmp_path / "adapter", max_new_tokens=2)
    predictor([], "Which digit is this?")
    predictor(Image.new("RGB", (32, 32)))
    assert caplog.messages == []
    save_adapter(predictor.model, predictor.processor, tmp_path / "again")
    assert read_config(tmp_path / "again").trained_on is None
