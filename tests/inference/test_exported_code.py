"""A merged model with its code beside it answers without the package, through transformers alone."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForImageTextToText

import flamingo_ft
from flamingo_ft.adapters.remote_code import write_code
from flamingo_ft.data.collate import load_media
from flamingo_ft.inference.answer import answer
from tests.data.dialogues import nano_processor
from tests.model.kinds_of_images import KINDS

from .conftest import PROMPT

ROOTS = {
    "torch",
    "jinja2",
    "transformers",
    "open_clip",
    "timm",  # which open_clip_torch installs
    "huggingface_hub",
    "PIL",
    "numpy",
    "safetensors",
    "bitsandbytes",
}
SCRIPT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flamingo_ft":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, prompt, *images = sys.argv[1:]
trusted = {"trust_remote_code": True}
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
config = AutoConfig.from_pretrained(folder, **trusted)
model = AutoModelForImageTextToText.from_pretrained(folder, **trusted)
processor = AutoProcessor.from_pretrained(folder, **trusted)
ask = pipeline("image-text-to-text", model=folder, **trusted)
for paths in images[:1], images:
    content = [*({"type": "image", "path": image} for image in paths), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, **options)
    new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    print("<", processor.decode(new, skip_special_tokens=True).strip(), ">", sep="")
    print("<", ask(text=messages, return_full_text=False)[0]["generated_text"].strip(), ">", sep="")
for kind in ("RGBA", "16-bit PNG"):
    pixels = processor(images=kind + ".png", text="<image>", return_tensors="pt")["pixel_values"]
    print(kind, pixels.double().sum().item())
"""


@pytest.fixture
def with_code(folders, tmp_path):
    folder, paths = folders
    shutil.copytree(folder / "merged", tmp_path / "with_code")
    write_code(tmp_path / "with_code")
    return tmp_path / "with_code", paths


def names_of(module: ast.Module) -> set[str]:
    """The names that a module defines or imports, also inside a try or an if."""
    names, statements = set(), list(module.body)
    while statements:
        one = statements.pop()
        if isinstance(one, (ast.FunctionDef, ast.ClassDef)):
            names.add(one.name)
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in one.names}
        elif isinstance(one, (ast.Assign, ast.AnnAssign)):
            names |= {n.id for n in ast.walk(one) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        else:
            statements += [
                child for child in ast.walk(one) if isinstance(child, ast.stmt) and child is not one
            ]
    return names


def test_the_files_import_only_each_other_and_dependencies(with_code):
    folder, _ = with_code
    files = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    assert (
        len(files) > 10 and "flamingo_backbones_mosaic_gpt" in files
    )  # an architecture that transformers lacks
    for name, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, name
                assert {alias.name for alias in node.names} <= names_of(files[node.module]), name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert {module.split(".")[0] for module in modules} <= ROOTS | sys.stdlib_module_names, name


def test_with_the_package_installed_its_own_classes_are_used(with_code):
    model = AutoModelForImageTextToText.from_pretrained(with_code[0])
    assert type(model) is flamingo_ft.FlamingoForConditionalGeneration


@pytest.mark.slow
def test_the_answers_are_the_same_without_the_package(with_code, tmp_path):
    folder, paths = with_code
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "code"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), PROMPT, *map(str, paths)]
    kinds = {kind: KINDS[kind].content for kind in ("RGBA", "16-bit PNG")}
    for kind, content in kinds.items():
        (tmp_path / f"{kind}.png").write_bytes(content)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    expected = [f"<{answer(folder, images, PROMPT)}>" for images in (paths[:1], paths) for _ in range(2)]
    shown = load_media(
        nano_processor(), [{"images": [content], "where": kind} for kind, content in kinds.items()]
    )
    sums = shown["pixel_values"].double().sum((1, 2, 3, 4)).tolist()
    expected += [f"{kind} {total}" for kind, total in zip(kinds, sums, strict=True)]
    assert done.stdout.splitlines() == expected, done.stderr
