"""What a client sees of an answer does not depend on how it was cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft.inference.streaming import VisibleText


def visible(pieces, stop, strip=True):
    text = VisibleText(stop, strip)
    shown = [text.feed(piece) for piece in pieces]
    return "".join(shown) + ("" if text.stopped else text.end()), text.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([" Se", "ven", ". "], (), ("Seven.", False)),
        (["a\n", "\nb"], ("\n\n",), ("a", True)),
        (["ab", "ac", "ad"], ("aca",), ("ab", True)),
        (["a", "a", "a"], ("aab",), ("aaa", False)),
        (["Q: ", "Ques", "tion"], ("Question",), ("Q:", True)),
        (["\nfirst"], ("\n",), ("", True)),
    ],
)
def test_an_answer_ends_before_its_first_stop_text_without_outer_white_space(pieces, stop, expected):
    assert visible(pieces, stop) == expected


@given(
    st.lists(st.text("ab \n", max_size=4), max_size=8),
    st.text("ab \n", min_size=1, max_size=3),
    st.booleans(),
)
def test_the_visible_text_is_the_same_for_every_cut(pieces, stop, strip):
    whole = "".join(pieces)
    before, separator, _ = whole.partition(stop)
    assert visible(pieces, (stop,), strip) == (before.strip() if strip else before, bool(separator))
    assert visible([whole], (), strip) == (whole.strip() if strip else whole, False)
