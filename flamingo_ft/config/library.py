"""The recipes that ship with the package: `flamingo_ft/recipes` in the wheel, `recipes/` in a checkout."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Collection
from pathlib import Path

import yaml

from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import nearest_path

SCHEMA_FILE = "recipe.schema.json"
"""The JSON schema of a recipe, which editors read: beside the packaged recipes, and beside a copy."""


def library_folder() -> Path:
    """The folder of the packaged recipes. Raises UserError where the package was installed without them."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"found no recipes beside {package}; install flamingo_ft again")


def is_packaged(recipe: Path) -> bool:
    """Whether a recipe's file is one that ships with the package."""
    package = Path(__file__).resolve().parents[1]
    return recipe.resolve().parent in (package / "recipes", package.parent / "recipes")


def packaged_recipes() -> dict[str, Path]:
    """Name and file of every packaged recipe, by name."""
    return {path.stem: path for path in sorted(library_folder().glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file that is meant: a path, or the name of a packaged recipe.

    Raises UserError when it is neither, naming the nearest packaged recipe.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    known = packaged_recipes()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    kind = "a folder, not a recipe file" if path.is_dir() else "no such file or packaged recipe"
    near = difflib.get_close_matches(path.stem, known, n=1) or sorted(known)
    nearest = None if path.is_dir() or not path.suffix else nearest_path(path)
    meant = f"did you mean {nearest}? " if nearest else ""
    raise UserError(
        f"recipe {path_or_name}: {kind}; {meant}packaged recipes have plain names: {', '.join(near)}"
    )


def summary(recipe: Path) -> str:
    """What a recipe says of itself: the first comment line of its header, or nothing."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#"):
            return ""
        if text:
            return text
    return ""


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a packaged recipe, the folders of its data, and the JSON schema that editors use, into `folder`.

    A schema that is there already stays, and so does data of another recipe that was copied there before. Returns what
    was written. Raises UserError for an unknown name and when anything else is there already.
    """
    known = packaged_recipes()
    _refuse_unknown(name, known)
    copies = {source: folder / source.name for source in (known[name], *_data_folders(known[name]))}
    schema = known[name].with_name(SCHEMA_FILE)
    if schema.is_file() and not (folder / SCHEMA_FILE).exists():
        copies[schema] = folder / SCHEMA_FILE
    wanted = {source: target for source, target in copies.items() if not _is_copy(source, target)}
    for target in wanted.values():
        if target.exists():
            raise UserError(f"{target}: exists already; choose another folder: recipes copy {name} FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in wanted.items():
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return list(wanted.values())


def recipe_text(name: str) -> str:
    """The text of a packaged recipe. UserError for an unknown name."""
    known = packaged_recipes()
    _refuse_unknown(name, known)
    return known[name].read_text(encoding="utf-8")


def _refuse_unknown(name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or sorted(known)
        raise UserError(f"recipe {name}: no packaged recipe of this name; known: {', '.join(near)}")


def _data_folders(recipe: Path) -> list[Path]:
    """The folders beside a recipe that its data lie in."""
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]
    entries = [entry for split in ("train", "eval") for entry in data.get(split, ())]
    paths = [Path(entry[key]) for entry in entries for key in ("path", "image_root") if entry.get(key)]
    return list(dict.fromkeys(recipe.parent / path.parts[0] for path in paths))


def _is_copy(source: Path, target: Path) -> bool:
    """Whether `target` is a folder with the same files, by name and size."""
    return target.is_dir() and _sizes(source) == _sizes(target)


def _sizes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
