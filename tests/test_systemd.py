"""The shipped units: hardened as the documents say, alike where they should be, and understood by systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNITS = ("streamd.service", "streamd@.service")
GPU_AT_MOST, CPU_AT_MOST = 2.0, 1.3  # of systemd's exposure level, from 0 (none) to 10

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing (Debian: systemd)"
)


def shipped(name: str) -> str:
    return (ROOT / "systemd" / name).read_text()


def exposure(unit: str, text: str, folder: Path, *, drop_in: str = "") -> float:
    """Ask systemd-analyze how exposed a unit is."""
    (folder / unit).write_text(text)
    (folder / f"{unit}.d").mkdir()
    (folder / f"{unit}.d" / "cpu.conf").write_text(drop_in)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(folder / unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, f"{done.stdout}\n{done.stderr}"
    return float(found[1])


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_as_hardened_as_a_gpu_allows(unit: str, tmp_path: Path) -> None:
    assert exposure(unit, shipped(unit), tmp_path) <= GPU_AT_MOST


@pytest.mark.parametrize("unit", UNITS)
def test_on_a_cpu_no_device_is_left(unit: str, tmp_path: Path) -> None:
    assert exposure(unit, shipped(unit), tmp_path, drop_in=shipped("cpu.conf")) <= CPU_AT_MOST


def test_the_bounds_would_see_options_that_are_lost(tmp_path: Path) -> None:
    weak = re.sub("^(SystemCallFilter|CapabilityBoundingSet)=.*$", "", shipped("streamd.service"), flags=re.MULTILINE)
    assert exposure("streamd.service", weak, tmp_path) > GPU_AT_MOST


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    text = shipped(unit).replace("/opt/streamd/bin/streamd", "/bin/true")
    (tmp_path / unit).write_text(text)
    checked = tmp_path / unit.replace("@.", "@north.")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", checked], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert not [line for line in said.splitlines() if unit.partition(".")[0].rstrip("@") in line], said


def test_the_template_differs_by_the_name_alone() -> None:
    plain, template = map(shipped, UNITS)
    template = template.replace("# Not within /run/streamd, which goes when streamd.service stops.\n", "")
    template = template.replace("/etc/streamd/%i.yaml", "/etc/streamd/streamd.yaml").replace("streamd@%i", "streamd")
    for with_name in (": %i", "/%i", "-%i"):
        template = template.replace(with_name, "")
    assert template == plain


@pytest.mark.parametrize("unit", UNITS)
def test_no_option_that_breaks_a_model_is_on(unit: str) -> None:
    """Tried: oneDNN and NVRTC compile as they go; torch finds no vector instructions without /proc/cpuinfo; libzmq
    aborts the process where it may not ask netlink, or set the scheduling of its threads."""
    lines = [line for line in (shipped(unit) + shipped("cpu.conf")).splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.match(r"MemoryDenyWriteExecute=|ProcSubset=|.*@resources", line)]
    assert any("AF_NETLINK" in line for line in lines)
