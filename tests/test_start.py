"""What answering does not need is not imported until it is."""

import json
import subprocess
import sys

# Each takes a tenth of the start or more.
SLOW = ("bitsandbytes", "datasets", "pandas", "pyarrow", "trl", "matplotlib", "torch._inductor.compile_fx")
QUANTIZE = """
import json, sys
import flamingo_ft.inference.predictor
before = [name for name in {slow} if name in sys.modules]
import peft
from peft.import_utils import is_bnb_available
from transformers.utils import is_bitsandbytes_available
from flamingo_ft import Quantization
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import quantization_formats
lm = load_language("nano", quantization=Quantization("nf4")).model
lora = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), lm)
layer = type(lora.model.layers[0].self_attn.q_proj)
print(json.dumps([before, is_bnb_available(), is_bitsandbytes_available(), layer.__module__,
                  sorted(quantization_formats(lm))]))
"""


def test_slow_packages_are_imported_when_they_are_needed_and_work_then():
    code = QUANTIZE.format(slow=SLOW)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == [[], True, True, "peft.tuners.lora.bnb", ["4bit"]]
