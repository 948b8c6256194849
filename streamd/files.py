"""Which pictures and videos a command line means, and unique names for what is made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"))
VIDEOS = frozenset(
    (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".h264", ".hevc", ".gif")
)


def expand(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Replace folders by the pictures and videos in them; also return a sentence for each path that gives nothing."""
    paths: list[Path] = []
    refused: list[str] = []
    for path in files:
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in PICTURES | VIDEOS)
            paths += found
            if not found:
                refused.append(f"{path}: holds no picture or video; folders within it are not searched")
        elif path.exists():
            paths.append(path)
        else:
            refused.append(f"{path}: there is no such file; check the path")
    return paths, refused


def as_name(text: str) -> str:
    """Turn a file's name into one that the configuration allows."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip("_.-")[:48] or "file"


class Unique:
    """Give out names, a repeated one with a number: bus, bus-2, bus-3."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def name(self, stem: str, suffix: str = "") -> str:
        name, number = f"{stem}{suffix}", 1
        while name.lower() in self._given:  # some file systems do not know a from A
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._given.add(name.lower())
        return name
