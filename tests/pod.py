"""Run a container of a manifest as a node would, without a cluster: its command, environment, user and volumes.

Its root is made of this machine's /usr and the Python that runs the tests; all but its volumes is read-only, it has no
capability, may gain none, and its network is a loopback of its own. What a node also does and this does not: seccomp,
limits, devices.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHON = f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
DEADLINE_S = 90.0
# $1 is the new root, $2 and $3 lists of what is mounted on it, one a line: SOURCE TARGET, then TARGET of empty volumes.
_ENTER = """
set -euo pipefail
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir -p "$1/etc" "$1/usr" "$1/proc" "$1/dev"
for name in bin lib lib64 sbin; do ln -s "usr/$name" "$1/$name"; done
cp /etc/ld.so.cache /etc/nsswitch.conf "$1/etc/" 2>/dev/null || true
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
while read -r source target; do mkdir -p "$1$target"; mount --bind -o ro "$source" "$1$target"; done <<<"$2"
while read -r target; do mkdir -p "$1$target"; mount -t tmpfs -o "mode=2770,gid=$4" tmpfs "$1$target"; done <<<"$3"
mount -o remount,ro,bind "$1"
root=$1; shift 4
exec chroot "$root" "$@"
"""


def missing_for_pods() -> str:
    """Say what is missing to run one; empty when all is there."""
    if os.geteuid() != 0:
        return "only root may make a root file system and a network for a pod"
    if lacking := [name for name in ("unshare", "nsenter", "setpriv", "chroot", "ip") if not shutil.which(name)]:
        return f"{', '.join(lacking)} is missing (Debian: util-linux, coreutils, iproute2)"
    probe = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


class Pod:
    """`with Pod(pod_spec, "streamd-0", files, folder) as pod`: its one container at work, until the end of the block.

    `files` has what the ConfigMap and Secret volumes hold, by volume and name. `folder` must be open to every user.
    """

    def __init__(self, spec: Mapping[str, Any], name: str, files: Mapping[str, Mapping[str, str]], folder: Path):
        (self._container,) = spec["containers"]
        self._security = spec["securityContext"]
        self._name = name
        self._folder = folder
        self.log_path = folder / "log"
        self._mounts = {mount["name"]: mount["mountPath"] for mount in self._container["volumeMounts"]}
        for volume, contents in files.items():
            (folder / volume).mkdir()
            for file, text in contents.items():
                (folder / volume / file).write_text(text)
        self._filled = [*files]

    def __enter__(self) -> Pod:
        (self._folder / "root").mkdir()
        places = {
            "/usr": "/usr",
            sys.base_prefix: "/opt/python",
            sysconfig.get_path("purelib"): "/opt/site-packages",
            str(ROOT): "/opt/checkout",
            **{str(self._folder / volume): self._mounts[volume] for volume in self._filled},
        }
        bound = "\n".join(f"{source} {target}" for source, target in places.items())
        empty = "\n".join(path for volume, path in self._mounts.items() if volume not in self._filled)
        group = str(self._security["fsGroup"])
        enter = ["bash", "-c", _ENTER, "enter", str(self._folder / "root"), bound, empty, group]
        namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*namespaces, *enter, *self._as_user(), *self._command()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while not self._children() and self._process.poll() is None:
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)
        if error is not None:
            print(self.log_path.read_text())

    def get(self, path: str, port: int) -> int:
        """Do what a probe's httpGet does, at the pod's own address; return the status, 0 where nobody answers."""
        ask = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}{path}', timeout=5).status)"
        inside = ["nsenter", "--target", str(self.pid), "--net", sys.executable, "-c", ask]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=DEADLINE_S)
        return int(done.stdout) if done.returncode == 0 else 0

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Do what `kubectl exec` does, with streamd's arguments."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root", "--wd"]
        return subprocess.run(
            [*inside, *self._as_user(), PYTHON, "-m", "streamd", *command],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    @property
    def pid(self) -> int:
        """The container's first process, as seen from here."""
        children = self._children()
        assert children, f"the container ended:\n{self.log_path.read_text()}"
        return int(children[0])

    def _children(self) -> list[str]:
        return Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()

    def status(self) -> dict[str, str]:
        """Read what the kernel says of the first process: its user, capabilities, and whether it may gain some."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def mount_options(self, path: str) -> list[str]:
        """Return the options of what is mounted there, as the container sees it."""
        lines = (line.split() for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines())
        return next(fields[5].split(",") for fields in lines if fields[4] == path)

    def stop(self, grace_s: float) -> int:
        """Send SIGTERM and return the exit code; raises subprocess.TimeoutExpired after the grace period."""
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(grace_s)

    def wait_until(self, path: str, port: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.get(path, port) != 200:
            assert self._process.poll() is None, f"the container ended:\n{self.log_path.read_text()}"
            assert time.monotonic() < deadline, f"{path} is not well after {DEADLINE_S} s:\n{self.log_path.read_text()}"
            time.sleep(0.5)

    def _as_user(self) -> list[str]:
        user, group = str(self._security["runAsUser"]), str(self._security["runAsGroup"])
        assert self._container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        who = ["setpriv", "--reuid", user, "--regid", group, "--groups", str(self._security["fsGroup"])]
        return [*who, "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"]

    def _command(self) -> list[str]:
        program, *arguments = self._container["command"]
        assert program == "streamd"
        return [PYTHON, "-m", "streamd", *(word.replace("$(POD_NAME)", self._name) for word in arguments)]

    def _environment(self) -> dict[str, str]:
        given = {one["name"]: one.get("value", self._name) for one in self._container["env"]}
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": "/opt/checkout:/opt/site-packages",
            "LD_LIBRARY_PATH": "/opt/python/lib",
            "HOSTNAME": platform.node(),
            **given,
        }
