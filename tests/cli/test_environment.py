"""`flamingo-ft env` reports what is there, what is broken and what is missing, and nothing about its user."""

import json
import platform
import sys
from pathlib import Path

import pytest

from flamingo_ft import cli
from flamingo_ft.cli import environment
from flamingo_ft.cli.environment import anonymous

GPU = {
    "name": "Some GPU",
    "total_gib": 79.2,
    "free_gib": 70.0,
    "compute_capability": "9.0",
    "dtypes": ["fp32", "bf16"],
}
DEVICES = {
    "cuda": "13.0",
    "hip": None,
    "mps_available": False,
    "cpu_capability": "AVX2",
    "cpu_has_bf16": False,
    "threads": 4,
    "gpus": [GPU],
}
RESULTS = {"devices": DEVICES, "memory": {"total_gib": 64.0, "free_gib": 60.0}, "4-bit": {"device": "cuda"}}


@pytest.fixture
def probed(monkeypatch):
    """Replace the probe, which imports every package, by fixed results."""

    def replace(results, problems):
        monkeypatch.setattr(environment, "_probe", lambda steps: (results, problems))

    replace(RESULTS, {"8-bit": "RuntimeError: no kernel", "bitsandbytes": "OSError: libcudart.so.13"})
    return replace


def test_versions_hardware_and_what_is_broken_are_in_the_text(probed, capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") for line in lines)
    text = "\n".join(lines)
    for words in (
        "- GPU 0: Some GPU, 79.2 GiB, 70.0 GiB free, compute capability 9.0, fp32, bf16",
        "(BROKEN: OSError: libcudart.so.13)",
        "- 4-bit matrices: work",
        "- 8-bit matrices: do not work (RuntimeError: no kernel)",
        f"- Python: {platform.python_version()}",
        "host RAM: 64.0 GiB, 60.0 GiB free",
    ):
        assert words in text


def test_as_json_it_is_the_same_record(probed, capsys):
    assert cli.main(["env", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["devices"]["gpus"] == [GPU]
    assert record["packages"]["bitsandbytes"]["problem"] == "OSError: libcudart.so.13"
    assert record["quantization"]["8-bit"] == {"works": False, "problem": "RuntimeError: no kernel"}


def test_everything_that_is_broken_is_reported(probed, monkeypatch):
    probed({}, dict.fromkeys(["devices", "memory", "torch", "4-bit", "8-bit"], "ImportError: no"))
    monkeypatch.setattr(environment, "PACKAGES", {"torch": "torch", "no-such-package": "none"})
    monkeypatch.setattr(environment, "EXTRAS", {"video": ("videos", ("no_such_module",))})
    text = environment.as_text(environment.environment())
    assert "GPUs: unknown (ImportError: no)" in text and "host RAM: unknown (ImportError: no)" in text
    assert "- no-such-package: not installed" in text and "(BROKEN: ImportError: no)" in text
    assert "missing extra video (no_such_module), for videos: pip install 'flamingo_ft[video]'" in text


def test_a_package_that_ends_the_process_does_not_hide_those_after_it(tmp_path, monkeypatch):
    modules = {
        "sound_one": "print('noise', end='')",
        "dies": "import os; os._exit(11)",
        "raises": f"raise OSError('{tmp_path}/lib/libthing.so.3: cannot open shared object file')",
        "exits": "import sys; sys.exit('bad')",
        "sound_two": "",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results, problems = environment._probe([*modules, "memory", "not_there"])
    assert set(results) == {"sound_one", "sound_two", "memory"} and results["memory"]["total_gib"] > 0
    assert problems == {
        "dies": "the process ended with code 11",
        "raises": "OSError: libthing.so.3: cannot open shared object file",
        "exits": "bad",
        "not_there": "ModuleNotFoundError: No module named 'not_there'",
    }


def test_a_package_that_hangs_is_reported(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "TIMEOUT_SECONDS", 1)
    assert environment._probe(["hangs"]) == ({}, {"hangs": "did not end within 1 s"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OSError: /opt/x/libcudart.so.12: no such file", "OSError: libcudart.so.12: no such file"),
        ("found /home/ann in the way", "found <path> in the way"),
        (r"cannot load C:\Users\Ann\x.dll", "cannot load x.dll"),
        (
            "cannot import 'a' from 'b' (/srv/venv/lib/b/__init__.py)",
            "cannot import 'a' from 'b' (__init__.py)",
        ),
        ("CUDA 12.1/13.0 and 3/4", "CUDA 12.1/13.0 and 3/4"),
        ("token hf_abcdefghijklmnop", "token <token>"),
        ("two\nlines", "two lines"),
    ],
)
def test_paths_and_tokens_are_taken_out(text, expected):
    assert anonymous(text) == expected


def test_names_of_user_and_machine_are_taken_out(monkeypatch):
    monkeypatch.setenv("USER", "annlee")
    monkeypatch.setattr(platform, "node", lambda: "ann-laptop")
    assert anonymous("annlee on ann-laptop, not annlees") == "<name> on <name>, not annlees"
    assert (
        anonymous(f"{Path.home() / 'work' / 'x.py'} {Path.cwd() / 'y.py'} {sys.prefix}") == "x.py y.py <path>"
    )


def test_every_extra_of_the_package_is_known():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    extras = {line.partition(" = ")[0] for line in section.splitlines()}
    assert extras - {"test"} == set(environment.EXTRAS)


@pytest.mark.slow
def test_every_package_works_on_this_machine_and_matrices_can_be_quantized():
    record = environment.environment()
    assert not [name for name, package in record["packages"].items() if package["problem"]]
    assert all(step["works"] for step in record["quantization"].values())
    text = json.dumps(record)
    assert str(Path.home()) not in text and str(Path.cwd()) not in text and sys.prefix not in text
