"""What went wrong is told without what nobody else should read."""

import pytest

from flamingo_ft.hub.errors import safe_message
from tests.hub_server import WRITER


@pytest.mark.parametrize("token", [WRITER, "a.token/of-another+kind"])
def test_a_token_is_in_no_quotation_not_even_half_of_it(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    for before in range(160, 210):
        found = safe_message(RuntimeError("x" * before + f" {token} refused"))
        assert token[:6] not in found and "\n" not in found


def test_what_a_signed_address_carries_is_in_no_quotation():
    found = safe_message(OSError("no answer of https://store.example/a/b?X-Signature=abc&X-Key=d\nat all"))
    assert found == "no answer of https://store.example/a/b at all"
    assert safe_message(ConnectionError()) == "ConnectionError"
