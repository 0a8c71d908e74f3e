"""Which parameter belongs to which part; a part added to the table is trained, saved and planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flamingo_ft
from flamingo_ft.model.parts import PARTS, is_decayed, optimizer_group, part_of

from .tiny import tiny_flamingo


def test_every_parameter_belongs_to_one_part():
    model = tiny_flamingo()
    for name, _ in model.named_parameters():
        assert [part for part in PARTS.values() if name.startswith(part.prefix)] == [part_of(name)], name


@pytest.mark.parametrize(
    "name, shape, group, decayed",
    [
        ("perceiver.latents", (3, 4), "perceiver", False),
        ("perceiver.frame_embs", (3, 4), "perceiver", False),
        ("perceiver.tile_embs", (3, 4), "perceiver", False),
        ("perceiver.layers.0.0.to_q.weight", (4, 4), "perceiver", True),
        ("perceiver.norm.weight", (4,), "perceiver", False),
        ("gated_cross_attn_layers.0.attn.to_q.weight", (4, 4), "cross_attention", True),
        ("gated_cross_attn_layers.0.attn_gate", (1,), "gates", False),
        ("token_rows.input.weight", (2, 4), "new_tokens", False),
        ("perceiver.layers.0.0.to_q.lora_A.default.weight", (2, 4), "lora", True),
        ("perceiver.layers.0.0.to_q.lora_B.default.weight", (4, 2), "lora_b", True),
        (
            "lang_encoder.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            (4,),
            "lora_b",
            False,
        ),
    ],
)
def test_matrices_are_decayed_but_not_latents_and_rows(name, shape, group, decayed):
    assert (optimizer_group(name), is_decayed(name, torch.zeros(shape))) == (group, decayed)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """The result of a run with a made-up part (`made_up_part`)."""
    root = Path(flamingo_ft.__file__).parents[1]
    command = [sys.executable, "-m", "tests.model.made_up_part", str(tmp_path_factory.mktemp("made_up"))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_part_added_in_one_row_is_trained_alone_at_its_own_rate_and_decay(made_up):
    own = ["text_shift.weight", "text_shift.start"]
    assert sorted(made_up["trainable"]) == sorted(own) == sorted(made_up["moved"])
    assert made_up["groups"] == [["text_shift", 0.5, 0.25, own[:1]], ["text_shift", 0.5, 0.0, own[1:]]]


@pytest.mark.slow
def test_a_part_added_in_one_row_is_saved_and_loaded(made_up):
    assert {name.rpartition("text_shift.")[2] for name in made_up["saved"]} == {"weight", "start"}
    assert made_up["loaded"]


@pytest.mark.slow
def test_a_part_added_in_one_row_is_in_the_plan_and_the_card(made_up):
    assert made_up["plan"]["text shift"] == made_up["parameters"] > 0
    assert "the made-up shift of the text" in made_up["card"]
