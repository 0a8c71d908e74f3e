"""Push to the Hub and load again, with the real client: the same answers, and no local path."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText

from flamingo_ft.adapters import load_adapter, load_trained, save_adapter
from flamingo_ft.adapters.card import card_text
from flamingo_ft.backbones.language import NANO_FOLDER
from flamingo_ft.cli import main
from flamingo_ft.hub import errors
from flamingo_ft.publish import files_to_push, push
from tests import regimes
from tests.hub_server import LARGE, READER, WRITER

REPO = "somebody/digits"
BASE = f"{REPO}-base"


@pytest.fixture
def adapter(hub, small_run, monkeypatch):
    """A run's folder: an adapter and the other files of a run."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    shutil.copytree("start", "run")
    write_run_files(small_run / "run", small_run)
    return small_run / "run"


@pytest.fixture
def on_a_bridge(adapter):
    """The same, with LoRA on the bridge of another adapter."""
    model, processor = regimes.build(*regimes.REGIMES["LoRA only"])
    regimes.shake(model, 0.3)
    save_adapter(model, processor, adapter)
    return adapter


def write_run_files(folder: Path, here: Path) -> None:
    recipe = regimes.recipe(*regimes.REGIMES["LoRA only"]).model_dump(mode="json")
    (folder / "resolved_recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    scores = {"accuracy": 0.5, "samples": 2}
    evaluation = {"accuracy": 0.5, "per_task": {"shades": scores}}
    training = {"steps": 1, "seconds": 1.0, "trainable_parameters": 10}
    (folder / "metrics.json").write_text(json.dumps({"eval": evaluation, "train": training}))
    row = {"where": f"{here}/train.jsonl: row 0", "task": "shades", "images": [f"{here}/0.png"]}
    row |= {"question": "<image>Which | shade?", "answer": "Dark.", "after": "/Light."}
    (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "log.jsonl").write_text('{"loss": 2.0, "step": 1}\n{"loss": 1.0, "step": 2}\n')
    (folder / "figures").mkdir()
    for name in ("loss.png", "gates.png", "answers.png"):
        (folder / "figures" / name).write_bytes(b"png")
    for path in (
        "checkpoints/step-1/adapter_model.safetensors",
        "tensorboard/events",
        ".hidden/x.json",
        "report.html",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(str(here))


def output_of(capfd) -> str:
    """Return the output so far, which must not contain a token or a traceback."""
    output = "".join(capfd.readouterr())
    assert WRITER not in output and READER not in output and "Traceback" not in output
    return output


def test_a_pushed_adapter_gives_the_same_answers(on_a_bridge, hub, capfd):
    prompt = ["--image", "0.png", "--prompt", "Which shade?"]
    assert main(["generate", "run", *prompt]) == 0
    answer = capfd.readouterr().out
    expected = regimes.logits(*load_adapter(on_a_bridge))
    assert main(["push", "run", REPO]) == 0
    output = output_of(capfd)
    assert f"{REPO} is at {hub.url}/{REPO}/commit/" in output and f"its base in {BASE}" in output
    for folder in ("run", "start"):
        shutil.rmtree(folder)
    assert torch.equal(regimes.logits(*load_adapter(REPO)), expected)
    assert main(["generate", REPO, *prompt]) == 0
    assert capfd.readouterr().out == answer
    assert main(["eval", REPO, "--data", "train.jsonl"]) == 0


def test_only_the_adapters_files_are_pushed_and_no_local_path(on_a_bridge, hub, tmp_path):
    push(on_a_bridge, REPO)
    files = hub.files(REPO)
    assert {path for path in files if "/" in path} == {"figures/loss.png", "figures/gates.png"}
    assert {
        "README.md",
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
        "metrics.json",
    } <= {*files}
    assert "report.html" not in files and not any(path.startswith(".") for path in files)
    for name, content in [*files.items(), *hub.files(BASE).items()]:
        for secret in (str(tmp_path), str(Path.home()), WRITER):
            assert secret.encode() not in content, (name, secret)
    row = json.loads(files["predictions.jsonl"])
    assert (row["where"], row["images"]) == ("train.jsonl: row 0", ["0.png"])
    assert (row["question"], row["after"]) == ("<image>Which | shade?", "/Light.")
    assert yaml.safe_load(files["resolved_recipe.yaml"])["data"]["train"][0]["path"] == "train.jsonl"


@pytest.mark.slow
def test_each_repository_is_one_commit_and_the_base_comes_first(on_a_bridge, hub):
    result = push(on_a_bridge, REPO, private=True)
    assert result.base == BASE
    for name in (REPO, BASE):
        assert hub.repositories[name].private and len(hub.repositories[name].history) == 2
    commits = [request for request in hub.requests if "/commit/" in request]
    assert [BASE in commit for commit in commits] == [True, False]
    base = json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"]
    assert base == BASE and "bridge.safetensors" in hub.files(BASE)


@pytest.mark.slow
def test_a_shared_base_is_checked_and_not_written_to(adapter, hub, small_run):
    push(adapter, REPO)
    hub.requests.clear()
    push(adapter, "somebody/second", base=BASE)
    assert not any(BASE in request and not request.startswith(("GET", "HEAD")) for request in hub.requests)
    assert "somebody/second-base" not in hub.repositories
    regimes.write_start(small_run / "other", "model.cross_attn_every_n_layers=2")
    assert main(["push", "other", "somebody/third", "--base", BASE]) == 2
    assert "somebody/third" not in hub.repositories


@pytest.mark.slow
def test_a_push_to_a_branch_does_not_change_main(adapter, hub):
    push("start", REPO)
    before = hub.files(REPO)
    push(adapter, REPO, revision="next", license="mit")
    assert hub.files(REPO) == before and b"license: mit" in hub.files(REPO, "next")["README.md"]
    load_adapter(f"{REPO}@next")


@pytest.mark.slow
def test_an_adapter_on_a_branch_has_its_base_on_that_branch(on_a_bridge, hub):
    push("start", REPO)
    expected = regimes.logits(*load_adapter(on_a_bridge))
    push(on_a_bridge, REPO, revision="next")
    shutil.rmtree("start")  # now only the base has the bridge
    model, processor = load_adapter(f"{REPO}@next")
    assert torch.equal(regimes.logits(model, processor), expected)
    plain = AutoModelForImageTextToText.from_pretrained(REPO, revision="next")
    assert torch.equal(regimes.logits(plain, processor), expected)
    wrapped = AutoPeftModel.from_pretrained(REPO, revision="next", import_allowlist=["flamingo_ft"])
    assert torch.equal(regimes.logits(wrapped, processor), expected)


@pytest.mark.slow
def test_a_merged_model_is_pushed_whole(adapter, hub, capfd):
    model, processor = regimes.build(regimes.LORA)
    regimes.shake(model, 0.02)
    save_adapter(model, processor, adapter)
    assert main(["push", "run", REPO, "--merged"]) == 0
    assert BASE not in hub.repositories and "model.safetensors" in hub.files(REPO)
    assert str(adapter.parent).encode() not in hub.files(REPO)["merge.json"]
    expected, _ = load_adapter(adapter)
    merged, processor = load_trained(REPO)
    assert (regimes.logits(merged, processor) - regimes.logits(expected, processor)).abs().max() < 0.2
    assert main(["merge", "run", "merged"]) == 0 and main(["push", "merged", REPO]) == 0
    assert main(["push", "merged", REPO, "--merged"]) == 2
    assert "is a merged model already" in output_of(capfd)


@pytest.mark.slow
def test_weights_of_an_earlier_push_are_removed(adapter, hub):
    push(adapter, REPO)
    digest = hub.store(b"w" * LARGE)
    hub.repositories[REPO].history[-1].files |= {
        "model-00001-of-00002.safetensors": digest,
        "notes.txt": digest,
    }
    push(adapter, REPO)
    assert "model-00001-of-00002.safetensors" not in hub.files(REPO) and "notes.txt" in hub.files(REPO)


@pytest.mark.slow
def test_files_uploaded_before_a_connection_dropped_are_not_sent_again(adapter, hub):
    def uploads() -> list[str]:
        return [request for request in hub.requests if request.startswith("PUT /lfs/")]

    hub.fail(f"POST /api/models/{REPO}/commit", times=1000)
    assert main(["push", "run", REPO]) == 2
    sent = uploads()
    assert len(sent) == len({*sent}) > 1 and len(hub.repositories[REPO].history) == 1
    hub.failures.clear()
    hub.requests.clear()
    assert main(["push", "run", REPO]) == 0
    assert uploads() == [] and len(hub.repositories[REPO].history) == 2


@pytest.mark.parametrize("status", [429, *(pytest.param(one, marks=pytest.mark.slow) for one in (500, None))])
def test_transient_failures_are_retried(adapter, hub, capfd, status):
    hub.fail(f"POST /api/models/{REPO}/commit", times=errors.ATTEMPTS - 1, status=status)
    assert main(["push", "run", REPO]) == 0
    assert output_of(capfd).count("trying again in ") == errors.ATTEMPTS - 1
    assert len(hub.repositories[REPO].history) == 2


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ("POST /api/repos/create", 429, "the Hub limits the rate of requests from here (429)"),
        pytest.param(
            f"POST /api/models/{REPO}/commit", 500, "the Hub is in trouble (500)", marks=pytest.mark.slow
        ),
        pytest.param(
            f"POST /api/models/{REPO}/commit", 403, "the token may not write there", marks=pytest.mark.slow
        ),
        (f"POST /api/models/{REPO}/commit", 404, "failed ("),
        pytest.param(
            f"POST /api/models/{REPO}/commit",
            None,
            "the connection to the Hub broke off (",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_of_the_hub_is_one_line_and_no_repository_is_half_written(
    adapter, hub, capfd, request_, status, reason
):
    hub.fail(request_, times=1000, status=status)
    assert main(["push", "run", REPO]) == 2
    assert f"error: somebody/digits{'-base' if 'create' in request_ else ''}: {reason}" in output_of(capfd)
    assert REPO not in hub.repositories or hub.files(REPO) == {}


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "no valid token"),
        ("hf_wrong", "no valid token"),
        (READER, "the token may not write there"),
    ],
)
def test_a_missing_write_permission_is_reported(adapter, hub, monkeypatch, capfd, token, reason):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", "run", REPO]) == 2
    output = output_of(capfd)
    assert f"error: {REPO if token is None else BASE}: {reason}" in output and "hf_wrong" not in output


def test_a_missing_token_is_reported_before_backbones_are_loaded(adapter, hub, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sys.modules[push.__module__], "write_composition", None)
    assert main(["push", "run", REPO]) == 2
    assert f"{REPO}: no valid token; log in with `hf auth login`" in output_of(capfd) and hub.requests == []


def test_pushing_offline_is_refused(adapter, hub, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["push", "run", REPO]) == 2
    assert f"{BASE}: HF_HUB_OFFLINE is set; unset it" in output_of(capfd) and hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "digits"], "digits: not the name of a repository"),
        (["run", "a/b/c"], "a/b/c: not the name of a repository"),
        (["run", "some--body/digits"], "not the name of a repository ("),
        (["empty", REPO], "empty: holds no adapter and no merged model"),
        (["nowhere", REPO], "no folder nowhere; check the path"),
        (["rnu", REPO], "no folder rnu; check the path"),
        (["runn", REPO], "no folder runn; did you mean run?"),
        (["foreign", REPO], "foreign: holds a llama model"),
        (["run", REPO, "--merged", "--base", BASE], "got --merged and --base"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(adapter, hub, capfd, arguments, reason):
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"model_type": "llama"}')
    Path("foreign/model.safetensors").write_bytes(b"")
    assert main(["push", *arguments]) == 2
    lines = [line for line in output_of(capfd).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and reason in lines[0] and not hub.repositories


def test_the_card_describes_the_adapter_and_the_hub_can_parse_it(adapter, hub):
    push(adapter, REPO, license="apache-2.0")
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    data = card.data
    assert (data.license, data.library_name) == ("apache-2.0", "peft")
    assert data.pipeline_tag == "image-text-to-text"
    assert data.model_name == "digits" and [one.metric_value for one in data.eval_results] == [0.5]
    card.validate()
    assert f'Predictor.from_pretrained("{REPO}")' in text
    assert f'(auto.from_pretrained("{REPO}") for auto in' in text
    assert "figures/loss.png" in text and "figures/gates.png" in text and "<details>" in text
    assert "| &lt;image&gt;Which \\| shade? | Dark. |  | /Light. |" in text
    assert re.search(r"The loss went from 2 to 1\.", text)
    for part in ("vision", "language"):
        assert re.search(rf"\| {part} \| nano \| apache-2.0 \|", text)


def test_a_card_names_a_perceiver_only_of_a_model_that_has_one_and_where_blocks_are(adapter):
    trained = re.compile(r"vision-language model: (.*)\. Both")
    text = card_text(adapter)
    assert trained.search(text)[1].startswith("the perceiver resampler, the gated cross-attention blocks")
    assert "a cross-attention block before every decoder layer" in text
    config = json.loads((adapter / "config.json").read_text())
    config |= {"perceiver": {"depth": 0, "max_tiles": 4}, "cross_attn_every_n_layers": 4}
    (adapter / "config.json").write_text(json.dumps(config))
    text = card_text(adapter)
    assert trained.search(text)[1].startswith("the layer norm and positions of the visual tokens, the gated")
    assert "a cross-attention block before one in 4 decoder layers" in text


def test_backbones_on_the_hub_are_the_cards_base_models(adapter, hub):
    config = json.loads((adapter / "config.json").read_text())
    config["backbones"]["language"] |= {"name": "org/words", "revision": "0" * 40}
    config["backbones"]["vision"] |= {"name": "hf-hub:org/eyes"}
    (adapter / "config.json").write_text(json.dumps(config))
    data = ModelCard(card_text(adapter)).data
    assert data.base_model == ["org/words", "org/eyes"] and data.license is None


@pytest.mark.slow
def test_pushing_an_adapter_of_local_backbones_is_reported(adapter, hub, capfd, tmp_path):
    copied = shutil.copytree(NANO_FOLDER, tmp_path / "words")
    config = json.loads((adapter / "config.json").read_text())
    config["backbones"]["language"]["name"] = str(copied)
    (adapter / "config.json").write_text(json.dumps(config))
    assert main(["push", "run", REPO]) == 0
    assert "its language backbone is a folder of this machine, which nobody else has" in output_of(capfd)
    for name in (REPO, BASE):
        pushed = json.loads(hub.files(name)["config.json"])
        assert pushed["backbones"]["language"]["name"] == "words"
        assert not any(str(tmp_path).encode() in content for content in hub.files(name).values())


def test_pushing_to_a_hub_that_does_not_answer_times_out(adapter, hub, monkeypatch, capfd):
    monkeypatch.setattr("flamingo_ft.hub.upload.TIMEOUT_S", 0.2)
    monkeypatch.setattr(errors, "ATTEMPTS", 1)
    hub.hold(f"POST /api/models/{REPO}/commit")
    assert main(["push", "run", REPO]) == 2
    assert "the connection to the Hub broke off (" in output_of(capfd)


def test_text_that_begins_with_a_slash_is_not_taken_for_a_path(adapter):
    path = adapter / "resolved_recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= {"system_prompt": "/no_think Answer in one word."}
    recipe["data"]["train"][0]["columns"] = {"answer": "/label"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    evaluation = {"accuracy": 0.5, "per_task": {"/sign language/": {"accuracy": 0.5, "samples": 2}}}
    (adapter / "metrics.json").write_text(json.dumps({"eval": evaluation}))
    files = files_to_push(adapter, REPO)
    data = yaml.safe_load(files["resolved_recipe.yaml"])["data"]
    assert data["system_prompt"] == "/no_think Answer in one word."
    assert data["train"][0]["columns"] == {"answer": "/label"} and data["train"][0]["path"] == "train.jsonl"
    card = files["README.md"].decode()
    assert "system_prompt: /no_think Answer in one word." in card and "| /sign language/ | 2 |" in card
    assert list(json.loads(files["metrics.json"])["eval"]["per_task"]) == ["/sign language/"]
