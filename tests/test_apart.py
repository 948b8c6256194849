"""A model that is loaded and frozen by a process of its own is the same model, and what breaks there breaks nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamd.errors import ModelError
from streamd.infer import Model
from streamd.models import apart
from streamd.models.apart import frozen_apart
from tests.conftest import ROOT
from tests.versions import Squares, write_version
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("models") / "squares.pt", "a" * 64, Squares(shift=1))


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_model_is_the_same_and_nothing_is_left_open(file: Path) -> None:
    before = num_descriptors()
    with frozen_apart(file, torch.float32) as frozen:
        model = Model(file, "cpu", frozen=frozen)
    assert num_descriptors() == before
    images, sizes = torch.rand(2, 3, *model.spec.input_size), torch.full((2, 2), 48.0)
    here = Model(file, "cpu")
    there_output, here_output = model.run(images, sizes), here.run(images, sizes)
    assert torch.equal(there_output.boxes, here_output.boxes)
    assert torch.equal(there_output.scores, here_output.scores)
    assert model.spec == here.spec


def test_a_model_is_frozen_in_the_precision_that_is_asked_for(untrained_artifact: Path) -> None:
    with frozen_apart(untrained_artifact, torch.bfloat16) as frozen:
        model = Model(untrained_artifact, "cpu", "bf16", frozen=frozen)
    images = torch.rand(1, 3, *model.spec.input_size).bfloat16()
    sizes = torch.tensor([model.spec.input_size], dtype=torch.float32)
    torch.testing.assert_close(
        model.run(images, sizes).scores, Model(untrained_artifact, "cpu", "bf16").run(images, sizes).scores
    )


def test_what_is_wrong_with_a_file_is_said_as_where_no_process_is_between(tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    path.write_text("no model\n")
    with pytest.raises(ModelError) as here:
        Model(path, "cpu")
    before = num_descriptors()
    with pytest.raises(ModelError) as apart_, frozen_apart(path, torch.float32):
        pass
    assert str(apart_.value) == str(here.value)
    assert num_descriptors() == before


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "was ended by SIGSEGV. The file is probably",
        ),
        ("raise MemoryError('no room')", "the process that loads it failed: MemoryError: no room"),
        ("import sys; sys.exit(9)", "the process that loads it failed: exit status 9"),
        ("import time; time.sleep(60)", "not loaded within 1 s"),
    ],
)
def test_a_process_that_breaks_is_an_error_that_names_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: str, complaint: str
) -> None:
    monkeypatch.setattr(apart, "_WORK", code)
    monkeypatch.setattr(apart, "_LIMIT_S", 1.0)
    with pytest.raises(ModelError) as refused, frozen_apart(file, torch.float32):
        pass
    assert str(file) in str(refused.value) and complaint in str(refused.value)


def test_where_no_process_can_be_had_there_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with (
        pytest.raises(ModelError, match="no process can be started to load it: No such file"),
        frozen_apart(file, torch.float32),
    ):
        pass


PARENT = """
import torch
from pathlib import Path
from streamd.models import apart
from tests.waiting import wait_until
apart._WORK = "print(os.getpid(), file=open('child', 'w'), flush=True); import time; time.sleep(600)"
with apart.frozen_apart(Path("model.pt"), torch.float32):
    pass
"""


def test_the_process_ends_with_the_daemon(tmp_path: Path) -> None:
    child = tmp_path / "child"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment) as parent:
        wait_until(lambda: child.exists() and child.read_text().endswith("\n"), "the process begins")
        parent.kill()
    wait_until(lambda: has_ended(int(child.read_text())), "the process ends")


def has_ended(pid: int) -> bool:
    """Tell whether a process is gone, or only waits to be buried by whoever took it over."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
