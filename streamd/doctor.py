"""`streamd doctor`: what this machine can do, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LIMIT_S = 2.0  # for a program or a server that is asked
_MIN_DRIVER = {13: 580, 12: 525}  # the least driver branch that runs a major version of CUDA
_REDIS_URL = "redis://localhost:6379"
_DECODERS = ("h264", "hevc", "mjpeg", "av1", "vp9")


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: something that streamd uses, and whether it is here."""

    name: str
    ok: bool
    found: str
    advice: str = ""  # how to get it, where it is missing
    required: bool = False  # for what streamd does without a GPU


def doctor(console: Console, json_lines: bool = False) -> int:
    """Print what was found; return 1 if something is missing that is required, else 0."""
    findings = list(examine())
    if json_lines:
        for finding in findings:
            console.file.write(json.dumps(asdict(finding)) + "\n")
    else:
        console.print(_table(findings))
    return 1 if any(finding.required and not finding.ok for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at the machine, row by row; whatever is missing or broken, there is a row that says so."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _machine,
        _torch,
        _gpu,
        _nvdec,
        _gpu_packages,
        _pyav,
        _v4l2,
        _zeromq,
        _redis,
        _models,
        _systemd,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as err:  # a broken installation can raise anything, and the other rows still count
            name = check.__name__.removeprefix("_")
            reason = f"{type(err).__name__}: {err}".splitlines()[0]
            required = check in (_torch, _pyav, _zeromq)
            yield Finding(name, False, reason, "install streamd again: pip install --force-reinstall .", required)


def _python() -> Iterator[Finding]:
    fits = (3, 11) <= sys.version_info < (3, 14)
    advice = "use Python 3.11, 3.12 or 3.13: `make PYTHON=python3.13 ...`"
    yield Finding("Python", fits, f"{platform.python_version()}, {sys.executable}", advice, required=True)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total_gib = pages * size / 2**30
    found = f"{cores} CPU cores, {total_gib:.1f} GiB of memory, {platform.machine()}"
    yield Finding("machine", total_gib >= 2, found, "2 GiB are the least for one small model")


def _torch() -> Iterator[Finding]:
    import torch

    vision = metadata.version("torchvision")  # its import takes a second, and nothing more is asked of it here
    found = f"torch {torch.__version__}, torchvision {vision}, sees {torch.cuda.device_count()} GPU(s)"
    yield Finding("PyTorch", True, found, required=True)
    cuda = torch.version.cuda
    yield Finding("CUDA in PyTorch", cuda is not None, cuda or "none: a CPU build", "pip install torch from PyPI")


def _gpu() -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        advice = "without one everything runs on the CPU; with one, install NVIDIA's driver, 580 or newer"
        yield Finding("NVIDIA GPU", False, "no nvidia-smi, so no driver", advice)
        return
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=_LIMIT_S * 2, check=False)
    if answer.returncode != 0 or not answer.stdout.strip():
        reason = (answer.stdout + answer.stderr).strip().splitlines() or ["says nothing"]
        yield Finding("NVIDIA GPU", False, f"nvidia-smi: {reason[0]}", "load or update NVIDIA's driver; see `dmesg`")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.strip().splitlines()]
    for name, memory, _ in rows:
        yield Finding("NVIDIA GPU", True, f"{name}, {memory}")
    driver = rows[0][-1]
    least = _MIN_DRIVER.get(_cuda_of_torch(), 0)
    fits = int(driver.split(".")[0]) >= least
    yield Finding("NVIDIA driver", fits, driver, f"PyTorch's CUDA {_cuda_of_torch()} needs driver {least} or newer")


def _cuda_of_torch() -> int:
    """Return the major version of CUDA that torch was built with, 0 for none."""
    import torch

    return int((torch.version.cuda or "0").split(".")[0])


def _nvdec() -> Iterator[Finding]:
    from streamd.decode.probe import probe_nvdec

    found = probe_nvdec()
    if found.missing:
        yield Finding("NVDEC", False, found.missing, found.advice)
        return
    codecs = ", ".join(sorted(found.codecs)) or "nothing"
    yield Finding("NVDEC", bool(found.codecs), f"{found.num_engines} engine(s), decodes {codecs}")


def _gpu_packages() -> Iterator[Finding]:
    dali = _first_version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    yield Finding("DALI", dali is not None, dali or "not installed", "pip install nvidia-dali-cuda130")
    core, bindings = _first_version("cuda-core"), _first_version("cuda-bindings")
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in (("core", core), ("bindings", bindings)))
    yield Finding("cuda-python", core is not None and bindings is not None, found, "pip install 'cuda-python>=13'")


def _pyav() -> Iterator[Finding]:
    import av

    major, minor, _ = av.library_versions["libavcodec"]
    decoders = [name for name in _DECODERS if name in av.codecs_available]
    found = f"{av.__version__}, libavcodec {major}.{minor}, decodes {', '.join(decoders)}"
    yield Finding("PyAV", "h264" in decoders, found, "pip install 'av>=18.1'", required=True)
    on_gpu = [name for name in _DECODERS if f"{name}_cuvid" in av.codecs_available]
    built = f"built for {', '.join(on_gpu)}" if on_gpu else "not built in"
    yield Finding("PyAV with NVDEC", bool(on_gpu), built, "use PyAV's own wheel from PyPI")
    writes = "libx264" in av.codecs_available
    yield Finding("H.264 encoder", writes, "libx264" if writes else "none", "use PyAV's wheel; only videos need it")


def _v4l2() -> Iterator[Finding]:
    import av

    if not any("v4l2" in name for name in av.formats_available):
        yield Finding("V4L2", False, "PyAV was built without it", "use PyAV's own wheel from PyPI")
        return
    devices = sorted(Path("/dev").glob("video*"))
    closed = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("V4L2", False, f"no permission for {closed[0]}", "add the user to the group 'video'")
    else:
        yield Finding("V4L2", True, ", ".join(map(str, devices)) or "supported; no device is plugged in")


def _zeromq() -> Iterator[Finding]:
    import zmq

    yield Finding("ZeroMQ", True, f"libzmq {zmq.zmq_version()}, pyzmq {zmq.__version__}", required=True)


def _redis() -> Iterator[Finding]:
    import redis

    program = shutil.which("redis-server")
    advice = "apt-get install redis-server; only needed to publish on a Redis of this machine"
    yield Finding("redis-server", program is not None, program or "not installed", advice)
    client = redis.Redis.from_url(_REDIS_URL, socket_timeout=_LIMIT_S / 2, socket_connect_timeout=_LIMIT_S / 2)
    try:
        client.ping()
    except redis.RedisError as err:
        wants_password = isinstance(err, redis.AuthenticationError)
        found = "answers, and wants a password" if wants_password else "does not answer"
        yield Finding(_REDIS_URL, wants_password, found, "systemctl start redis-server")
    else:
        yield Finding(_REDIS_URL, True, "answers")
    finally:
        client.close()


def _models() -> Iterator[Finding]:
    from streamd.models.weights import RELEASES, SHIPPED, cache_directory, model_directories

    names = {cache_directory(): "model cache", SHIPPED: "shipped models"}
    for directory in model_directories():
        name = names.get(directory, "$STREAMD_MODELS")
        found = sorted(path.name for path in directory.glob("*.pt*") if path.suffix in (".pt", ".pth"))
        state = ", ".join(found) or ("empty" if directory.is_dir() else "no such folder")
        advice = f"what a command names is fetched at its first use; known are {', '.join(RELEASES)}"
        yield Finding(name, bool(found), f"{directory}: {state}", advice)


def _systemd() -> Iterator[Finding]:
    booted = Path("/run/systemd/system").is_dir()
    notified = ", and is told when streamd is ready" if os.environ.get("NOTIFY_SOCKET") else ""
    found = f"runs this machine{notified}" if booted else "does not run this machine"
    yield Finding("systemd", booted, found, "in a container start `streamd run` directly; SIGTERM stops it")


def _first_version(*packages: str) -> str | None:
    """Return the version of the first of these packages that is installed, without importing it."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("MISSING", "bold red") if finding.required else Text("-")
        found = Text(finding.found)
        if not finding.ok and finding.advice:
            found.append(f"\n{finding.advice}", "dim")
        table.add_row(mark, finding.name, found)
    return table
