"""Packaged recipes of every kind train a few steps, can be planned, and their adapters merge.

All are tried in `training/test_trial.py`; those whose backbones come from the Hub train in
`test_open_flamingo_recipes.py` and `emoji/test_learning.py`.
"""

import json
from pathlib import Path

import pytest

from flamingo_ft import cli

FEW = ["train.max_steps=3", "eval={max_samples: 8, before: false}", "train.warmup_steps=1"]
RECIPES = ("bridge", "bridge_lora", "lora_only", "pages", "stages")  # the others' adapters are like these


@pytest.mark.slow
def test_recipes_train_and_merge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in RECIPES:  # lora_only starts from the run of bridge
        assert cli.main(["train", name, *FEW]) == 0, name
        metrics = json.loads(Path("runs", name, "metrics.json").read_text())
        assert (
            metrics["train"]["steps"] == 3 * len(metrics.get("stages", [name]))
            and 0 <= metrics["eval"]["accuracy"] <= 1
        )
        assert cli.main(["merge", f"runs/{name}", f"merged/{name}", "--samples", "8"]) == 0, name
        fresh = ["model.init_from=null", "model.bridge_quantization=none"]
        assert cli.main(["plan", name, *fresh, "--text-tokens", "16", "--images", "1"]) == 0, name
