"""Artifacts that mean harm: a small sound one, whose entries are replaced one by one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

Edit = Callable[[str, bytes], bytes | None]


def rewritten(model: Path, target: Path, edit: Edit, compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy an artifact entry by entry through `edit`, which drops an entry by returning None."""
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_code(model: Path, target: Path, old: str, new: str) -> Path:
    """Replace a part of the program, which must be there."""
    found = []

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(".py") or old not in content.decode():
            return content
        found.append(name)
        return content.replace(old.encode(), new.encode())

    rewritten(model, target, edit)
    assert found, f"no code with {old!r}"
    return target


class CallsSystem:
    """Run a shell command when Python unpickles it."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)
