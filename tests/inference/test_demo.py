"""The demo's page over Gradio's own client: ask with an image, read the answer, see where it looks."""

import inspect
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from flamingo_ft.adapters.switched_off import switched_off
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.data.media import preview
from flamingo_ft.errors import UserError
from flamingo_ft.inference import demo
from flamingo_ft.inference.conversation import Conversation
from flamingo_ft.inference.demo.examples import examples_of
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import build_flamingo

from .conftest import PROMPT

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from flamingo_ft.inference.demo.dialogue import Turn, prompt_of  # noqa: E402
from flamingo_ft.inference.demo.events import OPTIONS, Events  # noqa: E402
from flamingo_ft.inference.demo.page import build_page  # noqa: E402
from flamingo_ft.inference.demo.serving import FOLDER_VARIABLE, private_folder  # noqa: E402
from flamingo_ft.inference.demo.switchable_model import SwitchableModel  # noqa: E402


@pytest.fixture
def client(demo_page):
    """A visitor with a dialogue of its own."""
    return gradio_client.Client(demo_page.url, verbose=False)


def ask(client, text, *images, compare=False, **options):
    """Ask, and return the last state of both chats."""
    files = [gradio_client.handle_file(str(image)) for image in images]
    values = [str(options.get(name, "")) for name in OPTIONS]
    client.predict({"text": text, "files": files}, compare, *values, api_name="/ask")
    return client.predict(*values, api_name="/answer")


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def roles_of(chat):
    return [message["role"] for message in chat]


def base_answer(demo_page, image):
    with switched_off(demo_page.predictor.model, demo_page.bridge):
        return demo_page.predictor(image, PROMPT)


def test_a_question_is_answered_with_and_without_the_adapter(client, demo_page):
    image = demo_page.images[0]
    chat, base_chat = ask(client, PROMPT, image, compare=True)
    assert text_of(chat[-1]) == demo_page.predictor(image, PROMPT)
    assert text_of(base_chat[-1]) == base_answer(demo_page, image) != text_of(chat[-1])
    assert roles_of(chat)[-2:] == roles_of(base_chat)[-2:] == ["user", "assistant"]


def test_answers_are_streamed_and_end_whole(client, demo_page):
    image, values = demo_page.images[0], [""] * len(OPTIONS)
    question = {"text": PROMPT, "files": [gradio_client.handle_file(str(image))]}
    client.predict(question, False, *values, api_name="/ask")
    job = client.submit(*values, api_name="/answer")
    job.result()
    states = [text_of(chat[-1]) for chat, _ in job.outputs()]
    assert len(set(states)) > 2 and states[-1] == demo_page.predictor(image, PROMPT)
    assert all(later.startswith(earlier) for earlier, later in zip(states, states[1:], strict=False))


@pytest.mark.slow
def test_a_second_question_continues_the_dialogue(client, demo_page):
    first, second = demo_page.images
    conversation = Conversation(demo_page.predictor)
    expected = [conversation.ask(PROMPT, first), conversation.ask(PROMPT, second)]
    ask(client, PROMPT, first)
    chat, base_chat = ask(client, PROMPT, second)
    assert [text_of(m) for m in chat if m["role"] == "assistant"] == expected
    assert base_chat == []


def test_without_the_adapter_the_same_dialogue_is_answered(demo_page):
    model = demo_page.model
    turns = (Turn(PROMPT, (str(demo_page.images[0]),)),)
    *_, answer = model.stream(prompt_of(turns), model.predictor.decoding)
    turns = (Turn(PROMPT, (str(demo_page.images[0]),), answer=answer), Turn("And now?", is_compared=True))
    *_, base = model.stream(prompt_of(turns), model.predictor.decoding, adapter=False)
    with switched_off(model.predictor.model, demo_page.bridge):
        assert base.text == model.predictor.answer([prompt_of(turns)])[0]


@pytest.mark.slow
def test_an_image_without_a_question_is_captioned(client, demo_page):
    chat, _ = ask(client, "", demo_page.images[0])
    assert text_of(chat[-1]) == demo_page.predictor(demo_page.images[0])


@pytest.mark.slow
def test_several_images_stand_where_the_question_marks_them(client, demo_page):
    text = "First <image> then <image>. Name both."
    chat, _ = ask(client, text, *demo_page.images)
    assert text_of(chat[-1]) == demo_page.predictor(demo_page.images, text)
    with pytest.raises(Exception, match="2 .*markers and 1 image"):
        ask(client, text, demo_page.images[0])


@pytest.mark.slow
def test_decoding_options_have_the_names_and_effects_of_transformers(client, demo_page):
    options = {"max_new_tokens": 4, "temperature": 1.5, "seed": 3}
    chat, _ = ask(client, PROMPT, demo_page.images[0], **options)
    assert text_of(chat[-1]) == demo_page.predictor(demo_page.images[0], PROMPT, **options)
    assert set(OPTIONS) <= set(inspect.signature(demo_page.predictor.decoding.__class__).parameters)
    with pytest.raises(Exception, match="top_p: must be above 0 and at most 1, got 3"):
        ask(client, PROMPT, top_p=3)


def test_the_page_shows_where_an_answer_looks(client, demo_page):
    ask(client, PROMPT, demo_page.images[0])
    expected = demo_page.predictor.look(demo_page.images[0], PROMPT)
    tokens, picture = client.predict(True, -1, api_name="/look")
    assert [index for _, index in tokens["choices"]] == [-1, *range(len(expected.tokens))]
    drawn = [picture["plot"]]
    for token, layer in ((0, -1), (-1, expected.layers[-1]), (0, expected.layers[-1])):
        drawn.append(client.predict(token, layer, api_name="/draw")["plot"])
    assert all(plot.startswith("data:image/") for plot in drawn) and len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("depth, words", [(1, "images, through the perceiver."), (0, "of the images.")])
def test_the_page_names_the_perceiver_of_a_model_that_has_one(depth, words):
    small = {"heads": 2, "dim_head": 8}
    flamingo = build_flamingo(
        load_vision("nano"), load_language("nano"), perceiver={"depth": depth, **small}, cross_attention=small
    )
    page = build_page(SwitchableModel(Predictor(*flamingo)), "any")
    (info,) = (
        component["props"]["info"]
        for component in page.get_config_file()["components"]
        if component["props"].get("elem_id") == "show-look"
    )
    assert words in info


def test_the_answer_that_is_looked_at_is_the_one_that_was_sampled(demo_page):
    turns = (Turn(PROMPT, (str(demo_page.images[0]),)),)
    for seed in range(3):
        decoding = demo_page.predictor.decoding.updated(temperature=1.5, seed=seed)
        *_, answer = demo_page.model.stream(prompt_of(turns), decoding)
        look = demo_page.model.look(prompt_of(turns), answer)
        assert look.answer == answer.text == "".join(look.tokens).strip()


def test_errors_are_shown_in_one_line_and_leave_the_dialogue_alone(client, demo_page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(demo_page.images[0].read_bytes()[:40])
    for message, question in {
        "question: got neither a text nor an image; ask something, or add an image": ("  ",),
        "^broken.png: not a readable image .*; replace it$": (PROMPT, broken),
        "shorten the prompt": ("seven " * 3000,),
    }.items():
        with pytest.raises(Exception, match=message) as error:
            ask(client, *question)
        assert "\n" not in str(error.value)
    chat, _ = ask(client, PROMPT, demo_page.images[0])
    assert roles_of(chat) == ["user", "user", "assistant"]


def test_a_question_without_an_answer_returns_to_its_box(demo_page):
    events, answered = (
        Events(demo_page.model),
        Turn("One?", answer=SimpleNamespace(text="One.", picture=None)),
    )
    box, turns, *_ = events.settle((answered, Turn("Two?", ("a.png",))))
    assert turns == (answered,) and box.value["text"] == "Two?" and len(box.value["files"]) == 1
    assert events.settle((answered,))[1] == (answered,) and events.settle(())[1] == ()


def test_a_visitor_who_leaves_in_the_middle_leaves_the_adapter_on(demo_page):
    model, image = demo_page.model, demo_page.images[0]
    expected = model.predictor(image, PROMPT)
    decoding = model.predictor.decoding.updated(max_new_tokens=200)
    answer = model.stream(prompt_of((Turn(PROMPT, (str(image),)),)), decoding, adapter=False)
    next(answer)
    answer.close()
    assert model.predictor(image, PROMPT) == expected


def test_each_page_keeps_its_files_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with private_folder() as first, private_folder() as second:
        assert first != second and Path(os.environ[FOLDER_VARIABLE]) == second
    assert os.environ[FOLDER_VARIABLE] == str(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [False, True])
def test_the_page_is_public_only_if_asked_for(folders, monkeypatch, share, capsys):
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.update(options))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)
    demo.demo(str(folders[0] / "merged"), "localhost", 7860, share=share)
    assert launched["share"] is share and launched["server_name"] == "localhost"
    assert "the page is at" in capsys.readouterr().out


def test_examples_are_held_out_questions_of_different_tasks_first(tmp_path):
    image, gone = str(tmp_path / "a.png"), str(tmp_path / "gone.png")
    Image.new("RGB", (8, 8)).save(image)
    rows = [
        {"task": "a", "question": "<image>a 0", "images": [image]},
        {"task": "a", "question": "a <image> 1", "images": [image]},
        {"task": "b", "question": "b 2", "images": [gone]},
        {"task": "b", "question": "<image><image>b 3", "images": [image, image]},
        {"task": "c", "question": "<image>not of this turn alone", "images": [image, image]},
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = examples_of(tmp_path, tmp_path)
    assert [example["text"] for example in examples] == ["a 0", "b 3", "a <image> 1"]
    assert examples[1]["files"] == [image, image]
    assert examples_of(tmp_path / "none", tmp_path) == []


def test_an_example_whose_image_has_no_file_shows_the_preview_of_the_run(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    row = {"task": "a", "question": "<image>", "images": [preview(buffer.getvalue())]}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row))
    (example,) = examples_of(tmp_path, tmp_path)
    assert example["text"] == "" and Image.open(example["files"][0]).getpixel((0, 0)) == (255, 0, 0)


def test_without_gradio_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'demo: Gradio is not installed; run: pip install "flamingo_ft\[demo\]"'
    ):
        demo.demo("run", "localhost", 7860)
