"""A served model returns over HTTP the answers of `flamingo-ft generate`."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

import flamingo_ft
from flamingo_ft.cli import main
from flamingo_ft.errors import UserError
from flamingo_ft.inference import server
from flamingo_ft.inference.answer import answer

from .conftest import PROMPT

LONGEST_START = 120  # seconds


@pytest.fixture(scope="module", params=["adapter", "merged"])
def served(request, folders):
    """A folder, the images beside it, and a client of its server, which must end on SIGINT."""
    folder, paths = folders
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flamingo_ft", "serve", str(folder / request.param), "--port", str(port)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flamingo_ft.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / f"{request.param}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        wait_for(f"http://localhost:{port}/health", process, log)
        yield folder / request.param, paths, OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
    finally:
        process.kill()


def wait_for(url, process, log):
    end = time.monotonic() + LONGEST_START
    while time.monotonic() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(url)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def dialogue(paths):
    links = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths]
    images = [{"type": "image_url", "image_url": {"url": link}} for link in links]
    return [{"role": "user", "content": [*images, {"type": "text", "text": PROMPT}]}]


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
def test_a_served_model_returns_the_answer_of_generate_whole_and_streamed(served, images):
    folder, paths, client = served
    expected = answer(folder, paths[:images], PROMPT)
    request = {"model": str(folder), "messages": dialogue(paths[:images]), "max_tokens": 64}
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].message.content == expected
    pieces = [
        piece.choices[0].delta.content or ""
        for piece in client.chat.completions.create(**request, stream=True)
    ]
    assert len(pieces) > 3 and "".join(pieces) == expected


@pytest.mark.slow
def test_concurrent_requests_get_the_answers_to_their_own_images(served):
    folder, paths, client = served
    image_lists = [paths[:1], paths[1:], paths, paths[::-1]]
    expected = [answer(folder, images, PROMPT) for images in image_lists]

    def ask(images):
        reply = client.chat.completions.create(model=str(folder), messages=dialogue(images), max_tokens=64)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, image_lists * 3)) == expected * 3
    assert len(set(expected)) > 1


@pytest.mark.slow
def test_a_served_model_honors_stop_sequences_and_rejects_unsupported_fields(served):
    folder, paths, client = served
    request = {"model": str(folder), "messages": dialogue(paths[:1]), "max_tokens": 64}
    expected = answer(folder, paths[:1], PROMPT)
    stopped = client.chat.completions.create(**request, stop=[expected[3]])
    assert stopped.choices[0].message.content.strip() == expected[: expected.index(expected[3])].strip()
    local = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(paths[0])}}]}]
    broken = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
    ]
    for change in ({"max_tokens": 0}, {"n": 2}, {"messages": []}, {"messages": local}, {"messages": broken}):
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(**request | change)
        assert error.value.param.startswith(next(iter(change)))


def test_without_the_servers_packages_the_error_has_the_install_command(monkeypatch):
    monkeypatch.setattr(server, "is_serve_available", lambda: False)
    with pytest.raises(UserError, match=r'not installed; run: pip install "flamingo_ft\[serve\]"$'):
        server.serve("anywhere", "localhost", 8000)


def test_the_command_line_passes_media_policy_and_loading_options_on(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(server, "serve", lambda *arguments, **options: calls.append((*arguments, options)))
    assert main(["serve", "run"]) == 0
    options = ["--allowed-media", str(tmp_path), "--image-urls", "none", "--max-body-mib", "5", "--port", "9"]
    assert main(["serve", "run", *options, "--quantization", "nf4", "--dtype", "fp32"]) == 0
    default = {"allowed_media": None, "image_urls": "public", "max_body_mib": 64}
    chosen = {"allowed_media": tmp_path, "image_urls": "none", "max_body_mib": 5}
    default |= {"start": None, "quantization": None, "dtype": "auto"}
    chosen |= {"start": None, "quantization": "nf4", "dtype": "fp32"}
    assert calls == [("run", "localhost", 8000, default), ("run", "localhost", 9, chosen)]
    assert main(["serve", "run", "--allowed-media", str(tmp_path / "gone")]) == 2


def test_a_folder_without_a_model_and_a_port_in_use_are_refused_in_one_line(folders, tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        "not an adapter or a merged model; give the folder that a run or a merge wrote\n"
    )
    folder, _ = folders
    with (
        socket.create_server(("localhost", 0)) as taken,
        pytest.raises(UserError, match="give another --port"),
    ):
        server.serve(str(folder / "adapter"), "localhost", taken.getsockname()[1])
