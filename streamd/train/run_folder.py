"""The folder of a run: everything that is needed to repeat it, to go on with it, and to judge it.

recipe.yaml     with every key          run.json        versions, seed, revision, data, commands
metrics.jsonl   a line a step and one an evaluation       tensorboard/
last.ckpt       the state of the run    best.ckpt       the weights of the best evaluation
NAME.pt         the artifact            *.png, scores.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from streamd import __version__
from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, OutputError
from streamd.train import recipe as recipes
from streamd.train.recipe import Recipe

_PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "pillow", "supervision")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run writes; only the first process of a distributed run does."""

    path: Path

    @property
    def last(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "best.ckpt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def find_state(self, recipe: Recipe, *, resume: bool) -> bool:
        """Return whether there is a state to go on from. Raises ConfigError where the folder is another run's."""
        written = self.path / "recipe.yaml"
        if written.exists() and not resume:
            raise ConfigError(f"{self.path}: holds a run already; go on with it by --resume, or give another --out")
        if written.exists() and written.read_text() != recipes.dump(recipe):
            raise ConfigError(
                f"{self.path}: its run has another recipe ({written}); go on with that one: "
                f"streamd train {written} --resume --out {self.path}"
            )
        return self.last.exists()

    def describe(self, recipe: Recipe, sets: Mapping[str, DataSet], num_processes: int) -> None:
        """Make the folder, and write recipe.yaml and run.json, in which earlier starts are kept. Raises OutputError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "recipe.yaml").write_text(recipes.dump(recipe))
        except OSError as err:
            raise OutputError(f"{self.path}: cannot be written: {err}") from err
        file = self.path / "run.json"
        starts = []
        with suppress(OSError, ValueError, KeyError):
            starts = json.loads(file.read_text())["starts"]
        starts.append(
            {
                "command": sys.argv,
                "versions": {"streamd": __version__, "python": platform.python_version(), **_versions()},
                "git": _revision(),
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {_gpu()}",
                "processes": num_processes,
                "threads": torch.get_num_threads(),
            }
        )
        data = {
            name: {"fingerprint": one.fingerprint, "pictures": len(one.records), "left_out": len(one.problems)}
            for name, one in sets.items()
        }
        content = {"seed": recipe.seed, "labels": next(iter(sets.values())).labels, "data": data, "starts": starts}
        file.write_text(json.dumps(content, indent=2))


class Log:
    """Lines of metrics in JSON and TensorBoard; what was written after the state of a resumed run is cut off."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        kept = []
        if folder.metrics.exists():
            lines = folder.metrics.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
        folder.metrics.write_text("".join(f"{line}\n" for line in kept))
        self._file = folder.metrics.open("a", buffering=1)
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line; `step` counts finished steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()
        self._board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
        return sys.maxsize


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _revision() -> str:
    """Return the git revision of the source, with a + if it was changed since; empty for an installed package."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root)]
    try:
        revision = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changed = subprocess.run(
            [*command, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")
