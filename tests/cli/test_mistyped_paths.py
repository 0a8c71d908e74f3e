"""A mistyped path is refused by its own name wherever a model is named, without a request to the Hub."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from flamingo_ft import Adapters, cli
from flamingo_ft.adapters import load_adapter, load_base, load_trained, write_composition
from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, load_open_flamingo

WRONG = "runs/quickstrt"
NEAREST = "did you mean runs/quickstart?"

SERVER = pytest.mark.skipif(not is_serve_available(), reason="needs the server's packages")
DEMO = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the demo's packages")

COMMANDS = [
    ["generate", WRONG, "--prompt", "What?", "--image", "0.png"],
    ["eval", WRONG],
    ["merge", WRONG, "out"],
    ["push", WRONG, "org/name"],
    ["convert", WRONG, "out"],
    ["convert", WRONG, "out", "--to", "otter"],
    ["merge", "start", "out", "--start", WRONG],
    ["train", "recipe.yaml", f"model.init_from={WRONG}"],
    ["train", "recipe.yaml", f"model.language.name={WRONG}"],
    ["plan", "recipe.yaml", f"model.vision.name={WRONG}"],
    ["check", "recipe.yaml", f"model.language.name={WRONG}"],
    ["generate", "start", "--prompt", "What?", "--start", WRONG],
    ["generate", "start", "--data", "train.jsonl", "--out", "out.csv", "--start", WRONG],
    ["chat", "start", "--start", WRONG],
    ["eval", "start", "--data", "train.jsonl", "--start", WRONG],
    pytest.param(["serve", WRONG], marks=SERVER),
    pytest.param(["serve", "start", "--port", "8765", "--start", WRONG], marks=SERVER),
    pytest.param(["demo", "start", "--start", WRONG], marks=DEMO),
]
CALLS = [
    load_adapter,
    load_trained,
    load_base,
    Adapters,
    FlamingoForConditionalGeneration.from_pretrained,
    FlamingoProcessor.from_pretrained,
    lambda place: merge_adapter(place, "out"),
    lambda place: write_composition(place, "out"),
    lambda place: load_open_flamingo(None, place),
    lambda place: load_recipe("./recipe.yaml", [f"model.init_from={place}"]),
]


@pytest.fixture
def here(small_run, hub):
    Path("runs/quickstart").mkdir(parents=True)
    return small_run


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_names_the_nearest_path(here, hub, capsys, arguments):
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        len(lines) == 1
        and "no folder " in lines[0]
        and "did you mean " in lines[0]
        and "runs/quickstart?" in lines[0]
    )
    assert hub.requests == [] and not list(Path().glob("out*"))


@pytest.mark.parametrize("call", CALLS)
def test_a_call_names_the_nearest_path(here, hub, call):
    with pytest.raises(UserError, match=r"no folder .*runs/quickstrt; did you mean .*runs/quickstart\?"):
        call(WRONG)
    assert hub.requests == []


def test_an_adapter_that_names_its_base_on_the_hub_is_loaded_beside_a_folder_of_that_owner(here, hub):
    """What an adapter records means the same in every directory."""
    from flamingo_ft.adapters import name_base
    from flamingo_ft.model.pretrained import named_composition

    Path("org").mkdir()
    name_base("start", "org/base")
    assert named_composition(Path("start")) == "org/base@main"
