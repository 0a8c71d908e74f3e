"""A streamed answer passes on errors, and ends when its reader does."""

import threading

import pytest

from flamingo_ft.inference.streaming import cut_at_stop, stream_text


def test_pieces_come_in_order_and_an_error_after_them():
    def run(on_text, is_cancelled):
        for piece in ("a", "", "b"):
            on_text(piece)
        raise ValueError("broken")

    pieces = stream_text(run)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    with pytest.raises(ValueError, match="broken"):
        next(pieces)


def test_closing_a_stream_cancels_the_generation_and_waits_for_its_end():
    ended = threading.Event()

    def run(on_text, is_cancelled):
        while not is_cancelled():
            on_text("more ")
        ended.set()

    pieces = stream_text(run)
    assert next(pieces) == "more "
    pieces.close()
    assert ended.is_set()


def test_text_is_cut_at_the_first_of_the_stop_strings():
    assert cut_at_stop("a cat Question: b Answer", ("Answer", "Question")) == "a cat "
    assert cut_at_stop("a cat", ("Question",)) == cut_at_stop("a cat", ()) == "a cat"
