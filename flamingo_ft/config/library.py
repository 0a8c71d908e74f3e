"""The recipes that come with the package: `flamingo_ft/recipes` in the wheel, `recipes/` in a checkout."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import yaml

from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import nearest_path

SCHEMA_FILE = "recipe.schema.json"
"""The JSON schema of a recipe, for editors: beside the packaged recipes, and copied with them."""

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def library_folder() -> Path:
    """Return the folder of the packaged recipes. Raises UserError if there is none."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError(f"{_FOLDERS[0]}: the packaged recipes are missing; install flamingo_ft again")


def is_packaged(recipe: Path) -> bool:
    """Whether a recipe's file is a packaged one."""
    return recipe.resolve().parent in _FOLDERS


def packaged_recipes() -> dict[str, Path]:
    """Return the packaged recipes, name -> file, sorted by name."""
    return {path.stem: path for path in sorted(library_folder().glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """Return the file of a recipe, given its path or the name of a packaged recipe.

    Raises UserError, with the nearest packaged recipe, if it is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    known = packaged_recipes()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    problem = "a folder, not a recipe file" if path.is_dir() else "no such file or packaged recipe"
    nearest = None if path.is_dir() or not path.suffix else nearest_path(path)
    similar = [str(nearest)] if nearest else difflib.get_close_matches(path.stem, known, n=1)
    remedy = f"did you mean {similar[0]}?" if similar else "flamingo-ft recipes list names the packaged ones"
    raise UserError(f"recipe {path_or_name}: {problem}; {remedy}")


def summary(recipe: Path) -> str:
    """Return the first line of text in a recipe's header comment, or an empty string."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#"):
            return ""
        if text:
            return text
    return ""


def recipe_text(name: str) -> str:
    """Return the text of a packaged recipe. Raises UserError for an unknown name."""
    return _packaged_file(name).read_text(encoding="utf-8")


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a packaged recipe, the folders of its data and the JSON schema; return what was written.

    An existing schema stays, and so does data that was copied with another recipe. Raises UserError, before
    anything is written, for an unknown name and if any other target exists.
    """
    recipe = _packaged_file(name)
    copies = {source: folder / source.name for source in (recipe, *_data_folders(recipe))}
    schema = recipe.with_name(SCHEMA_FILE)
    if schema.is_file() and not (folder / SCHEMA_FILE).exists():
        copies[schema] = folder / SCHEMA_FILE
    copies = {source: target for source, target in copies.items() if not _is_copy(source, target)}
    for target in copies.values():
        if target.exists():
            raise UserError(f"{target}: exists already; choose another folder: recipes copy {name} FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in copies.items():
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    return list(copies.values())


def _packaged_file(name: str) -> Path:
    known = packaged_recipes()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1) or sorted(known)
        hint = f"did you mean {nearest[0]}?" if len(nearest) == 1 else f"known: {', '.join(nearest)}"
        raise UserError(f"recipe {name}: no packaged recipe of this name; {hint}")
    return known[name]


def _data_folders(recipe: Path) -> list[Path]:
    """Return the folders beside a recipe that contain its data; not those that a user has to fill."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    sections = [values.get("data", {}), *(stage.get("data", {}) for stage in values.get("stages", ()))]
    sources = [source for data in sections for split in ("train", "eval") for source in data.get(split, ())]
    paths = [Path(source[key]) for source in sources for key in ("path", "image_root") if source.get(key)]
    folders = dict.fromkeys(recipe.parent / path.parts[0] for path in paths)
    return [folder for folder in folders if folder.exists()]


def _is_copy(source: Path, target: Path) -> bool:
    """Whether ``target`` is a folder with the same files, by name and size."""
    return target.is_dir() and _file_sizes(source) == _file_sizes(target)


def _file_sizes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
