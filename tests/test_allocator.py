"""Large tensors lie in huge pages, where the kernel has them."""

from __future__ import annotations

import subprocess
import sys

from streamd.allocator import take_huge_pages
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
