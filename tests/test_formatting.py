"""Numbers, sizes, durations and messages as users read them."""

import base64

import pytest

from flamingo_ft import formatting
from flamingo_ft.formatting import GIB


@pytest.mark.parametrize(
    "text, expected",
    [
        (formatting.one_line(" a\n b\tc "), "a b c"),
        (formatting.one_line("abcdef", 3), "abc"),
        (formatting.error_message(OSError("no\nroom")), "no room"),
        (formatting.error_message(EOFError()), "EOFError"),
        (formatting.shorten("x" * 301, 300), "x" * 300 + "..."),
        (formatting.shorten("a\nb"), "a\\nb"),
        (formatting.plural(1, "row"), "1 row"),
        (formatting.plural(1200, "row"), "1,200 rows"),
        (formatting.percent(0.42), "42.0 %"),
        (formatting.percent(1, 8), "12.5 %"),
        (formatting.percent(None), ""),
        (formatting.percent(0, 0), ""),
        (formatting.significant(12345.6), "12,346"),
        (formatting.significant(999.6), "1,000"),
        (formatting.significant(3.21, 2), "3.2"),
        (formatting.gib(1.5 * GIB), "1.50"),
        (formatting.gib(0.0125 * GIB), "0.013"),
        (formatting.clock(3725), "1:02:05"),
        (formatting.duration(3725), "1 h 2 min"),
        (formatting.duration(200), "3 min 20 s"),
        (formatting.duration(45.4), "45 s"),
        (formatting.data_uri(b"abc"), "data:image/png;base64," + base64.b64encode(b"abc").decode()),
    ],
)
def test_a_value_is_written_as_documented(text, expected):
    assert text == expected
