"""Evaluation samples are read before training: remote images are kept, unusable rows are listed."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from flamingo_ft.config import DataSection
from flamingo_ft.data import open_data, open_medium
from flamingo_ft.errors import UserError


class Once(http.server.BaseHTTPRequestHandler):
    """Serves each image once, and answers 404 afterwards."""

    content = b""
    served: set[str] = set()

    def do_GET(self):
        if self.path in self.served:
            self.send_error(404)
            return
        self.served.add(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    handler = type("Handler", (Once,), {"content": (tmp_path / "red.png").read_bytes(), "served": set()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def open_rows(folder: Path, rows: list[dict], **options):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(folder / "rows.jsonl")}
    return open_data(DataSection.model_validate({"train": [source], "eval": [source], **options}), 0)


def question(**media) -> dict:
    return {"question": "Which colour?", "answer": "Red."} | media


def test_eval_images_are_fetched_once(tmp_path, url):
    rows = [question(image=f"{url}/a.png"), question(videos=[[f"{url}/b.png", "red.png"]])]
    samples = open_rows(tmp_path, rows, allow_urls=True).eval_samples()
    for _ in range(2):
        frames = [open_medium(medium) for sample in samples for medium in sample.images]
        assert [len(pictures) for pictures in frames] == [1, 2]
        assert all(picture.getpixel((0, 0)) == (255, 0, 0) for pictures in frames for picture in pictures)


def test_the_error_of_an_eval_image_that_cannot_be_fetched_names_its_url(tmp_path, url):
    data = open_rows(
        tmp_path, [question(image=f"{url}/a.png"), question(image=f"{url}/a.png")], allow_urls=True
    )
    with pytest.raises(UserError, match=rf"row 1: .*{url}/a.png"):
        data.eval_samples()


def test_skipped_eval_rows_are_listed(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    data = open_rows(tmp_path, [question(image="red.png"), question(image="none.png")], on_bad_sample="skip")
    assert len(data.eval_samples()) == 1
    assert list(data.skipped) == [f"{tmp_path}/rows.jsonl: row 1"]
