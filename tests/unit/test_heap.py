"""Memory that is free goes back to the system, where glibc by itself would keep it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from pathlib import Path
from sdlora.heap import give_large_blocks_back

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 6 * 2**20


def block(size):
    place = libc.malloc(ctypes.c_size_t(size))
    libc.memset(place, 1, size)
    return place


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if sys.argv[1] == "give":
    give_large_blocks_back()
libc.free(block(SIZE))  # glibc takes this for what is to come, and keeps what is as large from now on
before, large = resident(), []
for _ in range(20):
    large.append(block(SIZE))
    block(2**16)  # stays between them
for place in large:
    libc.free(place)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_go_back_to_the_system() -> None:
    def left(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert left("give") < 10 * 2**20 < 60 * 2**20 < left("keep")
