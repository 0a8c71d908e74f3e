"""The recipes that ship with the package: `flamingo_ft/recipes` in the wheel, `recipes/` in a checkout."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from flamingo_ft.errors import UserError


def library_folder() -> Path:
    """The folder of the packaged recipes. Raises UserError where the package was installed without them."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"found no recipes beside {package}; install flamingo_ft again")


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
    raise UserError(f"recipe {path_or_name}: {kind}; packaged recipes have plain names: {', '.join(near)}")


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
    """Copy a packaged recipe, and the folder of its data where it has one, into `folder`.

    Returns what was written. Raises UserError for an unknown name and when any of it is there already.
    """
    known = packaged_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or sorted(known)
        raise UserError(f"recipe {name}: no packaged recipe of this name; known: {', '.join(near)}")
    sources = [source for source in (known[name], known[name].with_suffix("")) if source.exists()]
    copies = [folder / source.name for source in sources]
    for target in copies:
        if target.exists():
            raise UserError(f"{target}: exists already; choose another folder: recipes copy {name} FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, copies, strict=True):
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return copies
