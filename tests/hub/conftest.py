import pytest

from tests.hub_server import shorten_waits


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shorten the waits between two attempts, here and in the client."""
    shorten_waits(monkeypatch)
