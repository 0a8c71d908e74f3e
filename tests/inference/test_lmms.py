"""lmms-eval's requests get the answers and scores of a Predictor.

By default lmms-eval is its recorded interface (`lmms_eval_interface`). The slow tests need the package:

    pip install lmms-eval==0.7.3 'filelock<4'
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flamingo_ft import Predictor
from flamingo_ft.data.sample import Video
from flamingo_ft.errors import UserError
from flamingo_ft.inference.decoding import Decoding
from flamingo_ft.inference.lmms import MODEL_ID, manifest
from flamingo_ft.inference.lmms.requests import chat_prompt, decoding_options, simple_prompt
from flamingo_ft.inference.prompts import Prompt
from tests.data.dialogues import IMAGE, user

from . import lmms_eval_interface

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "lmms_tasks"
MODELS = "flamingo_ft.inference.lmms.models"
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "top_p": None, "until": ["\n\n"]}
CHOICES = ("Seven.", "Two.", "It is a two.")

installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)


@pytest.fixture(scope="module")
def models():
    """The plug-in's module, imported with the recorded interface."""
    with pytest.MonkeyPatch.context() as patch:
        lmms_eval_interface.install(patch)
        patch.delitem(sys.modules, MODELS, raising=False)
        yield importlib.import_module(MODELS)
    sys.modules.pop(MODELS, None)  # the installed package would not accept these classes


@pytest.fixture(scope="module")
def docs(folders):
    """Rows of a task's data, as `datasets` decodes them."""
    images = [Image.open(path) for path in folders[1]]
    return [
        {"question": "Which digit is this?", "images": images[:1], "answer": "Seven."},
        {"question": "Say seven.", "images": [], "answer": "Two."},
        {"question": "Which digits are these?", "images": images, "answer": "Two."},
    ]


@pytest.fixture(scope="module")
def evaluated(models, docs, folders):
    """Both classes with the same model, and the task's data where lmms-eval puts it."""
    arguments = {"pretrained": str(folders[0] / "adapter"), "batch_size": "2", "max_new_tokens": 12}
    loaded = models.ChatFlamingo(**arguments), models.SimpleFlamingo(**arguments)
    for model in loaded:
        model.task_dict["digits"] = {"test": docs}
    return SimpleNamespace(chat=loaded[0], simple=loaded[1])


@pytest.fixture(scope="module")
def predictor(folders):
    return Predictor.from_pretrained(folders[0] / "adapter")


def messages(doc):
    images = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": doc["question"]}]}]


def visuals(doc):
    return doc["images"]


def request(*args):
    return SimpleNamespace(args=args)


def chat_request(number, options=GREEDY, doc_to_messages=messages):
    return request("", doc_to_messages, dict(options), number, "digits", "test")


def prompt_of(doc):
    return Prompt([user(*[IMAGE] * len(doc["images"]), doc["question"])], doc["images"])


def answers_of(predictor, docs, **options):
    return predictor.answer([prompt_of(doc) for doc in docs], **options)


# --- registration ---


def test_the_entry_point_names_the_manifest_and_lmms_eval_is_not_imported_before_it_asks(monkeypatch):
    section = rf'\[project.entry-points."lmms_eval.models"\]\n{MODEL_ID} = "(.+):(.+)"'
    module, function = re.search(section, (ROOT / "pyproject.toml").read_text(encoding="utf-8")).groups()
    for name in lmms_eval_interface.MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, module)
    manifest = getattr(importlib.import_module(module), function)
    with pytest.raises(ImportError):
        manifest()


def test_each_class_is_registered_as_what_it_is(models):
    registered = manifest()
    assert registered.model_id == MODEL_ID
    for path, is_simple in ((registered.chat_class_path, False), (registered.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        assert module == MODELS
        model_class = getattr(models, name)
        assert issubclass(model_class, lmms_eval_interface.lmms) and not inspect.isabstract(model_class)
        assert model_class.is_simple is is_simple


# --- answers ---


def test_chat_messages_get_the_predictors_answers_in_their_order(evaluated, predictor, docs):
    rows = [2, 0, 1, 0, 2, 1, 1, 0, 0]  # more than one window
    answers = evaluated.chat.generate_until([chat_request(row) for row in rows])
    expected = answers_of(predictor, docs, max_new_tokens=8, stop_strings=("\n\n",))
    assert answers == [expected[row] for row in rows]
    assert len(set(answers)) == 3


def test_a_text_with_images_gets_the_predictors_answer(evaluated, predictor, docs):
    requests = [request(doc["question"], GREEDY, visuals, n, "digits", "test") for n, doc in enumerate(docs)]
    expected = answers_of(predictor, docs, max_new_tokens=8)
    assert evaluated.simple.generate_until(requests) == expected
    marked = request("A: <image> B: <image>?", GREEDY, visuals, 2, "digits", "test")
    (answer,) = evaluated.simple.generate_until([marked])
    assert answer == predictor(docs[2]["images"], "A: <image> B: <image>?", max_new_tokens=8)


def test_requests_are_decoded_as_their_tasks_ask(evaluated, predictor, docs):
    options = ({"max_new_tokens": 4}, {"num_beams": 3, "max_new_tokens": 8}, {"max_new_tokens": 4096})
    answers = evaluated.chat.generate_until([chat_request(0, given) for given in options])
    decodings = ({"max_new_tokens": 4}, {"num_beams": 3, "max_new_tokens": 8}, {"max_new_tokens": 12})
    assert answers == [answers_of(predictor, docs[:1], **decoding)[0] for decoding in decodings]


def test_an_option_without_effect_is_logged_once(evaluated, caplog):
    requests = [chat_request(number, {**GREEDY, "image_aspect_ratio": "original"}) for number in (0, 1)]
    evaluated.chat.generate_until(requests)
    assert [record.getMessage() for record in caplog.records] == [
        "generation_kwargs: image_aspect_ratio has no effect on this model"
    ]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": 0, "do_sample": False}, {}),
        ({"temperature": 1.0, "top_p": 0.9, "do_sample": False}, {}),
        ({"temperature": 0.7, "top_p": None}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_p": 0}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {}),
        ({"num_beams": 1, "length_penalty": 0.0}, {"num_beams": 1}),
        ({"num_beams": 3, "length_penalty": 0.0}, {"num_beams": 3, "length_penalty": 0.0}),
        ({"until": "Q:"}, {"stop_strings": ("Q:",)}),
        ({"until": ["Q:", ""]}, {"stop_strings": ("Q:",)}),
        ({"max_new_tokens": 4, "image_aspect_ratio": "pad"}, {"max_new_tokens": 4}),
    ],
)
def test_generation_options_become_those_of_decoding(given, options):
    read = decoding_options(given, None)
    assert read == {"stop_strings": (), **options}
    Decoding(**read)


@pytest.mark.parametrize(("task", "longest", "length"), [(4, None, 4), (4, 8, 4), (9, 8, 8), (None, 8, 8)])
def test_the_shorter_limit_of_task_and_model_applies(task, longest, length):
    assert decoding_options({"max_new_tokens": task}, longest)["max_new_tokens"] == length


# --- log-likelihoods ---


def test_the_loss_of_the_likeliest_choice_is_the_smallest(evaluated, predictor, docs):
    requests = [
        request(doc["question"], f" {choice}", visuals, number, "digits", "test")
        for number, doc in enumerate(docs)
        for choice in CHOICES
    ]
    results = [result.text for result in evaluated.simple.loglikelihood(requests)]
    ranks = predictor.rank([prompt_of(doc) for doc in docs], CHOICES, per_token=True)
    assert [loss for loss, _ in results] == pytest.approx((-ranks).flatten().tolist(), abs=1e-5)
    assert {type(is_greedy) for _, is_greedy in results} == {bool}


def test_an_answer_may_be_read_from_the_row(evaluated):
    def answer(doc):
        return doc["answer"]

    named, read = (
        evaluated.simple.loglikelihood([request("Say seven.", target, visuals, 1, "digits", "test")])
        for target in ("Two.", answer)
    )
    assert named == read


# --- rounds ---


def next_round(doc, round_idx, previous_output, previous_round_info):
    """A task's next question after the answers so far; the third round is the last."""
    assert len(previous_output) == round_idx
    assert previous_round_info == (None if round_idx == 1 else f"state {round_idx - 1}")
    text = f"You said {previous_output[-1]} Why?"
    return doc["images"], text, round_idx == 3, previous_output, f"state {round_idx}"


def expected_rounds(predictor, doc):
    answers = [answers_of(predictor, [doc], max_new_tokens=8)[0]]
    for _ in range(2):
        question = {**doc, "question": f"You said {answers[-1]} Why?"}
        answers += answers_of(predictor, [question], max_new_tokens=8)
    return answers


def test_each_round_of_a_text_asks_what_the_task_makes_of_the_answers(evaluated, predictor, docs):
    args = (docs[0]["question"], GREEDY, visuals, next_round, 0, "digits", "test")
    assert evaluated.simple.generate_until_multi_round([request(*args)]) == [
        expected_rounds(predictor, docs[0])
    ]


def test_each_round_of_messages_asks_what_the_task_makes_of_the_answers(evaluated, predictor, docs):
    def doc_to_messages(doc, **state):
        if not state:
            return messages(doc)
        images, text, is_over, answers, info = next_round(doc, **state)
        turns = None if is_over else messages({"images": images, "question": text})
        return turns, is_over, answers, info

    asked = chat_request(0, doc_to_messages=doc_to_messages)
    assert evaluated.chat.generate_until_multi_round([asked]) == [expected_rounds(predictor, docs[0])]


def test_a_task_that_does_not_follow_the_protocol_of_rounds_is_refused(evaluated):
    message = "digits, test, row 1: a further round must be a tuple of {} values, got str; choose a task"
    args = ("Say seven.", GREEDY, visuals, lambda doc, **state: "And now?", 1, "digits", "test")
    with pytest.raises(UserError, match=message.format(5)):
        evaluated.simple.generate_until_multi_round([request(*args)])
    asked = chat_request(1, doc_to_messages=lambda doc, **state: "And now?" if state else messages(doc))
    with pytest.raises(UserError, match=message.format(4)):
        evaluated.chat.generate_until_multi_round([asked])


# --- media, and what is refused ---


def test_a_video_file_is_passed_on_as_one():
    content = [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "What moves?"}]
    chat = lmms_eval_interface.ChatMessages(messages=[{"role": "user", "content": content}])
    prompts = chat_prompt(chat.messages, "here"), simple_prompt("What moves?", ["a.mp4"], "here")
    assert all(
        prompt == Prompt([user(IMAGE, "What moves?")], [Video(file="a.mp4")], "here") for prompt in prompts
    )
    assert simple_prompt("What?", ["a.PNG"], "here").images == ["a.PNG"]


def test_a_video_that_cannot_be_read_is_reported_with_its_row(evaluated, tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    asked = request("What moves?", GREEDY, lambda doc: [str(tmp_path / "a.mp4")], 1, "digits", "test")
    with pytest.raises(UserError, match=r"digits, test, row 1: .*a\.mp4: not a readable video"):
        evaluated.simple.generate_until([asked])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "here: got audio, which the model cannot take"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "here: got a part of a video"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 1}}, "here: got a part of a video"),
    ],
)
def test_media_that_the_model_cannot_take_are_refused(content, message):
    chat = lmms_eval_interface.ChatMessages(messages=[{"role": "user", "content": [content]}])
    with pytest.raises(UserError, match=message):
        chat_prompt(chat.messages, "here")


def test_a_text_whose_markers_and_images_differ_is_refused(docs):
    with pytest.raises(UserError, match="here: prompt: got 1 <image> marker and 2 images"):
        simple_prompt("<image>?", docs[2]["images"], "here")
    with pytest.raises(UserError, match="here: got audio"):
        simple_prompt("What?", [{"array": [], "sampling_rate": 16000}], "here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size: must be a number of at least 1, got auto; set --batch_size 8"),
        ({"batch_size": 0}, "batch_size: must be a number of at least 1, got 0"),
        ({"quantization": "nf5"}, "quantization: must be one of none, int8, nf4, fp4, got nf5"),
        ({"device": "tpu"}, "device: the model is on cpu, got tpu; choose the GPU"),
    ],
)
def test_wrong_model_arguments_are_refused(models, folders, arguments, message):
    with pytest.raises(UserError, match=message):
        models.ChatFlamingo(pretrained=str(folders[0] / "adapter"), **arguments)


def test_the_model_is_freed_when_lmms_eval_is_done_with_it(models, folders):
    model = models.SimpleFlamingo(pretrained=str(folders[0] / "adapter"))
    model.clean()
    assert not hasattr(model, "predictor")


# --- the installed package ---


@installed
@pytest.mark.slow
def test_the_recorded_interface_is_that_of_the_installed_package():
    assert importlib.metadata.version("lmms_eval") == lmms_eval_interface.VERSION
    for path, members in lmms_eval_interface.MODULES.items():
        module = importlib.import_module(path)
        for member in members:
            real = getattr(module, member.__name__)
            for attribute in ("__abstractmethods__", "__match_args__"):
                assert getattr(real, attribute, None) == getattr(member, attribute, None)
            if hasattr(member, "model_fields"):
                assert set(member.model_fields) == set(real.model_fields)


def samples_of(task, folder, *options):
    """Run a task with lmms-eval's command line and return what it logged of each row."""
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        MODEL_ID,
        "--tasks",
        task,
        "--include_path",
        str(TASKS),
    ]
    result = subprocess.run(
        [*command, "--output_path", str(folder / task), "--log_samples", *options],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (file,) = (folder / task).rglob(f"*samples_{task}.jsonl")
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return sorted(rows, key=lambda row: row["doc_id"])


@installed
@pytest.mark.slow
def test_lmms_eval_itself_gets_the_answers_and_choices_of_a_predictor(predictor, docs, folders, tmp_path):
    rows = [{**doc, "images": [str(path) for path in folders[1]][: len(doc["images"])]} for doc in docs]
    lines = (json.dumps({**row, "choices": CHOICES}) for row in rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = ("--model_args", f"pretrained={folders[0] / 'adapter'}", "--batch_size", "2")
    answered = samples_of("digits", tmp_path, *model)
    assert [row["filtered_resps"] for row in answered] == answers_of(predictor, docs, max_new_tokens=8)
    chosen = samples_of("digit_choice", tmp_path, *model, "--force_simple")
    ranks = predictor.rank([prompt_of(doc) for doc in docs], CHOICES, per_token=True)
    losses = [[float(loss) for loss, _ in row["filtered_resps"]] for row in chosen]
    torch.testing.assert_close(torch.tensor(losses), -ranks, rtol=0, atol=1e-5)
    right = [CHOICES[place] == doc["answer"] for place, doc in zip(ranks.argmax(-1), docs, strict=True)]
    assert [row["acc"] == 1.0 for row in chosen] == right
