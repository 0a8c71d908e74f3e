"""A whole check: recipe -> every row looked at -> findings -> files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.data.epochs import samples_per_epoch, steps_per_epoch, with_max_steps
from flamingo_ft.data.render import apply_template
from flamingo_ft.data.stream.order import WeightedSource
from flamingo_ft.model.backbone_files import backbone_files, own_ends, text_limit
from flamingo_ft.progress import progress_bars

from .account import Account
from .encoding import Encoding
from .figures import save_figures
from .findings import Findings, Length
from .folder import RECORD_FILE, check_folder
from .page import write_page
from .preview import first_samples
from .problems import ProblemList
from .rows import Looking, look
from .text_form import text_form

PROBLEMS_FILE = "problems.jsonl"


def check(recipe: Recipe, name: str, folder: Path) -> Findings:
    """Look at every row of the recipe's data; write check.html, check.json, problems.jsonl and figures to ``folder``.

    No weights are fetched or loaded. name: what the recipe is called. Raises UserError for a source that cannot be
    opened, for backbones that do not exist, and for a folder that holds something else than an earlier check.
    """
    with check_folder(folder) as new:
        files = backbone_files(recipe.model)
        processor = files.processor()
        apply_template(processor, recipe.data)
        limit = text_limit(files.language, recipe.data.max_text_tokens)
        encoding = Encoding(processor, recipe.data, limit, compares=recipe.train.method == "dpo")
        data = open_data(recipe.data, recipe.train.seed)
        mixture = [*data.train, *data.eval]
        account = Account(data, recipe.eval, encoding.limit, ProblemList(new / PROBLEMS_FILE))
        _look_at_all(mixture, encoding, account, recipe.train.num_workers)
        form = text_form(processor, own_ends(recipe.model))
        findings = replace(account.findings(name, _length(recipe, data)), text_form=form)
        (new / RECORD_FILE).write_text(json.dumps(findings.record(), indent=2) + "\n", encoding="utf-8")
        shown = [
            first_samples(part, mixed, encoding, recipe.data.video_frames)
            for part, mixed in enumerate(mixture)
        ]
        write_page(new, findings, account.problems, shown, save_figures(findings, new))
    return findings


def _length(recipe: Recipe, data: OpenedData) -> Length:
    per_epoch, steps = steps_per_epoch(recipe, data), with_max_steps(recipe, data).train.max_steps
    epochs = None if per_epoch is None else float(steps / per_epoch)
    return Length(steps, epochs, samples_per_epoch(recipe, data), recipe.data.packing)


def _look_at_all(
    mixture: Sequence[WeightedSource], encoding: Encoding, account: Account, workers: int
) -> None:
    looking = Looking([mixed.source for mixed in mixture], encoding, account.section.video_frames)
    total = sum(mixed.size for mixed in mixture) if all(mixed.source.indexed for mixed in mixture) else None
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("checking", total=total, note="")
        for seen in look(mixture, looking, workers):
            account.add(seen)
            found = account.problems.count
            progress.update(bar, advance=1, note=f"problems: {found:,}" if found else "")
