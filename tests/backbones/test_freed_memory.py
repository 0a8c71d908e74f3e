import sys

import pytest
import torch

from flamingo_ft.backbones.freed_memory import freed_memory_returned
from tests.benchmarks.loading_memory import status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**18  # float32 values


@pytest.fixture(autouse=True)
def no_thresholds_of_the_environment(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def returned() -> float:
    """Free 64 of 128 blocks of 1 MiB, every other one, and return how many MiB the process has less."""
    blocks = [torch.ones(MIB) for _ in range(128)]
    before = status("RssAnon")
    del blocks[::2]
    return before - status("RssAnon")


def test_freed_blocks_return_to_the_system_inside_also_after_a_block_within():
    with freed_memory_returned():
        with freed_memory_returned():
            assert returned() > 56
        assert returned() > 56
    assert returned() < 8  # kept for the next allocation, which training relies on for speed


def test_thresholds_of_the_environment_are_left_alone(monkeypatch):
    with freed_memory_returned():
        pass  # from here on, glibc keeps what is freed
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    with freed_memory_returned():
        assert returned() < 8
