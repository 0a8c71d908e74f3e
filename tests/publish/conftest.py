import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from flamingo_ft.hub import errors
from tests.hub_server import READER, WRITER


@pytest.fixture(autouse=True)
def nothing_tells_a_token(tmp_path, caplog):
    """No file of a test has one afterwards, the cache of the client's included, and no line of a log."""
    yield
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        assert not any(token.encode() in content for token in (WRITER, READER)), path
    assert not any(token in caplog.text for token in (WRITER, READER))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Between two tries, here and in the client."""
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
