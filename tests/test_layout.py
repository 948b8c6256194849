"""The shape of the project: the folders, who may import whom, and what a light import must not pull in."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("streamd", "models", "gpu", "configs", "systemd", "tests", "benchmarks")
LINKED = ("models", "gpu", "configs", "systemd")
STAGES = ("sources", "decode", "batch", "infer", "postprocess", "publish", "track")
# Evaluation takes a data set through the same stages.
MAY_IMPORT_STAGES = ("connection", "lane", "runner", "evaluation.routes", "evaluation.evaluate")
MACHINE_PATH = re.compile(r"/(?:work|root|home/[a-z]+|Users/[a-z]+)/")
IMAGES_AND_MODELS = {".pt", ".mp4", ".png", ".jpg", ".gif", ".npz", ".pyc"}


def git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def stage_of(module: str) -> str | None:
    """Name the stage that a module of streamd belongs to: streamd.sources.timeline -> sources."""
    _, _, rest = module.partition("streamd.")
    name = rest.split(".")[0]
    return name if name in STAGES else None


def imported_modules(file: Path) -> Iterator[str]:
    """Name what a file imports, also inside functions; `from streamd import x` counts as streamd.x."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules() -> dict[str, Path]:
    """Name the modules under streamd/ itself; rglob does not follow the links."""
    files = (file for file in (ROOT / "streamd").rglob("*.py") if not {*LINKED} & {*file.relative_to(ROOT).parts})
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_is_there(name: str) -> None:
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


@pytest.mark.parametrize("name", LINKED)
def test_the_link_is_relative_and_in_git(name: str) -> None:
    link = ROOT / "streamd" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    mode, _, _ = git("ls-files", "--stage", f"streamd/{name}").partition(" ")
    assert mode == "120000", f"streamd/{name} is not kept as a link in git"


def test_a_stage_imports_no_other_stage() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, file in own_modules().items()
        if (stage := stage_of(module))
        for imported in imported_modules(file)
        if stage_of(imported) not in (None, stage)
    ]
    assert not wrong


def test_only_connections_lanes_and_evaluation_bring_stages_together() -> None:
    wrong = []
    for module, file in own_modules().items():
        stages = {stage_of(imported) for imported in imported_modules(file)} - {None, stage_of(module)}
        if len(stages) > 1 and module.removeprefix("streamd.") not in MAY_IMPORT_STAGES:
            wrong.append(f"{module} imports {sorted(map(str, stages))}")
    assert not wrong


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    tracked = git("ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    files = [ROOT / name for name in tracked if name and Path(name).suffix not in IMAGES_AND_MODELS]
    wrong = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file.is_file() and file != Path(__file__)
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["streamd.client", "streamd.wire"])
def test_a_subscriber_needs_neither_torch_nor_av(module: str) -> None:
    program = f"import sys, {module}; print(*({{'torch', 'av'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"{module} imports {done.stdout}"
