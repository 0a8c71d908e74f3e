"""An adapter and its composition load from the Hub by the adapter's name, with transformers and PEFT."""

import shutil

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import flamingo_ft
from flamingo_ft.adapters import load_adapter, name_base, save_adapter, write_composition
from flamingo_ft.errors import UserError

from .. import regimes
from ..hub_server import READER, WRITER


@pytest.fixture
def pushed(hub, small_run):
    """Push an adapter and its composition and delete the local copies, also of the bridge they build on.

    Return both names and the adapter's logits.
    """
    adapter, base = "somebody/digits", "somebody/digits-base"
    model, processor = regimes.build(*regimes.REGIMES["LoRA everywhere"])
    regimes.shake(model, 0.3)
    save_adapter(model, processor, "adapter")
    write_composition("adapter", "base")
    expected = regimes.logits(*load_adapter("adapter"))
    processor.save_pretrained("processor")
    name_base("adapter", base)
    api = HfApi(endpoint=hub.url, token=WRITER)
    for repository, folder in ((adapter, "adapter"), (base, "base")):
        api.create_repo(repository)
        api.upload_folder(repo_id=repository, folder_path=folder)
    for folder in ("start", "adapter", "base"):
        shutil.rmtree(folder)
    return adapter, base, expected


def test_an_adapter_loads_by_its_name_alone(pushed):
    adapter, _, expected = pushed
    processor = AutoProcessor.from_pretrained(adapter)
    for model in (
        AutoModelForImageTextToText.from_pretrained(adapter),
        AutoModelForImageTextToText.from_pretrained(adapter, revision="main"),
        flamingo_ft.FlamingoForConditionalGeneration.from_pretrained(adapter),
        pipeline("image-text-to-text", model=adapter).model,
        AutoPeftModel.from_pretrained(adapter, import_allowlist=["flamingo_ft"]),
    ):
        assert torch.equal(regimes.logits(model, processor), expected)


@pytest.mark.slow
def test_an_adapter_that_names_only_its_language_model_is_refused_with_what_it_lacks(pushed, hub, tmp_path):
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo("somebody/lm")
    api.upload_file(
        repo_id="somebody/lm", path_or_fileobj=b'{"model_type": "opt"}', path_in_repo="config.json"
    )
    with pytest.raises(UserError, match="somebody/lm: expected a Flamingo, got model_type 'opt'"):
        flamingo_ft.FlamingoForConditionalGeneration.from_pretrained("somebody/lm")
    fetched = [request for request in hub.requests if "somebody/lm/resolve/" in request]
    assert fetched and all(request.endswith("config.json") for request in fetched)


@pytest.mark.slow
def test_a_composition_on_the_hub_is_the_base(pushed):
    _, base, _ = pushed
    model = AutoModelForImageTextToText.from_pretrained(base)
    assert model.config.bridge_init and not hasattr(model, "peft_config")


def test_revision_token_and_cache_dir_are_used_for_the_adapter_and_its_base(pushed, hub, tmp_path):
    adapter, base, expected = pushed
    commit = hub.repositories[adapter].history[-1].oid
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.upload_file(repo_id=adapter, path_or_fileobj=b"{}", path_in_repo="config.json")
    hub.repositories[adapter].private = hub.repositories[base].private = True
    options = {"revision": commit, "token": READER, "cache_dir": tmp_path / "elsewhere"}
    with pytest.raises(OSError, match="private"):
        flamingo_ft.FlamingoForConditionalGeneration.from_pretrained(adapter)
    model = flamingo_ft.FlamingoForConditionalGeneration.from_pretrained(adapter, **options)
    assert len(list((tmp_path / "elsewhere").glob("models--*"))) == 2
    assert not (tmp_path / "hub_cache").exists()
    assert torch.equal(regimes.logits(model, AutoProcessor.from_pretrained(tmp_path / "processor")), expected)
