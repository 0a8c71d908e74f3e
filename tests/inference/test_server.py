"""The API through OpenAI's client: each field is honored or rejected by name; requests do not interact."""

import asyncio
import base64
import io
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from openai import APIError, BadRequestError, NotFoundError, OpenAI
from PIL import Image
from starlette.testclient import TestClient

from flamingo_ft.adapters import load_trained
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.inference.answer import answer
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.server.app import build_app
from flamingo_ft.inference.server.engine import Engine
from flamingo_ft.inference.server.messages import MediaPolicy
from flamingo_ft.inference.server.requests import GenerationRequest, Sampling
from flamingo_ft.model.images import MAX_PIXELS

from .conftest import PROMPT

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MAX_BODY = 1 << 20


@pytest.fixture(scope="module")
def served(folders):
    folder, paths = folders
    return *load_trained(folder / "adapter"), paths


@pytest.fixture(scope="module")
def engine(served):
    model, processor, _ = served
    return Engine(Predictor(model, processor), MediaPolicy(urls="none"))


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(build_app(engine, "digits", MAX_BODY), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def openai(client):
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


@pytest.fixture(scope="module")
def generated(folders):
    """The answer of `flamingo-ft generate` about the first image."""
    folder, paths = folders
    return answer(folder / "adapter", paths[:1], PROMPT)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def web(served, tmp_path):
    """The URL of a web server on this machine that has a.png."""
    (tmp_path / "a.png").write_bytes(served[2][0].read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words=PROMPT):
    return {"type": "text", "text": words}


def chat_body(path, **more):
    return {"messages": user(image(data_url(path.read_bytes())), text()), "max_tokens": 64, **more}


def rejected(client, body, route=CHAT, status=400):
    """Send a request that must be rejected, in one line that names the field; return the error object."""
    reply = client.post(route, json=body) if isinstance(body, dict) else client.post(route, content=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert error["param"] is None or error["message"].startswith(f"{error['param']}: ")
    return error


def events(client, body, route=CHAT):
    """The JSON of each server-sent event."""
    lines = client.post(route, json={**body, "stream": True}).text.splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_chat_returns_the_answer_of_generate_whole_and_streamed(openai, served, generated):
    body = chat_body(served[2][0], model="digits")
    whole = openai.chat.completions.create(**body)
    assert whole.choices[0].message.content == generated and whole.choices[0].finish_reason == "stop"
    chunks = list(openai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == generated
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])


def test_responses_return_the_answer_of_generate_whole_and_streamed(openai, served, generated):
    url = data_url(served[2][0].read_bytes())
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": PROMPT},
    ]
    whole = openai.responses.create(model="digits", input=[{"role": "user", "content": content}])
    assert whole.output_text == generated and whole.status == "completed"
    streamed = list(openai.responses.create(model="digits", input=content, stream=True))
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
    assert (
        "".join(event.delta for event in streamed if event.type == "response.output_text.delta") == generated
    )
    assert streamed[-1].type == "response.completed" and streamed[-1].response.output_text == generated
    short = openai.responses.create(model="digits", input=content, max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"


def test_completions_continue_a_text_whole_and_streamed(openai):
    whole = openai.completions.create(model="digits", prompt="Which digit", max_tokens=4)
    assert whole.usage.completion_tokens <= 4
    streamed = openai.completions.create(model="digits", prompt="Which digit", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_stop_ends_the_answer_before_the_stop_text_whole_and_streamed(client, served, generated):
    middle = len(generated) // 2
    stops = (generated[middle : middle + 3], generated[middle])
    for stop in stops:
        expected = generated[: generated.index(stop)].rstrip()
        for stop_field in (stop, ["not in the answer", stop]):
            body = chat_body(served[2][0], stop=stop_field)
            choice = client.post(CHAT, json=body).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
            *chunks, done = events(client, body)
            deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert "".join(deltas) == expected and done == "[DONE]"


def test_generation_ends_at_a_stop_text(client, served, generated):
    full = client.post(CHAT, json=chat_body(served[2][0])).json()["usage"]["completion_tokens"]
    stopped = client.post(CHAT, json=chat_body(served[2][0], stop=generated[1])).json()["usage"][
        "completion_tokens"
    ]
    assert stopped < full


def test_temperature_samples_and_a_seed_repeats_it(client, served, generated):
    def ask(**sampling):
        return client.post(CHAT, json=chat_body(served[2][0], **sampling)).json()["choices"][0]["message"][
            "content"
        ]

    assert ask(temperature=0) == ask() == generated
    assert ask(temperature=2, seed=1) == ask(temperature=2, seed=1) != generated
    assert len({ask(temperature=2) for _ in range(3)} | {generated}) > 1


def test_a_temperature_too_small_to_divide_by_is_greedy(client, served, generated):
    reply = client.post(CHAT, json=chat_body(served[2][0], temperature=1e-40))
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == generated


def test_penalties_and_biases_change_the_answer(client, served, generated):
    def ask(**options):
        return client.post(CHAT, json=chat_body(served[2][0], **options)).json()["choices"][0]["message"][
            "content"
        ]

    tokenizer = served[1].tokenizer
    token = tokenizer("x", add_special_tokens=False)["input_ids"][-1]
    assert set(ask(logit_bias={str(token): 100}, max_tokens=5)) <= set(tokenizer.decode([token]))
    assert ask(frequency_penalty=0, presence_penalty=0) == generated
    assert ask(frequency_penalty=2, presence_penalty=2) != generated


FIELDS = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": user("x")}, "messages[0].content[0]"),
    ({"messages": user({"text": "x"})}, "messages[0].content[0].type"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0].text"),
    (
        {"messages": user({"type": "video_url", "video_url": {"url": "x"}}, text())},
        "messages[0].content[0].type",
    ),
    ({"messages": user({"type": "image", "url": "x"}, text())}, "messages[0].content[0].type"),
    ({"messages": user({"type": "input_image", "file_id": "f"})}, "messages[0].content[0].file_id"),
    ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url"),
    (
        {"messages": user(image("data:image/png;base64,AA==", detail="best"))},
        "messages[0].content[0].image_url.detail",
    ),
    ({"messages": [{"role": "system", "content": [image("data:,")]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"usage": True}}, "stream_options.usage"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": "x"}, "frequency_penalty"),
    ({"logit_bias": {"word": 1}}, "logit_bias.word"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"999999999": 1}}, "logit_bias"),
    ({"max_token": 5}, "max_token"),
    ({"top_k": 5}, "top_k"),
    ({"generation_config": "{}"}, "generation_config"),
]


@pytest.mark.parametrize(("change", "field"), FIELDS)
def test_a_wrong_or_unsupported_field_is_rejected_by_name(client, change, field):
    assert rejected(client, {"messages": user(text()), **change})["param"] == field


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 2]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": "<image>What?"}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 1}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "messages": []}, "messages"),
        (RESPONSES, {}, "input"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input[0]"),
        (RESPONSES, {"input": [{"type": "reasoning", "content": []}]}, "input[0]"),
        (RESPONSES, {"input": [{"type": "input_file", "file_id": "f"}]}, "input[0].content[0].type"),
        (RESPONSES, {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        (RESPONSES, {"input": "a", "max_tokens": 5}, "max_tokens"),
        (RESPONSES, {"input": "a", "instructions": 5}, "instructions"),
        (RESPONSES, {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        (RESPONSES, {"input": "a", "truncation": "auto"}, "truncation"),
        (RESPONSES, {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text"),
        (RESPONSES, {"input": "a", "background": True}, "background"),
    ],
)
def test_the_other_routes_reject_fields_by_name(client, route, body, field):
    assert rejected(client, body, route)["param"] == field


def test_fields_without_effect_are_accepted(client):
    nothing = {
        "n": 1,
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    nothing |= {"user": "u", "metadata": {"a": "b"}, "store": False, "stop": None, "audio": None, "top_p": 1}
    before = {"role": "assistant", "content": "Five.", "refusal": None, "tool_calls": None, "annotations": []}
    dialogue = [{"role": "developer", "content": "Be brief."}, *user(text()), before, *user(text("Sure?"))]
    assert client.post(CHAT, json={"messages": dialogue, "max_tokens": 2, **nothing}).status_code == 200
    item = {"type": "message", "id": "m", "role": "assistant", "status": "completed"}
    item["content"] = [{"type": "output_text", "text": "Five.", "annotations": []}]
    body = {
        "input": [*user(text()), item, *user(text())],
        "instructions": "Be brief.",
        "max_output_tokens": 2,
    }
    assert (
        client.post(RESPONSES, json={**body, "text": {"format": {"type": "text"}}, "tools": []}).status_code
        == 200
    )


def bomb(side):
    """A small PNG file that claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def png(size=32):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        ("data:image/png;base64,", "an empty file"),
        ("data:image/svg+xml,<svg/>", "must be data:image/TYPE;base64,DATA"),
        (data_url(png()[:400]), "not a readable image"),
        (data_url(b"%PDF-1.7\n%%EOF", "application/pdf"), "not a readable image"),
        (data_url(bomb(1 + int(MAX_PIXELS**0.5))), "pixels"),
        (data_url(bomb(10 * int(MAX_PIXELS**0.5))), "pixels"),
        ("ftp://example.com/a.png", "must be a data: or http"),
        ("iVBORw0KGgo", "must be a data: or http"),
        ("https://example.com/a.png", "fetches no URLs"),
    ],
)
def test_an_image_that_cannot_be_read_is_rejected(client, url, words):
    error = rejected(client, {"messages": user(text(), image(url))})
    assert words in error["message"] and error["param"] == "messages[0].content[1].image_url"


def test_files_of_the_server_are_not_read(client, served):
    path = served[2][0]
    urls = (str(path), path.as_uri(), "/no/such/file.png")
    errors = [rejected(client, {"messages": user(image(url))}) for url in urls]
    assert all("--allowed-media" in error["message"] for error in errors)


def test_only_files_in_the_allowed_folder_are_read(served, tmp_path):
    model, processor, (path, _) = served
    folder, secret = tmp_path / "allowed", tmp_path / "secret.png"
    (folder / "a b").mkdir(parents=True)
    for place in (folder / "a b" / "x.png", secret):
        place.write_bytes(path.read_bytes())
    (folder / "link.png").symlink_to(secret)
    (folder / "inside.png").symlink_to(folder / "a b" / "x.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    app = build_app(Engine(Predictor(model, processor), MediaPolicy(folder)), "digits", MAX_BODY)
    with TestClient(app) as client:
        for url in (
            (folder / "a b" / "x.png").as_uri(),
            str(folder / "a b" / "x.png"),
            "a b/x.png",
            "inside.png",
        ):
            assert (
                client.post(CHAT, json={"messages": user(image(url)), "max_tokens": 1}).status_code == 200
            ), url
        outside = [
            secret.as_uri(),
            str(secret),
            "../secret.png",
            "link.png",
            "loop.png",
            "a b",
            "gone.png",
            "x" * 300,
        ]
        outside += [f"file://elsewhere{secret}", "a\0b", f"{folder.as_uri()}/%2e%2e/secret.png"]
        for url in outside:
            assert (
                "not a file in the folder" in rejected(client, {"messages": user(image(url))})["message"]
            ), url


def test_an_address_of_the_own_network_is_fetched_only_where_allowed(served, web):
    model, processor, _ = served
    for urls, status in (("public", 400), ("any", 200)):
        with TestClient(
            build_app(Engine(Predictor(model, processor), MediaPolicy(urls=urls)), "digits", MAX_BODY)
        ) as client:
            body = {"messages": user(image(f"{web}/a.png")), "max_tokens": 1}
            assert client.post(CHAT, json=body).status_code == status
            error = rejected(client, {"messages": user(image(f"{web}/gone.png"))})
            assert ("not a public address" if urls == "public" else "404") in error["message"]


def test_an_unreachable_url_is_rejected(served):
    model, processor, _ = served
    with TestClient(
        build_app(Engine(Predictor(model, processor), MediaPolicy(urls="any")), "digits", MAX_BODY)
    ) as client:
        error = rejected(client, {"messages": user(image("http://127.0.0.1:9/a.png"))})
        assert "cannot fetch http://127.0.0.1:9/a.png" in error["message"]


def test_a_prompt_that_fills_the_context_is_rejected(client, served):
    context = context_length(served[0].config)
    for route, body, field in (
        (CHAT, {"messages": user(text("word " * context))}, "messages"),
        (COMPLETIONS, {"prompt": "word " * context}, "prompt"),
        (CHAT, {"messages": user(text("word " * context)), "stream": True}, "messages"),
    ):
        error = rejected(client, body, route)
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        assert f"context of {context} tokens" in error["message"]


def test_an_answer_ends_where_the_context_does(client, served):
    context = context_length(served[0].config)
    body = {"prompt": "a" * (context // 2), "max_tokens": 10 * context, "temperature": 2}
    reply = client.post(COMPLETIONS, json=body)
    assert reply.status_code == 200 and reply.json()["usage"]["total_tokens"] <= context


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b'{"seed": NaN}', b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_rejected(client, body):
    assert "the body" in rejected(client, body)["message"]


@pytest.mark.parametrize(
    ("body", "reason"), [(b'{"seed": NaN}', "NaN is not JSON"), (b"[" * 100_000, "nested too deeply")]
)
def test_a_body_that_is_not_json_is_rejected_with_the_reason(client, body, reason):
    assert reason in rejected(client, body)["message"]


def test_half_a_surrogate_pair_is_rejected(client):
    assert "Unicode" in rejected(client, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}')["message"]
    whole = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 1}'
    assert client.post(CHAT, content=whole).status_code == 200


def test_a_body_over_the_limit_is_rejected_however_it_is_sent(client):
    large = json.dumps({"messages": user(text("a" * MAX_BODY))}).encode()
    assert "larger than 1 MiB" in rejected(client, large, status=413)["message"]
    pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
    assert rejected(client, pieces, status=413)["code"] == "request_too_large"
    assert rejected(client, (large for _ in range(9)), status=413)


def test_other_models_and_other_routes_are_not_found(client, openai):
    with pytest.raises(NotFoundError, match="model: this server has only .digits., got .gpt-4o."):
        openai.chat.completions.create(model="gpt-4o", messages=user(text()))
    assert [model.id for model in openai.models.list()] == ["digits"]
    assert openai.models.retrieve("digits").id == "digits"
    for path in ("/v1/audio/transcriptions", "/v1/systemone", "/v1/embeddings", "/reset", "/load_model"):
        assert rejected(client, {}, path, status=404)
    assert client.get(CHAT).status_code == 405 and "error" in client.get(CHAT).json()
    assert client.get("/health").json() == {"status": "ok"}


def test_openais_client_raises_its_own_errors(openai):
    with pytest.raises(
        BadRequestError, match="max_tokens: must be greater than or equal to 1, got 0"
    ) as error:
        openai.chat.completions.create(model="digits", messages=user(text()), max_tokens=0)
    assert error.value.param == "max_tokens"


def test_a_failure_of_the_model_is_an_error_object_and_the_server_continues(
    client, openai, served, monkeypatch, caplog
):
    def fail(*args, **kwargs):
        raise RuntimeError('CUDA error in "/home/someone/model"')

    with monkeypatch.context() as patch:
        patch.setattr(type(served[0]), "generate", fail)
        reply = client.post(CHAT, json={"messages": user(text())})
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
        assert "someone" not in reply.text
        with pytest.raises(APIError, match="failed while generating"):
            list(openai.chat.completions.create(model="digits", messages=user(text()), stream=True))
        kinds = [json.loads(event)["type"] for event in events(client, {"input": "a"}, RESPONSES)]
        assert kinds[-2:] == ["error", "response.failed"]
    assert client.post(CHAT, json={"messages": user(text()), "max_tokens": 1}).status_code == 200


def test_a_dialogue_that_the_chat_template_refuses_is_rejected(client, served, monkeypatch):
    monkeypatch.setattr(served[1], "chat_template", "{{ raise_exception('roles must alternate') }}")
    for route, body, field in (
        (CHAT, {"messages": user(text())}, "messages"),
        (RESPONSES, {"input": "a"}, "messages"),
    ):
        error = rejected(client, body, route)
        assert "roles must alternate" in error["message"] and error["param"] == field


def test_bad_requests_do_not_affect_concurrent_ones(client, served, generated):
    good = chat_body(served[2][0])
    broken = user(image("data:image/png;base64,AAAA"))
    bad = [{"messages": []}, {"messages": broken}, {"messages": user(text("a " * 9999))}]

    def ask(body):
        reply = client.post(CHAT, json=body)
        return reply.status_code, reply.json().get("choices", [{}])[0].get("message", {}).get("content")

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, [good, *bad, good, *bad, good]))
    assert replies == [
        (200, generated),
        *[(400, None)] * 3,
        (200, generated),
        *[(400, None)] * 3,
        (200, generated),
    ]


def test_an_answer_ends_early_when_its_client_disconnects(engine):
    async def leave():
        endless = engine_request(max_tokens=1000, temperature=2.0)
        first, second = await engine.ask(endless), await engine.ask(endless)
        async for _ in first.pieces():
            first.cancel()
            second.cancel()
        return first, second

    first, second = asyncio.run(leave())
    assert 0 < first.completion_tokens < 100 and second.completion_tokens == 0


def engine_request(**sampling):
    return GenerationRequest(
        None, Sampling(**sampling, logit_bias=dict.fromkeys(range(3), -100.0)), prompt="A"
    )


def test_special_tokens_typed_by_a_client_are_text(client):
    body = {"messages": [{"role": "user", "content": "What is <image>?"}], "max_tokens": 1}
    assert client.post(CHAT, json=body).status_code == 200
