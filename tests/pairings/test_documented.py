"""`docs/models.md` lists what is tested here, and the recorded chat templates are what their README says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from flamingo_ft.config.library import packaged_recipes

from .published_models import MODELS, RECORDED
from .published_towers import TOWERS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SOURCES = (RECORDED / "README.md").read_text(encoding="utf-8")


def test_the_page_lists_every_model_with_its_class_and_its_template():
    for model in MODELS:
        name = re.sub(r"-v0\.1$", "", model.name)
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{model.model_type}`" in row
        assert ("recorded" if model.template.parent == RECORDED else f"TRL `{model.template.stem}`") in row


def test_the_page_lists_every_tower_with_its_number_of_tokens():
    for tower in TOWERS:
        tag = f", pretrained: {tower.pretrained}" if tower.pretrained else ""
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{{name: {tower.name}{tag}}}` |")]
        assert row.endswith(f"| {tower.tokens} |")


def test_the_page_names_recipes_that_exist():
    assert {*re.findall(r"recipe `(\w+)`", PAGE)} <= {*packaged_recipes()}


def test_every_recorded_template_is_unchanged_and_has_source_and_licence():
    for file in RECORDED.glob("*.jinja"):
        (row,) = [line for line in SOURCES.splitlines() if line.startswith(f"| `{file.name}` |")]
        assert hashlib.sha256(file.read_bytes()).hexdigest() in row
        assert re.search(r"\| (Apache-2\.0|MIT) \|", row)
