"""The demo's page, over its own client: ask with an image, read the answer, see where it looks."""

import json

import pytest
from PIL import Image

from flamingo_ft.errors import UserError
from flamingo_ft.inference import demo
from flamingo_ft.inference.predictor import Predictor

from .conftest import PROMPT

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def predictor(folders):
    return Predictor.from_pretrained(folders[0] / "adapter", max_new_tokens=6)


@pytest.fixture(scope="module")
def client(predictor, folders):
    from flamingo_ft.adapters.switched_off import base_bridge
    from flamingo_ft.inference.demo.page import build_page

    bridge = base_bridge(folders[0] / "adapter", predictor.model)
    page = build_page(predictor, "digits", [{"text": PROMPT, "files": [str(folders[1][0])]}], bridge)
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield gradio_client.Client(page.local_url, verbose=False)
    page.close()


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def ask(client, text, *images):
    files = [gradio_client.handle_file(str(image)) for image in images]
    return client.predict({"text": text, "files": files}, api_name="/ask")


def test_a_question_is_answered_with_and_without_the_adapter(client, predictor, folders):
    client.predict(api_name="/clear")
    ask(client, PROMPT, folders[1][0])
    chat, without = client.predict(True, api_name="/answer")
    assert text_of(chat[-1]) == predictor(folders[1][0], PROMPT)
    assert without[-1]["role"] == "assistant" and text_of(without[-1]) != text_of(chat[-1])
    ask(client, "And now?")
    chat, _ = client.predict(False, api_name="/answer")
    assert [message["role"] for message in chat][-2:] == ["user", "assistant"] and len(chat) == 5


def test_the_page_shows_where_an_answer_looks(client, predictor, folders):
    client.predict(api_name="/clear")
    ask(client, PROMPT, folders[1][0])
    client.predict(False, api_name="/answer")
    layers, picture = client.predict(True, api_name="/look")
    assert picture["type"] == "matplotlib" and picture["plot"].startswith("data:image/")
    blocks = [block for block in predictor.model.gated_cross_attn_layers if block is not None]
    assert len(layers["choices"]) == 1 + len(blocks)
    drawn = client.predict(layers["choices"][1][1], api_name="/draw")
    assert drawn["plot"].startswith("data:image/") and drawn["plot"] != picture["plot"]


def test_a_mistake_is_shown_and_ends_nothing(client, folders, tmp_path):
    client.predict(api_name="/clear")
    with pytest.raises(Exception, match="ask something, or add an image"):
        ask(client, "  ")
    with pytest.raises(Exception, match="shorten the prompt"):
        ask(client, "seven " * 3000)
    ask(client, PROMPT, folders[1][0])
    chat, _ = client.predict(False, api_name="/answer")
    assert [message["role"] for message in chat] == ["user", "user", "assistant"]


def test_examples_are_held_out_questions_of_different_tasks_first(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"task": task, "question": f"{task} {number}", "images": [str(tmp_path / image)]}
        for number, (task, image) in enumerate(
            [("a", "a.png"), ("a", "a.png"), ("b", "gone.png"), ("b", "a.png")]
        )
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example["text"] for example in demo.examples_of(tmp_path)] == ["a 0", "b 3", "a 1"]
    assert demo.examples_of(tmp_path / "none") == []


def test_without_gradio_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'demo: Gradio is not installed; run: pip install "flamingo_ft\[demo\]"'
    ):
        demo.demo("run", "localhost", 7860)
