"""Large tensors lie in huge pages, where the kernel has them, and threads share their memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from streamd.allocator import heap_in_use, take_huge_pages
from tests.conftest import ROOT

PROGRAM = """
from streamd.allocator import take_huge_pages
take_huge_pages()
import torch
tensor = torch.ones(64 << 20, dtype=torch.uint8)
address = tensor.data_ptr() + (32 << 20)
for line in open("/proc/self/smaps"):
    head = line.split()[0]
    if "-" in head:
        begin, end = (int(part, 16) for part in head.split("-"))
    elif head == "VmFlags:" and begin <= address < end:
        print(line)
"""


COUNT_ARENAS = """
import ctypes, threading
import sys
from streamd import cli

sys.argv = ["streamd", "models", "--help"]
try: cli.main()
except SystemExit: pass
libc = ctypes.CDLL(None)
if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_info")):
    raise SystemExit("no glibc")
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
libc.fclose.argtypes = (ctypes.c_void_p,)
all_have = threading.Barrier(32)

def take():
    libc.malloc(ctypes.c_size_t(100_000))
    all_have.wait(60)

threads = [threading.Thread(target=take) for _ in range(32)]
for thread in threads: thread.start()
for thread in threads: thread.join()
out = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, out)
libc.fclose(out)
"""


LEAVE_HOLES = """
import ctypes
from streamd.allocator import give_back_freed_memory, keep_freed_memory

libc = ctypes.CDLL(None)
if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
    raise SystemExit("no glibc")
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)

def rss_mib():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

keep_freed_memory()
blocks = [libc.malloc(ctypes.c_size_t(1 << 20)) for _ in range(100)]
for block in blocks: ctypes.memset(block, 1, 1 << 20)
full = rss_mib()
for block in blocks[:-1]: libc.free(block)  # the last one holds the end of the heap
freed = rss_mib()
give_back_freed_memory()
print(full, freed, rss_mib())
"""


def said_with_glibc(program: str) -> str:
    """Run a program of this file in a process of its own; return its output, or skip where it finds no glibc."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=110)
    if done.stderr.strip() == "no glibc":
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernel_is_asked_for_huge_pages_behind_a_large_tensor() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.split()
    assert flags[0] == "VmFlags:" and "hg" in flags, done.stdout


def test_what_the_user_set_stays() -> None:
    environment = {"THP_MEM_ALLOC_ENABLE": "0"}
    take_huge_pages(environment)
    assert environment == {"THP_MEM_ALLOC_ENABLE": "0"}


def test_command_line_loads_no_torch_before_it_has_asked() -> None:
    program = "import sys, streamd.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_threads_of_a_command_share_two_arenas() -> None:
    assert 1 <= said_with_glibc(COUNT_ARENAS).count("<heap nr=") <= 2


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    full, freed, given_back = map(float, said_with_glibc(LEAVE_HOLES).split())
    assert freed > full - 1
    assert given_back < full - 90


def test_the_heap_in_use_is_what_was_allocated_and_not_freed() -> None:
    before = heap_in_use()
    if before is None:
        pytest.skip("the C library is not glibc 2.33 or later")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    blocks = [libc.malloc(ctypes.c_size_t(size)) for size in (1 << 10, 1 << 20, 100 << 20)]
    allocated = heap_in_use()
    for block in blocks:
        libc.free(block)
    freed = heap_in_use()
    assert allocated is not None and freed is not None
    assert allocated - before == pytest.approx(101 << 20, rel=0.02)
    assert freed - before == pytest.approx(0, abs=2 << 20)
