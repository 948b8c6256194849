"""Read what the kernel counts about processes, and boil lists of numbers down."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PACKAGES = ("torch", "torchvision", "av", "opencv-python-headless", "pyzmq", "numpy", "msgspec")


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds, user and system, that a process has used since it began."""

    total_s: float  # of all its threads, those that have ended too
    threads_s: Mapping[str, float]  # of the living threads, by the first word of their names


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and with what a result was measured."""

    cpu: str
    cores: int
    kernel: str
    python: str
    packages: Mapping[str, str]
    revision: str  # of git; "-dirty" where files were changed
    date: str
    command: str


def read_cpu(pid: int) -> Cpu:
    """Read a process's CPU time from /proc. Raises ProcessLookupError where it has ended."""
    try:
        total_s = _cpu_s(Path(f"/proc/{pid}/stat"))
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    threads_s: dict[str, float] = defaultdict(float)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while we look
            threads_s[_group(thread_name(task))] += _cpu_s(task / "stat")
    return Cpu(total_s, dict(threads_s))


def machine_busy_s() -> float:
    """Read how long the cores have been busy with anything, or kept away by the hypervisor, in CPU seconds."""
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) * _TICK_S


def thread_name(task: Path) -> str:
    """Read the name of the thread whose folder under /proc/PID/task this is."""
    return (task / "comm").read_text().strip()


def thread_cpu_s(task: Path) -> float:
    """Read the CPU seconds of the thread whose folder under /proc/PID/task this is."""
    return _cpu_s(task / "stat")


def peak_memory_mib(pid: int) -> float:
    """Read the most memory that a process has held (VmHWM), in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds."""

    memory_mib: float  # its own (RssAnon): files that are mapped come and go with the page cache
    descriptors: int
    threads: int


def read_usage(pid: int) -> Usage:
    """Read what a process holds from /proc. Raises ProcessLookupError where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        num_descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    fields = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in fields:  # a zombie has none
        raise ProcessLookupError(f"process {pid} has ended")
    return Usage(int(fields["RssAnon"].split()[0]) / 1024, num_descriptors, int(fields["Threads"]))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all do not exceed; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, -int(-len(values) * share // 1) - 1)]


def describe_machine(
    arguments: Sequence[str], module: str = "benchmarks.streams", packages: Sequence[str] = _PACKAGES
) -> Machine:
    """Say on what the `module` measured with these arguments; names no path of the machine."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpu_info if line.startswith("model name")]
    return Machine(
        cpu=models[0] if models else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=platform.python_version(),
        packages={name: version(name) for name in packages},
        revision=_revision(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=" ".join([f"python -m {module}", *map(_without_folders, arguments)]),
    )


def _cpu_s(stat: Path) -> float:
    # proc(5): the second field is the name, in brackets, and may hold anything; utime and stime are the 14th and 15th.
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _group(name: str) -> str:
    first_word = name.split()[0] if name.split() else name
    return first_word.partition("/")[0]


def _revision() -> str:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10
    )
    return git.stdout.strip() or "unknown"


def _without_folders(argument: str) -> str:
    """Keep a file's name and drop where it lies on this machine; paths within the project stay."""
    path = Path(argument)
    return path.name if path.is_absolute() else argument
