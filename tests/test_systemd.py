"""The shipped units: hardened as the documents say, alike where they should be, and understood by systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNITS = ("streamd.service", "streamd@.service")
GPU_AT_MOST, CPU_AT_MOST = 2.0, 1.3  # of systemd's exposure level, from 0 (none) to 10


def exposure(unit: str, folder: Path, drop_ins: Sequence[str] = ()) -> float:
    """Ask systemd-analyze how exposed a shipped unit is."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian: systemd)")
    shutil.copy(ROOT / "systemd" / unit, folder)
    (folder / f"{unit}.d").mkdir()
    for name in drop_ins:
        shutil.copy(ROOT / "systemd" / name, folder / f"{unit}.d")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(folder / unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, f"{done.stdout}\n{done.stderr}"
    return float(found[1])


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_as_hardened_as_a_gpu_allows(unit: str, tmp_path: Path) -> None:
    assert exposure(unit, tmp_path) <= GPU_AT_MOST


@pytest.mark.parametrize("unit", UNITS)
def test_on_a_cpu_no_device_is_left(unit: str, tmp_path: Path) -> None:
    assert exposure(unit, tmp_path, ["cpu.conf"]) <= CPU_AT_MOST


def test_the_bounds_would_see_an_option_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / "streamd.service.d").mkdir()
    text = (ROOT / "systemd" / "streamd.service").read_text()
    weak = tmp_path / "weak"
    weak.mkdir()
    (weak / "streamd.service").write_text(text.replace("SystemCallFilter=", "#").replace("CapabilityBounding", "#"))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", weak / "streamd.service"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found and float(found[1]) > GPU_AT_MOST


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian: systemd)")
    text = (ROOT / "systemd" / unit).read_text().replace("/opt/streamd/bin/streamd", "/bin/true")
    (tmp_path / unit).write_text(text)
    checked = tmp_path / unit.replace("@.", "@north.")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", checked], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert not [line for line in said.splitlines() if unit.partition(".")[0].rstrip("@") in line], said


def test_the_template_differs_by_the_name_alone() -> None:
    plain, template = ((ROOT / "systemd" / unit).read_text() for unit in UNITS)
    template = template.replace("# Not within /run/streamd, which goes when streamd.service stops.\n", "")
    template = template.replace("/etc/streamd/%i.yaml", "/etc/streamd/streamd.yaml").replace("streamd@%i", "streamd")
    for with_name in (": %i", "/%i", "-%i"):
        template = template.replace(with_name, "")
    assert template == plain


@pytest.mark.parametrize("unit", UNITS)
def test_no_option_that_breaks_a_model_is_on(unit: str) -> None:
    """Tried: oneDNN and NVRTC compile as they go; torch finds no vector instructions without /proc/cpuinfo; libzmq
    aborts the process where it may not ask netlink, or set the scheduling of its threads."""
    files = [ROOT / "systemd" / unit, ROOT / "systemd" / "cpu.conf"]
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.match(r"MemoryDenyWriteExecute=|ProcSubset=|.*@resources", line)]
    assert any("AF_NETLINK" in line for line in lines)
