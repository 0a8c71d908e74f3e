"""Every packaged recipe trains a few steps and can be planned, and its adapter merges.

Recipes whose backbones come from the Hub are in test_open_flamingo_recipes.py and emoji/test_learning.py.
"""

import json
from pathlib import Path

import pytest

from flamingo_ft import cli
from flamingo_ft.config.library import packaged_recipes

from .recipe_needs import needs_the_hub

FEW = ["train.max_steps=3", "eval={max_samples: 8, before: false}", "train.warmup_steps=1"]
MERGED = ("bridge", "bridge_lora", "lora_only", "pages", "stages")  # the others' adapters are like these


@pytest.mark.slow
def test_every_packaged_recipe_trains_and_merges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(name for name, path in packaged_recipes().items() if not needs_the_hub(path))
    assert names.index("bridge") < names.index("lora_only"), "lora_only starts from the run of bridge"
    for name in names:
        assert cli.main(["train", name, *FEW]) == 0, name
        metrics = json.loads(Path("runs", name, "metrics.json").read_text())
        assert (
            metrics["train"]["steps"] == 3 * len(metrics.get("stages", [name]))
            and 0 <= metrics["eval"]["accuracy"] <= 1
        )
        if name in MERGED:
            assert cli.main(["merge", f"runs/{name}", f"merged/{name}"]) == 0, name
        fresh = ["model.init_from=null", "model.bridge_quantization=none"]
        assert cli.main(["plan", name, *fresh, "--text-tokens", "16", "--images", "1"]) == 0, name
