"""The wheel: one name, nothing left out, and it runs away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINKED = ("models", "gpu", "configs", "systemd")
NOT_SHIPPED = ("__pycache__", ".pt", ".pyc")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run a command and return what it prints; a failure shows all of its words."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exits with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder; its dependencies are those of the running environment."""
    target = tmp_path_factory.mktemp("site")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=target,
    )
    return target


def files_of(wheel: Path) -> dict[str, int]:
    """Give the files of the wheel, without its own records, and the checksum of each."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist() if ".dist-info/" not in file.filename}


def test_the_wheel_holds_the_one_name_streamd(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"streamd"}
    assert len(names) == 2


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    folders = [ROOT / "streamd", *(ROOT / name for name in LINKED)]
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    expected = {
        str(file.relative_to(ROOT) if file.is_relative_to(ROOT / "streamd") else "streamd" / file.relative_to(ROOT))
        for file in files
        if not any(mark in str(file.relative_to(ROOT)) for mark in NOT_SHIPPED)
    }
    assert set(files_of(wheel)) == expected
    assert {"streamd/configs/media/pedestrians.mp4", "streamd/systemd/streamd@.service"} <= expected


def test_the_wheel_states_licence_and_notice(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".dist-info/")[2] for name in archive.namelist()}
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= names


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    run("tar", "--extract", "--file", sdist, "--strip-components", "1", cwd=tmp_path / "source")
    assert files_of(build("wheel", tmp_path / "source", tmp_path / "wheel")) == files_of(wheel)


def test_the_installed_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    version = run(sys.executable, "-m", "streamd", "--version", cwd=tmp_path, path=installed)
    assert "0.1.0" in version
    program = """
import importlib.resources, streamd, streamd.models.yolox, streamd.gpu.ops
clip = importlib.resources.files("streamd.configs") / "media" / "pedestrians.mp4"
print(streamd.__file__, clip, clip.is_file(), sep="\\n")
"""
    module, clip, is_file = run(sys.executable, "-c", program, cwd=tmp_path, path=installed).split("\n")[:3]
    assert Path(module).is_relative_to(installed)
    assert Path(clip).is_relative_to(installed) and is_file == "True"
