import time
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from flamingo_ft.hub import errors


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shorten the waits between two attempts, here and in the client."""
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
