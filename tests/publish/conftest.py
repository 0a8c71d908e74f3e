import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from flamingo_ft.hub import errors
from tests.hub_server import READER, WRITER


@pytest.fixture(autouse=True)
def no_token_leaks(tmp_path, caplog):
    """Check that no file, the client's cache included, and no log line contains a token."""
    yield
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        assert not any(token.encode() in content for token in (WRITER, READER)), path
    assert not any(token in caplog.text for token in (WRITER, READER))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shorten the waits between retries, of this package and of the client."""
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
