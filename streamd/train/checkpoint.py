"""Write and read the state of a run, so that one that was killed goes on as if it had not been."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamd.errors import DataError

FORMAT = 1


@dataclass(slots=True)
class Progress:
    """How far a run has come. What is random is a function of the seed and of this."""

    epoch: int = 0
    batch: int = 0  # of the epoch, taken by each process
    step: int = 0  # of the optimiser, over all epochs
    best: float = float("-inf")
    best_epoch: int = -1


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at `path` in one step; a crash leaves the old one or the new one."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may be lost with the power
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; nothing in it is executed. Raises DataError."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file can make the unpickler raise nearly anything
        raise DataError(f"{path}: cannot be read as the state of a run: {str(err).splitlines()[0]}") from err
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not the state of a run of this streamd; begin it again without --resume")
    return content
