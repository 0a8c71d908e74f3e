import json
import os
import platform
import subprocess
import sys

import pytest

from flamingo_ft.backbones.freed_memory import SET_BY_USER

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")

# A process of its own: what a test before this one freed would be handed out again and stay in the process.
MEASURE = """
import json
from pathlib import Path

from flamingo_ft.backbones.freed_memory import freed_memory_returned


def resident():  # MiB
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def returned():  # MiB, once 64 of 128 blocks of 1 MiB are freed: every other one
    blocks = [b"x" * 2**20 for _ in range(128)]
    before = resident()
    del blocks[::2]
    return before - resident()


with freed_memory_returned():
    with freed_memory_returned():
        within = returned()
    inside = returned()
print(json.dumps([within, inside, returned()]))
"""


def returned(**environment: str) -> list[float]:
    """Return the MiB that go back to the system in the inner block, in the outer one and after both."""
    others = {name: value for name, value in os.environ.items() if name not in SET_BY_USER}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_freed_blocks_return_to_the_system_inside_also_after_a_block_within():
    within, inside, afterwards = returned()
    assert within > 60
    assert inside > 60
    assert afterwards < 4  # kept for the next allocation, which training relies on for speed


def test_thresholds_of_the_environment_are_left_alone():
    assert max(returned(MALLOC_MMAP_THRESHOLD_=str(32 * 2**20))) < 4
