"""Boot a real systemd in a container that sees this machine's /usr, and an installation of streamd under /opt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
BOOTED_WITHIN_S = 60.0
STOPPED_WITHIN_S = 30.0
PROGRAM = "/opt/streamd/bin/streamd"


def missing_for_nspawn() -> str:
    """Say what is missing to boot a container; empty where nothing is."""
    if os.geteuid():
        return "only root can boot a container"
    for program in ("systemd-nspawn", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is missing (Debian: systemd-container, util-linux)"
    return ""


class BootFailure(Exception):
    """The kernel, or what this machine itself runs in, allows no container."""


class Container:
    """`with Container(tmp_path, {...}) as container`: booted; what it wrote is gone at the end.

    Its root is in memory, with this machine's /usr, without its /etc; it has a loopback device and no other.
    """

    def __init__(self, folder: Path, writable: Mapping[Path, str], readable: Mapping[Path, str]) -> None:
        """Show folders of this machine under other paths: those of `readable` cannot be written to."""
        environment = folder / "streamd"
        _write_environment(environment)
        readable = {
            **readable,
            environment: "/opt/streamd",
            ROOT: "/opt/checkout",
            Path(sys.base_prefix): "/opt/python",
            Path(sysconfig.get_path("purelib")): "/opt/site-packages",
        }
        self._command = [
            *("systemd-nspawn", "--quiet", "--volatile=yes", "--directory=/", "--private-network"),
            *("--register=no", "--keep-unit", f"--machine=streamd-{os.getpid()}", "--console=read-only"),
            *(f"--bind={source}:{place}" for source, place in writable.items()),
            *(f"--bind-ro={source}:{place}" for source, place in readable.items()),
            *("--boot", "systemd.firstboot=no", "systemd.unit=basic.target"),
        ]
        self._log = folder / "boot.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Container:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + BOOTED_WITHIN_S
        while not self._is_booted():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise BootFailure(self._log.read_text(errors="replace").strip()[-300:] or "it does not boot")
            time.sleep(0.2)
        self.run("ldconfig", "/opt/python/lib")  # a Python that is not Debian's may have its library there
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is None:
            return
        self._process.terminate()  # nspawn then has the container power off
        try:
            self._process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_booted(self) -> bool:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._leader = int(children[0])
        try:
            return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")
        except subprocess.SubprocessError:
            return False

    def enter(self, *command: str) -> list[str]:
        """Give the command of this machine that runs `command` in the container, as its root."""
        return ["nsenter", f"--target={self._leader}", "--all", *command]

    def run(self, *command: str, check: bool = True, within_s: float = 120) -> str:
        """Run a command in the container as its root; return what it says."""
        done = subprocess.run(
            self.enter(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LC_ALL": "C.UTF-8"},
            timeout=within_s,
        )
        text = done.stdout.decode(errors="replace")
        assert not check or done.returncode == 0, f"{' '.join(command)} exits with {done.returncode}:\n{text}"
        return text

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.run("systemctl", "show", unit, "--value", f"--property={name}").strip()

    def journal(self, unit: str) -> str:
        """Return all that a unit has said."""
        return self.run("journalctl", "--unit", unit, "--output=cat", "--no-pager")


def _write_environment(folder: Path) -> None:
    """Write a virtual environment that is whole where the container sees it, and nowhere else."""
    python = Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "places.pth").write_text("/opt/checkout\n/opt/site-packages\n")
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
    scripts = folder / "bin"
    scripts.mkdir()
    (scripts / "python3").symlink_to(Path("/opt/python") / python)
    program = scripts / "streamd"
    program.write_text("#!/opt/streamd/bin/python3\nfrom streamd.cli import main\n\nmain()\n")
    program.chmod(0o755)
