"""Error messages hold no tokens and no parameters of signed URLs."""

import pytest

from flamingo_ft.hub.errors import safe_message
from tests.hub_server import WRITER


@pytest.mark.parametrize("token", [WRITER, "a.token/of-another+kind"])
def test_no_message_contains_a_token_or_a_part_of_one(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    for before in range(160, 210):
        message = safe_message(RuntimeError("x" * before + f" {token} refused"))
        assert token[:6] not in message and "\n" not in message


def test_no_message_contains_the_parameters_of_a_signed_url():
    message = safe_message(OSError("no answer of https://store.example/a/b?X-Signature=abc&X-Key=d\nat all"))
    assert message == "no answer of https://store.example/a/b at all"
    assert safe_message(ConnectionError()) == "ConnectionError"
