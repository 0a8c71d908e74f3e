from pathlib import Path

import pytest

from tests.hub_server import READER, WRITER, shorten_waits


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
    shorten_waits(monkeypatch)
