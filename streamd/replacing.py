"""Write a file in one step: a reader sees the old one or the new one, whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give an empty file beside `path`, which takes its place, with `mode`, when the block has ended.

    Until then nobody else may read it. Where the block raises it is removed, and `path` is what it was. Makes the
    folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
        new = Path(file.name)
    try:
        yield new
        new.chmod(mode)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
