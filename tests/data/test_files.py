"""Files are found in any Unicode form of their name, and no form leads out of the image root."""

import json
import os
import unicodedata

import pytest

from flamingo_ft.config import DataSource
from flamingo_ft.data import read_samples
from flamingo_ft.data.files import resolve_unicode, same_name
from flamingo_ft.errors import UserError

from .fixtures import FACTS, SCANS, add_files

NFC, NFD = (unicodedata.normalize(form, "Café/über 가.png") for form in ("NFC", "NFD"))
SCAN, OTHER = ((SCANS / scan).read_bytes() for scan, _ in FACTS[:2])


def save(folder, name: str, content: bytes = SCAN):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def read(folder, image: str, **options):
    (folder / "x.jsonl").write_text(json.dumps({"image": image, "caption": "A."}))
    return read_samples(DataSource(path=folder / "x.jsonl", **options))[0].images[0]


@pytest.mark.parametrize(("stored", "written"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_a_name_matches_its_file_in_either_form(tmp_path, stored, written):
    path = save(tmp_path, stored)
    assert read(tmp_path, written) == str(path)
    assert read(tmp_path, str(tmp_path / written)) == str(path)


def test_parts_of_a_path_may_have_different_forms(tmp_path):
    path = save(tmp_path, f"{NFC.split('/')[0]}/{NFD.split('/')[1]}")
    assert read(tmp_path, NFC) == read(tmp_path, NFD) == str(path)


def test_the_exact_name_comes_first(tmp_path):
    paths = [save(tmp_path, NFC, SCAN), save(tmp_path, NFD, OTHER)]
    assert [read(tmp_path, name) for name in (NFC, NFD)] == [str(path) for path in paths]


def test_folders_of_a_recipe_match_in_either_form(tmp_path):
    root = tmp_path / unicodedata.normalize("NFD", "données")
    save(root, "a.png")
    save(root, "é.jsonl", json.dumps({"image": "a.png", "caption": "A."}).encode())
    named = tmp_path / unicodedata.normalize("NFC", "données")
    (sample,) = read_samples(DataSource(path=named / unicodedata.normalize("NFD", "é.jsonl")))
    assert os.path.samefile(sample.images[0], root / "a.png")
    assert len(read_samples(DataSource(path=named / "*.jsonl"))) == 1
    assert os.path.samefile(read(tmp_path, "a.png", image_root=named), root / "a.png")


def test_no_form_of_a_name_leads_out_of_the_image_root(tmp_path):
    save(tmp_path, NFD)
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path / NFD, root / unicodedata.normalize("NFD", "é.png"))
    for name in (f"../{NFC}", f"../{NFD}", str(tmp_path / NFC), unicodedata.normalize("NFC", "é.png")):
        with pytest.raises(UserError, match="outside of"):
            read(root, name)


def test_a_missing_name_is_reported_as_it_was_written(tmp_path):
    with pytest.raises(UserError, match="no such image .*Café/über 가.png; check"):
        read(tmp_path, NFC)
    assert resolve_unicode(tmp_path / NFC) == tmp_path / NFC


def test_images_of_a_tar_match_the_names_in_its_json_in_either_form(tmp_path):
    info = [{"matched_text_index": 0, "image_name": NFC.split("/")[1]}]
    document = json.dumps({"text_list": ["A."], "image_info": info}).encode()
    path = add_files(tmp_path / "x.tar", {"0.json": document, f"0.{NFD.split('/')[1]}": SCAN})
    assert read_samples(DataSource(path=path))[0].images == [SCAN]
    row = json.dumps({"question": "Q?", "answer": "A.", "images": [NFC.split("/")[1]]}).encode()
    path = add_files(tmp_path / "y.tar", {"0.json": row, f"0.{NFD.split('/')[1]}": SCAN})
    assert read_samples(DataSource(path=path))[0].images == [SCAN]
    assert same_name(NFC, NFD) and not same_name("a", "A")
