"""Files that a release changes name the same version, and the issue forms ask for what is needed."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from flamingo_ft.version import __version__

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_changelog_and_citation_name_this_version_with_one_date():
    (version, date), *_ = re.findall(
        r"^## \[(\d[\w.]*)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE
    )
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (version, date) == (__version__, citation["date-released"])
    assert citation["version"] == __version__


def test_the_citation_refers_to_both_papers():
    references = yaml.safe_load(read("CITATION.cff"))["references"]
    names = [identifier["value"] for reference in references for identifier in reference["identifiers"]]
    assert names == ["arXiv:2204.14198", "arXiv:2308.01390"]


def test_issue_forms_require_the_environment_and_the_recipe():
    for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        fields = {
            field.get("id"): field for field in yaml.safe_load(file.read_text(encoding="utf-8"))["body"]
        }
        assert all(fields[name]["validations"]["required"] for name in ("env", "recipe")), file
        assert "flamingo-ft env" in fields["env"]["attributes"]["label"]
