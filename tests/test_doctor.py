"""The doctor says what is here and what is not, and never falls ill itself."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from streamd.doctor import doctor, examine

# What NVIDIA's driver answers on a machine with one H100, for the few calls that are made.
FAKE_CUDA = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)&cuInit; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void *context) { return context == (void *)&cuInit ? 0 : 201; }
int cuCtxPopCurrent_v2(void **context) { return 0; }
"""
FAKE_CUVID = """
struct caps {
    int codec, chroma;
    unsigned bit_depth_minus_8, reserved1[3];
    unsigned char supported, engines;
    unsigned short formats;
    unsigned max_width, max_height, max_blocks;
    unsigned short min_width, min_height;
    unsigned reserved3[11];
};
int cuvidGetDecoderCaps(struct caps *caps) {
    if (caps->chroma != 1 || caps->bit_depth_minus_8 != 0) return 1;
    caps->supported = caps->codec == 4 || caps->codec == 8;
    caps->engines = 7;
    caps->max_width = 8192;
    caps->reserved3[10] = 0;
    return 0;
}
"""


def findings_of(console: Console) -> dict[str, dict[str, Any]]:
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return {finding["name"]: finding for finding in map(json.loads, lines)}


def test_what_streamd_needs_is_found_on_a_machine_that_runs_its_tests() -> None:
    console = Console(file=io.StringIO())
    assert doctor(console, json_lines=True) == 0
    findings = findings_of(console)
    assert all(findings[name]["ok"] for name in ("Python", "PyTorch", "PyAV", "ZeroMQ"))
    assert "h264" in findings["PyAV"]["found"]
    assert all(finding["advice"] for finding in findings.values() if not finding["ok"]), "each gap has its advice"


def test_the_table_gives_each_finding_a_row() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert doctor(console) == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in shown for name in ("PyTorch", "NVDEC", "DALI", "V4L2", "ZeroMQ", "model cache", "systemd"))


@pytest.mark.parametrize(("module", "row", "code"), [("zmq", "zeromq", 1), ("av", "pyav", 1), ("redis", "redis", 0)])
def test_a_library_that_cannot_be_imported_is_a_row_and_not_a_crash(
    module: str, row: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    console = Console(file=io.StringIO())
    assert doctor(console, json_lines=True) == code
    assert not findings_of(console)[row]["ok"] and findings_of(console)["Python"]["ok"]


def test_a_machine_without_programs_is_examined_to_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = {finding.name: finding for finding in examine()}
    assert not findings["NVIDIA GPU"].ok and not findings["redis-server"].ok
    assert "systemd" in findings


def test_models_are_listed_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "gate.pt").touch()
    monkeypatch.setenv("STREAMD_MODELS", f"{tmp_path}/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    findings = {finding.name: finding for finding in examine()}
    assert findings["$STREAMD_MODELS"].found == f"{tmp_path}/mine: gate.pt"
    assert "no such folder" in findings["model cache"].found and "first use" in findings["model cache"].advice


@pytest.mark.parametrize(("driver", "fits"), [("580.65.06", True), ("535.104.05", False)])
def test_a_gpu_its_driver_and_its_decoders_are_described(driver: str, fits: bool, tmp_path: Path) -> None:
    findings = examine_with_gpu(tmp_path, driver)
    assert findings["NVIDIA GPU"]["found"] == "NVIDIA H100 80GB HBM3, 81559 MiB"
    assert findings["NVIDIA driver"]["ok"] is fits and findings["NVIDIA driver"]["found"] == driver
    assert findings["NVDEC"]["found"] == "7 engine(s), decodes h264, hevc"


def test_a_driver_that_does_not_answer_is_said_in_its_own_words(tmp_path: Path) -> None:
    findings = examine_with_gpu(tmp_path, "580.65.06", script="echo 'Driver/library version mismatch'; exit 18")
    assert findings["NVIDIA GPU"]["found"] == "nvidia-smi: Driver/library version mismatch"


def examine_with_gpu(folder: Path, driver: str, script: str | None = None) -> dict[str, dict[str, Any]]:
    """Run the doctor in a process that finds a driver made of stand-ins."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for a stand-in of NVIDIA's driver: apt-get install gcc")
    for library, source in (("libcuda.so.1", FAKE_CUDA), ("libnvcuvid.so.1", FAKE_CUVID)):
        arguments = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / library)]
        subprocess.run(arguments, input=source, text=True, check=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script or f'echo NVIDIA H100 80GB HBM3, 81559 MiB, {driver}'}\n")
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(folder),
    }
    command = [sys.executable, "-m", "streamd", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    return {finding["name"]: finding for finding in map(json.loads, answer.stdout.splitlines())}
