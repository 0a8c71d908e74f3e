"""Timeouts are set on the client only where it has none; everything else of a user's session stays."""

import huggingface_hub
import pytest
from huggingface_hub import close_session, get_session, set_client_factory
from huggingface_hub.utils import _http

from flamingo_ft.hub import compat
from flamingo_ft.hub.upload import TIMEOUT_S, limit_timeouts


@pytest.fixture
def own_factory():
    """A user's factory, whose sessions have a header, a hook and one timeout of their own."""
    usual, session = compat.client_factory(), get_session()
    client, timeout = type(session), type(session.timeout)(None, connect=3.0)

    def factory():
        return client(headers={"X-Own": "yes"}, event_hooks={"request": [own_hook]}, timeout=timeout)

    set_client_factory(factory)
    yield factory
    set_client_factory(usual)


def own_hook(request) -> None:
    """A hook without effect."""


def seconds() -> tuple:
    timeout = get_session().timeout
    return timeout.connect, timeout.read, timeout.write, timeout.pool


def test_only_missing_timeouts_of_a_users_session_are_set(own_factory):
    session = get_session()
    session.headers["X-Added"] = "later"
    with limit_timeouts():
        assert get_session() is session and seconds() == (3.0, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)
        assert session.headers["X-Own"] == "yes" and session.headers["X-Added"] == "later"
    assert get_session() is session and seconds() == (3.0, None, None, None)
    assert compat.client_factory() is own_factory


def test_a_new_session_inside_the_block_is_the_users_too(own_factory):
    with limit_timeouts():
        close_session()  # as the client does after a connection failed
        assert seconds() == (3.0, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)
        assert get_session().headers["X-Own"] == "yes" and get_session().event_hooks["request"] == [own_hook]
        assert not get_session().follow_redirects
    assert compat.client_factory() is own_factory and seconds() == (3.0, None, None, None)


def test_nested_blocks_and_errors_restore_everything(own_factory):
    with pytest.raises(KeyError), limit_timeouts():
        with limit_timeouts():
            assert seconds() == (3.0, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)
        assert seconds() == (3.0, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)
        raise KeyError
    assert compat.client_factory() is own_factory and seconds() == (3.0, None, None, None)


def test_a_factory_that_is_set_inside_stays(own_factory):
    def another():
        return own_factory()

    with limit_timeouts():
        set_client_factory(another)
    assert compat.client_factory() is another


def test_the_clients_private_names_exist():
    assert compat.client_factory() is _http._GLOBAL_CLIENT_FACTORY
    assert callable(huggingface_hub.set_client_factory)
