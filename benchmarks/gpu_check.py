"""Prove and time everything that needs a GPU, with what is there: `make gpu-check`.

    python -m benchmarks.gpu_check [--out benchmarks/results/NAME] [--budget 450]

Each part runs in a process of its own, so that a crash costs only its own rows, and ends when its time is over.
Writes NAME.json and NAME.md; what could not be run is a row that says why. Needs no network.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_rows import Row
from benchmarks.measure import ROOT

PACKAGES = ("torch", "torchvision", "cuda-python", "cuda-bindings", "cuda-core", "av", "nvidia-dali-cuda130", "numpy")
KERNEL_TESTS = ("test_cuda.py", "test_nms.py", "test_preprocess.py", "test_paste.py", "test_rle.py")


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the check."""

    name: str
    command: Sequence[str]
    limit_s: float
    prints_rows: bool = True  # False: it passes or fails as a whole


@dataclass(frozen=True, slots=True)
class Machine:
    gpu: str
    driver: str
    python: str
    packages: dict[str, str]
    revision: str


def describe() -> Machine:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = _output(query).split("\n")[0].split(", ")
    return Machine(
        gpu=", ".join(part for index, part in enumerate(found) if index != 1) or "none",
        driver=found[1] if len(found) > 1 else "none",
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        revision=_output(["git", "describe", "--always", "--dirty"]) or os.environ.get("REVISION", "unknown"),
    )


def missing() -> list[Row]:
    """Say what is not on this machine, and therefore not in the table."""
    rows = []
    if ctypes.util.find_library("nvcuvid") is None and not Path("/usr/local/nvidia/lib64/libnvcuvid.so.1").exists():
        rows.append(Row("NVDEC", None, "", note="the driver's libnvcuvid is not here"))
    for package, module in (("av", "av"), ("nvidia-dali-cuda130", "nvidia.dali")):
        if not _can_import(module):
            rows.append(Row(package, None, "", note="is not installed"))
    if shutil.which("compute-sanitizer") is None:
        rows.append(Row("compute-sanitizer", None, "", note="is not on the PATH"))
    return rows


def parts() -> list[Part]:
    python = sys.executable
    tests = [f"tests/{name}" for name in KERNEL_TESTS if (ROOT / "tests" / name).exists()]
    small = [python, "-m", "benchmarks.gpu_kernels", "--small"]
    found = [
        Part("kernels, timed", [python, "-m", "benchmarks.gpu_kernels"], 90),
        Part("pipeline, timed", [python, "-m", "benchmarks.gpu_pipeline"], 120),
        Part("zoo, timed", [python, "-m", "benchmarks.zoo", "--device", "cuda"], 180),
        Part("training, timed", [python, "-m", "benchmarks.training", "--device", "cuda"], 120),
        Part("streams through NVDEC", [python, "-m", "benchmarks.gpu_streams"], 150),
        Part("tests of the kernels", [python, "-m", "pytest", "-q", "-m", "gpu", *tests], 120, prints_rows=False),
        Part("other tests on the GPU", [python, "-m", "pytest", "-q", "-m", "gpu", "tests"], 120, prints_rows=False),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", *small]
            found.append(Part(f"compute-sanitizer {tool}", command, 90, prints_rows=False))
    return found


def run(part: Part, limit_s: float) -> list[Row]:
    """Run a part and return its rows; never raises for what the part does."""
    began = time.monotonic()
    try:
        done = subprocess.run(part.command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        output, code = done.stdout, done.returncode
        last = (done.stdout if part.name.startswith("compute-sanitizer") else done.stderr or done.stdout).strip()
    except subprocess.TimeoutExpired as err:
        output, code, last = _text(err.stdout), -1, f"not ready after {limit_s:.0f} s"
    except OSError as err:
        output, code, last = "", -1, str(err)
    rows = _rows_in(output) if part.prints_rows else []
    if not part.prints_rows:
        verdict = output.strip().splitlines()[-1:] or [last]
        rows.append(Row(part.name, float(code == 0), "passed", 1, note=verdict[0][-200:]))
    elif code != 0:
        rows.append(Row(part.name, None, "", note=(last.splitlines() or [f"exit code {code}"])[-1][-300:]))
    print(f"{part.name}: {time.monotonic() - began:.0f} s, exit code {code}", file=sys.stderr, flush=True)
    return rows


def table(machine: Machine, rows: Sequence[Row], command: str) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    lines = [
        f"# {command}",
        "",
        f"{machine.gpu}, driver {machine.driver}, Python {machine.python}; {packages}; revision {machine.revision}.",
        "",
        "| what | measured | to reach | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
        bound = "" if row.to_reach is None else f"{'>=' if row.at_least else '<='} {row.to_reach:g} {row.unit}"
        remark = "; ".join(part for part in (row.verdict, row.note) if part)
        lines.append(f"| {row.what} | {value} | {bound} | {remark.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=450, help="seconds for everything")
    options = parser.parse_args()
    ends_at = time.monotonic() + options.budget
    machine = describe()
    out = options.out or Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")) / _slug(machine.gpu)
    rows = missing()
    if machine.gpu == "none":
        rows.append(Row("everything", None, "", note="nvidia-smi finds no GPU"))
    for part in parts() if machine.gpu != "none" else []:
        left_s = ends_at - time.monotonic()
        if left_s < 10:
            rows.append(Row(part.name, None, "", note="the time for the whole check was over"))
            continue
        rows += run(part, min(part.limit_s, left_s))
        _write(out, machine, rows)
    _write(out, machine, rows)
    print(out.with_suffix(".md").read_text())
    raise SystemExit(any(row.verdict == "NOT MET" for row in rows))


def _write(out: Path, machine: Machine, rows: Sequence[Row]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": asdict(machine), "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(machine, rows, "make gpu-check"))


def _rows_in(output: str) -> list[Row]:
    return [Row(**json.loads(line)) for line in output.splitlines() if line.startswith('{"what"')]


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _slug(gpu: str) -> str:
    name = gpu.partition(",")[0].lower()
    return "gpu-" + "-".join("".join(c if c.isalnum() else " " for c in name).split())


if __name__ == "__main__":
    main()
