"""transformers knows the Flamingo after `import flamingo_ft`, in any order of imports."""

import subprocess
import sys
from pathlib import Path

import pytest

import flamingo_ft

ASK = "import transformers; transformers.AutoConfig.for_model('flamingo')"
LOADS = (
    "F = flamingo_ft.model.FlamingoForConditionalGeneration; assert 'adapters' in F._load_adapter.__module__"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        f"from importlib.util import find_spec; import flamingo_ft; find_spec('transformers'); {ASK}",
        f"from flamingo_ft.backbones.language import load_language; {ASK}",
        f"import flamingo_ft.model; {ASK}; {LOADS}",
    ],
)
def test_transformers_knows_the_flamingo(script):
    environment = {"PYTHONPATH": str(Path(flamingo_ft.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
