"""`streamd service` in another system's folder and without effect; what it does to a running one is in
test_service_boot.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamd.service import System, install, uninstall
from streamd.units import MARK, Hardware, Service, service_of
from tests.conftest import ROOT

PROGRAM = Path("/opt/streamd/bin/streamd")

pytestmark = pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemctl is missing (Debian: systemd)")


def service(name: str = "streamd", hardware: Hardware = "gpu") -> Service:
    return service_of(Path(f"/etc/streamd/{name}.yaml"), None, PROGRAM, hardware)


class Said(list[str]):
    """What a `System` said."""

    def words(self) -> list[str]:
        return [line.partition(" ")[0] for line in self]


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_installing_twice_changes_nothing_and_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    said = Said()
    system = System(tmp_path, said.append)
    assert install(service(hardware="cpu"), system)
    assert files(tmp_path) == {
        "etc/sysusers.d/streamd.conf",
        "etc/tmpfiles.d/streamd.conf",
        "etc/systemd/system/streamd.service",
        "etc/systemd/system/streamd.service.d/cpu.conf",
        "etc/systemd/system/multi-user.target.wants/streamd.service",
    }
    assert said.words() == ["wrote"] * 4 + ["ran"], "the last enables it; nothing of this machine is touched"
    assert f"--root={tmp_path}" in said[-1]
    said.clear()
    assert not install(service(hardware="cpu"), system)
    assert said.words() == ["unchanged"] * 4
    uninstall(service(), system)
    assert files(tmp_path) == set()


def test_a_dry_run_shows_every_line_and_changes_nothing(tmp_path: Path) -> None:
    said = Said()
    install(service(), System(tmp_path, said.append, dry_run=True))
    assert files(tmp_path) == set()
    text = "\n".join(said)
    assert "would write   /etc/systemd/system/streamd.service" in text
    assert "    | ExecStart=/opt/streamd/bin/streamd run /etc/streamd/streamd.yaml" in text


def test_going_from_cpu_to_gpu_removes_the_drop_in(tmp_path: Path) -> None:
    said = Said()
    system = System(tmp_path, said.append)
    install(service(hardware="cpu"), system)
    install(service(), system)
    assert "etc/systemd/system/streamd.service.d/cpu.conf" not in files(tmp_path)


def test_what_somebody_else_wrote_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    said = Said()
    system = System(tmp_path, said.append)
    install(service(hardware="cpu"), system)
    override = tmp_path / "etc/systemd/system/streamd.service.d/override.conf"
    override.write_text("[Service]\nMemoryMax=4G\n")
    uninstall(service(), system)
    assert files(tmp_path) == {str(override.relative_to(tmp_path))}
    assert any(line.startswith("kept") and "override.conf" in line for line in said)

    unit = tmp_path / "etc/systemd/system/streamd.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(Exception, match="was not written by this command; move it away first"):
        install(service(), system)
    assert "true" in unit.read_text()


def test_what_instances_share_stays_until_the_last_one_goes(tmp_path: Path) -> None:
    system = System(tmp_path, Said().append)
    install(service("north"), system)
    install(service("south"), system)
    uninstall(service("north"), system)
    assert "etc/systemd/system/streamd@.service" in files(tmp_path)
    assert "etc/systemd/system/multi-user.target.wants/streamd@south.service" in files(tmp_path)
    install(service(), system)
    uninstall(service("south"), system)
    left = files(tmp_path)
    assert "etc/systemd/system/streamd@.service" not in left and "etc/sysusers.d/streamd.conf" in left
    uninstall(service(), system)
    assert files(tmp_path) == set()


def test_streamd_service_is_not_taken_from_another_configuration(tmp_path: Path) -> None:
    system = System(tmp_path, Said().append)
    install(service(), system)
    elsewhere = service_of(Path("/srv/cameras.yaml"), None, PROGRAM)
    for change in (install, uninstall):
        with pytest.raises(Exception, match=r"serves /etc/streamd/streamd\.yaml; for a second daemon put"):
            change(elsewhere, system)


def run(*words: str | Path, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamd", "service", *words], cwd=ROOT, capture_output=True, text=True, user=user
    )


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    config = tmp_path / "cameras.yaml"
    config.write_text("models: {m: {path: yolox_s}}\nstreams: {gate: {url: rtsp://192.0.2.1/x}}\n")
    hidden = run("install", config, "--dry-run")
    assert hidden.returncode == 78 and "the service sees nothing under /tmp; copy it to /etc/streamd" in hidden.stderr
    config.write_text("models: {m: {path: yolox_s}}\nstreams: {gate: {ulr: rtsp://192.0.2.1/x}}\n")
    wrong = run("install", config, "--dry-run")
    assert wrong.returncode == 78 and "did you mean 'url'?" in wrong.stderr
    if not Path("/run/systemd/system").is_dir():
        nowhere = run("uninstall", "/etc/streamd/streamd.yaml")
        assert nowhere.returncode == 1 and "systemd does not run here" in nowhere.stderr


def test_only_root_may_change_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamd.service._BOOTED", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Exception, match="only root may change services: use sudo"):
        install(service(), System(Path("/"), Said().append))


def test_the_mark_is_a_comment_of_one_line() -> None:
    assert MARK.startswith("# ") and MARK.count("\n") == 1 and MARK.endswith("\n")
