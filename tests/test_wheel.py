"""The wheel has all that the package needs and nothing of the tests, and works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from flamingo_ft.config.library import packaged_recipes
from flamingo_ft.version import __version__

pytestmark = pytest.mark.slow  # builds and installs the package, and imports everything three times

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds until a command is killed
SHORT_RUN = ("train.max_steps=2", "eval.max_samples=8", "train.output_dir=run")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return its output; fail with its errors if it does."""
    result = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the scripts of a virtual environment that has the wheel, and the packages of this environment.

    A path in a .pth file is not searched for further .pth files, so that an editable installation of the
    checkout in this environment is not found.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    packages = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "packages.pth").write_text("\n".join(sorted(packages)))
    install = ("install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return folder / "bin"


def sources(folder: str) -> set[str]:
    """Return the files below a folder of the checkout, relative to the checkout, without compiled ones."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_everything_but_the_tests(wheel):
    packaged = {name for name in ZipFile(wheel).namelist() if not name.startswith("flamingo_ft-")}
    assert packaged == {*sources("flamingo_ft"), *(f"flamingo_ft/{name}" for name in sources("recipes"))}
    needed = ("py.typed", "adapters/card.md.jinja", "recipes/recipe.schema.json", "recipes/constraints.txt")
    assert {f"flamingo_ft/{name}" for name in needed} <= packaged


def test_the_wheel_has_its_license_and_version(wheel):
    assert wheel.name.startswith(f"flamingo_ft-{__version__}-")
    assert f"flamingo_ft-{__version__}.dist-info/licenses/LICENSE" in ZipFile(wheel).namelist()


def test_the_installed_package_works_in_an_empty_folder_without_the_checkout(installed, tmp_path):
    command = installed / "flamingo-ft"
    code = "import sys, flamingo_ft; print(sys.path, flamingo_ft.__file__)"
    found = run(installed / "python", "-c", code, cwd=tmp_path, PYTHONPATH="")
    assert str(ROOT) not in found and str(installed.parent) in found
    listed = run(command, "recipes", "list", cwd=tmp_path, PYTHONPATH="")
    assert all(name in listed for name in packaged_recipes())
    assert f"- flamingo_ft: {__version__}\n" in run(command, "env", cwd=tmp_path, PYTHONPATH="")
    run(command, "train", "quickstart", *SHORT_RUN, cwd=tmp_path, PYTHONPATH="")
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "README.md").is_file()
