"""Install a configuration as a service of systemd, remove it, and say how it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamd.errors import StreamdError
from streamd.replacing import replacing
from streamd.units import MARK, SYSUSERS, TEMPLATE, TMPFILES, UNIT_FOLDER, Service

USER = "streamd"
_WANTS = UNIT_FOLDER / "multi-user.target.wants"
_BOOTED = Path("/run/systemd/system")  # sd_booted(3)
_TIMEOUT_S = 400  # longer than TimeoutStartSec= of the unit
# In a shell that becomes the service's user, since the rights of every folder on the way count.
_UNREADABLE = 'for file; do test -r "$file" || echo "$file"; done'

MEANINGS = {
    1: "something failed while running; systemd starts it again",
    69: "a publisher could not be set up, for example because its port is taken; systemd starts it again",
    78: "the configuration or a model is wrong; systemd waits for you to mend it and start it",
    203: "the program cannot be run: is it there, and may every user read it?",
    217: f"there is no user {USER}; run: systemd-sysusers {SYSUSERS}",
    226: "systemd could not set up what the unit wants to see of the file system",
    243: f"a credential of LoadCredential= cannot be read; run: systemd-tmpfiles --create {TMPFILES}",
}
_WOULD = {"wrote": "would write", "replaced": "would replace", "removed": "would remove", "ran": "would run"}


def line(word: str, what: object) -> str:
    """Format a line of what is done or found."""
    return f"{word:<13} {what}"


class System:
    """The machine whose systemd is changed: this one, or the folder of another one's file system."""

    def __init__(self, root: Path, say: Callable[[str], None], *, dry_run: bool = False) -> None:
        self._root = root
        self._say = say
        self._dry_run = dry_run
        self.is_this_machine = root == Path("/")

    def check(self) -> None:
        """Raise StreamdError where nothing can be changed."""
        if self._dry_run or not self.is_this_machine:
            return
        if not _BOOTED.is_dir():
            raise StreamdError("systemd does not run here; --root DIR writes into another system, --dry-run nowhere")
        if os.geteuid():
            raise StreamdError("only root may change services: use sudo, or see what it would do with --dry-run")

    def write(self, path: Path, text: str) -> None:
        """Write a file that is this command's own. Raises StreamdError where it is somebody else's."""
        place = self.place(path)
        before = self.read(path)
        if before == text:
            self._tell("unchanged", path)
            return
        if before is not None and not before.startswith(MARK):
            raise StreamdError(f"{place} was not written by this command; move it away first")
        self._tell("wrote" if before is None else "replaced", path)
        if self._dry_run:
            self._say(textwrap.indent(text.rstrip("\n"), "    | ", lambda _: True))
            return
        try:
            with replacing(place) as new:
                new.write_text(text)
        except OSError as err:
            raise StreamdError(f"{place}: cannot be written: {err.strerror}") from err

    def remove(self, path: Path) -> None:
        """Remove a file of this command's, and its folder if that is a unit's own and empty."""
        before = self.read(path)
        if before is None:
            return
        if not before.startswith(MARK):
            self._tell("kept", f"{path}: not written by this command")
            return
        self._tell("removed", path)
        if self._dry_run:
            return
        place = self.place(path)
        try:
            place.unlink()
            if place.parent.suffix == ".d" and place.parent.parent == self.place(UNIT_FOLDER):
                if left := sorted(one.name for one in place.parent.iterdir()):
                    self._tell("kept", f"{path.parent}: {', '.join(left)}")
                else:
                    place.parent.rmdir()
        except OSError as err:
            raise StreamdError(f"{place}: cannot be removed: {err.strerror}") from err

    def run(self, *command: str) -> None:
        """Run a command that changes the machine. Raises StreamdError with its words."""
        self._tell("ran", " ".join(command))
        if not self._dry_run:
            done = call(*command)
            if done.returncode:
                words = (done.stderr or done.stdout).strip().replace("\n", "; ")
                raise StreamdError(f"{' '.join(command)}: exit code {done.returncode}: {words}")

    def systemctl(self, verb: str, *names: str) -> None:
        """Have systemd do something; `enable` and `disable` alone work in another system's folder."""
        self.run("systemctl", *([] if self.is_this_machine else [f"--root={self._root}"]), verb, *names)

    def _tell(self, did: str, what: object) -> None:
        self._say(line(_WOULD.get(did, did) if self._dry_run else did, what))

    def place(self, path: Path) -> Path:
        """Say where a path of that system is on this machine."""
        return self._root / path.relative_to("/")

    def read(self, path: Path) -> str | None:
        """Return a file's text; None where there is none."""
        try:
            return self.place(path).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as err:
            raise StreamdError(f"{self.place(path)}: cannot be read: {err}") from err

    def enabled(self) -> set[str]:
        """Name the units of streamd that start with the machine."""
        return self._names(_WANTS)

    def installed(self) -> set[str]:
        """Name the units of streamd that start with the machine, or have files of this command's."""
        own = {name.removesuffix(".d") for name in self._names(UNIT_FOLDER)} - {"streamd@.service"}
        return self.enabled() | {name for name in own if any(self._is_own(path) for path in _files_of(name))}

    def _names(self, folder: Path) -> set[str]:
        try:
            names = os.listdir(self.place(folder))  # of links, which lead nowhere in another system's folder
        except FileNotFoundError:
            return set()
        return {name for name in names if re.fullmatch(r"streamd(@.+)?\.service(\.d)?", name)}

    def _is_own(self, path: Path) -> bool:
        return (self.read(path) or "").startswith(MARK)


def install(service: Service, system: System) -> bool:
    """Write what is needed and let the unit start with the machine; return whether anything is new."""
    system.check()
    _refuse_another(service, system)
    before = {path: system.read(path) for path in service.files}
    for stale in _stale(service, system):
        system.remove(stale)
    for path, text in service.files.items():
        system.write(path, text)
    if system.is_this_machine:
        system.run("systemd-sysusers", str(SYSUSERS))
        system.run("systemd-tmpfiles", "--create", str(TMPFILES))
        system.systemctl("daemon-reload")
    if service.name not in system.enabled():
        system.systemctl("enable", "--quiet", service.name)
    return before != dict(service.files)


def uninstall(service: Service, system: System) -> None:
    """Stop the unit and remove what `install` wrote, except what other configurations need."""
    system.check()
    _refuse_another(service, system)
    others = system.installed() - {service.name}
    if system.is_this_machine and system.read(service.unit) is not None:
        system.systemctl("stop", service.name)
    if service.name in system.enabled():
        system.systemctl("disable", "--quiet", service.name)
    used = {SYSUSERS, TMPFILES} if others else set()
    used |= {TEMPLATE} if any("@" in other for other in others) else set()
    for path in dict.fromkeys([*_files_of(service.name), *service.files]):
        if path not in used:
            system.remove(path)
    if system.is_this_machine:
        system.systemctl("daemon-reload")


def state(unit: str) -> dict[str, str]:
    """Ask systemd for a unit's properties; empty where it cannot be asked."""
    names = "ActiveState,SubState,Result,StatusText,NRestarts,MainPID,ExecMainCode,ExecMainStatus,UnitFileState"
    try:
        done = call("systemctl", "show", unit, f"--property={names}")
    except StreamdError:
        return {}
    return dict(text.partition("=")[::2] for text in done.stdout.splitlines()) if done.returncode == 0 else {}


@dataclass(frozen=True, slots=True)
class Report:
    """How an installed service is."""

    lines: Sequence[str]
    is_active: bool


def report(service: Service, system: System) -> Report:
    """Describe the unit and the files."""
    return Report([*unit_lines(service.name), *_file_lines(service, system)], _is_active(service.name))


def _is_active(unit: str) -> bool:
    return state(unit).get("ActiveState") in ("active", "reloading")


def unit_lines(unit: str) -> Iterator[str]:
    """Say how a unit is."""
    now = state(unit)
    if not now:
        yield f"{unit}: systemd does not run here"
        return
    words = f": {now['StatusText']}" if now.get("StatusText") else ""
    yield f"{unit}: {now['ActiveState']} ({now['SubState']}){words}"
    if now["ActiveState"] == "active":
        yield line("", f"main pid {now['MainPID']}, {now['NRestarts']} restarts")
    if now["ActiveState"] != "active" and now["Result"] != "success":
        yield line("", how_it_ended(now))
        yield line("", f"journalctl --unit {unit} says more")
    if now.get("UnitFileState") != "enabled":
        yield line("", f"does not start with the machine ({now.get('UnitFileState') or 'not installed'})")


def how_it_ended(now: Mapping[str, str]) -> str:
    """Say what became of a unit's main process, from its properties."""
    number = int(now.get("ExecMainStatus") or 0)
    if now.get("ExecMainCode") in ("2", "3"):  # CLD_KILLED, CLD_DUMPED
        return f"{now['Result']}: ended by {signal.Signals(number).name}"
    return f"{now.get('Result')}: exit code {number}" + (f", {MEANINGS[number]}" if number in MEANINGS else "")


def _file_lines(service: Service, system: System) -> Iterator[str]:
    for path, text in service.files.items():
        there = system.read(path)
        found = "missing" if there is None else "installed" if there == text else "differs"
        yield line(found, path)


def unreadable(paths: Sequence[Path]) -> list[Path]:
    """List those of `paths` that the service's user cannot read. Needs root."""
    become = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    done = call(*become, "sh", "-c", _UNREADABLE, "sh", *map(str, paths))
    return [Path(text) for text in done.stdout.splitlines()]


def journal(unit: str, num_lines: int = 8) -> str:
    """Return the last lines of a unit's journal; empty where there is none."""
    return call("journalctl", "--unit", unit, "--lines", str(num_lines), "--output", "cat", "--no-pager").stdout


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it says. Raises StreamdError where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError as err:
        raise StreamdError(f"{command[0]} is not installed; on Debian it comes with systemd or util-linux") from err
    except subprocess.TimeoutExpired as err:
        raise StreamdError(f"{' '.join(command)}: did not end within {_TIMEOUT_S} s") from err


def _refuse_another(service: Service, system: System) -> None:
    """Raise StreamdError where streamd.service is another configuration's."""
    there = None if "@" in service.name else system.read(service.unit)
    if there is None or not there.startswith(MARK):
        return
    present, wanted = _config_in(there), _config_in(service.files[service.unit])
    if present != wanted:
        raise StreamdError(
            f"{service.unit} serves {present}; for a second daemon put the configuration at /etc/streamd/NAME.yaml"
        )


def _config_in(unit: str) -> str:
    """Find the configuration of a unit that this command wrote."""
    found = re.search(r"^ExecStart=.* run (.*)$", unit, re.MULTILINE)
    return found[1] if found else ""


def _stale(service: Service, system: System) -> list[Path]:
    """List drop-ins that an earlier install wrote and this one does not want."""
    there = (path for path in _files_of(service.name) if path not in service.files)
    return [path for path in there if (system.read(path) or "").startswith(MARK)]


def _files_of(unit: str) -> list[Path]:
    """List what a unit alone may have."""
    drop_ins = [UNIT_FOLDER / f"{unit}.d" / name for name in ("cpu.conf", "v4l2.conf")]
    return drop_ins if "@" in unit else [*drop_ins, UNIT_FOLDER / unit]
