"""Options of decoding are checked at once, and reach ``generate`` under transformers' names."""

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.inference.decoding import Decoding


def test_decoding_is_greedy_unless_an_option_of_sampling_is_given():
    assert Decoding().generate_options() == {"num_beams": 1, "do_sample": False}
    assert Decoding(temperature=0).generate_options() == {"num_beams": 1, "do_sample": False}
    assert Decoding(top_p=0.5, seed=1).generate_options() == {
        "num_beams": 1,
        "top_p": 0.5,
        "top_k": 0,
        "do_sample": True,
    }
    assert Decoding(num_beams=3, length_penalty=0.0).generate_options() == {
        "num_beams": 3,
        "length_penalty": 0.0,
        "do_sample": False,
    }


def test_a_single_stop_string_is_one_text():
    assert Decoding(stop_strings="Question").stop_strings == ("Question",)


def test_updated_options_replace_those_that_are_not_none():
    decoding = Decoding(max_new_tokens=5, temperature=0.5)
    assert decoding.updated(temperature=None, top_k=3) == Decoding(5, temperature=0.5, top_k=3)
    with pytest.raises(TypeError, match="heat"):
        decoding.updated(heat=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: must be 0, or at least 0.001, got -1; correct it"),
        ({"temperature": 1e-9}, "temperature: must be 0, or at least 0.001, got 1e-09; correct it"),
        ({"temperature": float("nan")}, "temperature: must be 0, or at least 0.001, got nan; correct it"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, got 0; correct it"),
        ({"top_k": 0}, "top_k: must be at least 1, got 0; correct it"),
        ({"num_beams": 0}, "num_beams: must be at least 1, got 0; correct it"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0; correct it"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be above 0, got 0; correct it"),
        (
            {"stop_strings": ("a", "")},
            "stop_strings: got an empty text, which every answer begins with; remove it",
        ),
        (
            {"temperature": 0, "top_p": 0.9},
            "top_p: got it with temperature 0, which decodes greedily; remove one of them",
        ),
        ({"seed": 3}, "seed: got 3, but only sampling uses it; set temperature, or remove it"),
        (
            {"length_penalty": 1.0},
            "length_penalty: only beam search uses it; set num_beams to 2 or more, or remove it",
        ),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(options, message):
    with pytest.raises(UserError) as caught:
        Decoding(**options)
    assert str(caught.value) == message
