"""Read YOLO folders: data.yaml and a text file for each picture, with boxes or polygons.

`supervision` reads them too, and a test compares the two; but it raises for the first bad line, and it cannot say
which. So the lines are read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from streamd.bounded import PlainLoader, read_bytes
from streamd.datasets import pictures
from streamd.datasets.findings import Draft, DraftObject, DraftPicture, Findings
from streamd.errors import DataError
from streamd.files import PICTURES

SPLITS = ("train", "val", "test")
_MAX_YAML_BYTES = 4 << 20
_MAX_LABEL_BYTES = 16 << 20  # of one picture; a thousand polygons have 1 MB
_MAX_LIST_BYTES = 1 << 30
_NUM_BOX_FIELDS = 5  # class, and centre x, centre y, width, height as parts of the picture's sides
_MIN_POLYGON_FIELDS = 7  # class, and three points


def find(path: Path) -> Path | None:
    """Return the YAML file of a YOLO data set at `path`."""
    if path.suffix in (".yaml", ".yml"):
        return path
    files = sorted((*path.glob("*.yaml"), *path.glob("*.yml")), key=lambda file: (file.stem != "data", file.name))
    return next((file for file in files if _has_names(file)), None)


def read(file: Path, images: Path | None, split: str | None, findings: Findings) -> Draft:
    """Read the pictures of a split; where there is one only, it need not be named. Raises DataError."""
    description = _load(file)
    names = _names(file, description)
    split = _split(file, description, split)
    drafts, sources = [], [file]
    files = list(_pictures(file, description, split, images))
    for number, picture in enumerate(files, start=1):
        if not os.path.isfile(picture):
            findings.add("missing file", picture.name or str(picture), f"there is no picture {picture}")
            continue
        label_file = _label_file(picture)
        if label_file.is_file():
            sources.append(label_file)
        if (draft := _picture(picture, label_file, number, names, findings)) is not None:
            drafts.append(draft)
    return Draft(f"{file.parent.name or file.stem} {split}", names, drafts, sources)


def _has_names(file: Path) -> bool:
    """Tell a data set's YAML from a recipe that lies beside it."""
    return re.search(rb"^names\s*:", _content(file), re.MULTILINE) is not None


def _content(file: Path) -> bytes:
    try:
        return read_bytes(file, _MAX_YAML_BYTES)
    except OSError as err:
        raise DataError(f"{file}: cannot read it: {err.strerror}") from err


def _load(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.load(_content(file), Loader=PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise DataError(f"{file}: not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict) or "names" not in content:
        raise DataError(f"{file}: the key 'names' is missing; YOLO's data.yaml needs it, and 'train', 'val' or 'test'")
    if "kpt_shape" in content:
        raise DataError(f"{file}: YOLO's key points are not read; convert the data set to COCO's JSON")
    return content


def _names(file: Path, description: Mapping[str, Any]) -> tuple[str, ...]:
    names = description["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{file}: names: the numbers must be 0 to {len(names) - 1}, each once")
        names = [names[number] for number in range(len(names))]
    # A name may be a number or a yes. Lists are not shown, since aliases can make them endless.
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise DataError(f"{file}: names: expected a list of names, or numbers with a name each")
    labels = tuple(str(name) for name in names)
    if len(set(labels)) < len(labels):
        raise DataError(f"{file}: names: a name is there twice: {', '.join(labels)[:80]}")
    return labels


def _split(file: Path, description: Mapping[str, Any], split: str | None) -> str:
    there = [name for name in SPLITS if description.get(name)]
    if split is None and len(there) == 1:
        return there[0]
    if split not in there:
        what = "say which split to read" if split is None else f"there is no split {split!r}"
        raise DataError(f"{file}: {what}; it has: {', '.join(there) or 'none'}")
    return split


def _pictures(file: Path, description: Mapping[str, Any], split: str, images: Path | None) -> Iterator[Path]:
    """Yield the picture files of a split: a folder, a text file that lists them, or several of these."""
    base = description.get("path")
    root = file.parent / (base if isinstance(base, str) else "")
    if not os.path.isdir(root):
        root = file.parent  # the path was that of whoever wrote the file
    entries = description[split] if images is None else str(images.absolute())
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            raise DataError(f"{file}: {split}: expected a folder, or a text file that lists pictures, or several")
        places = (root / entry, file.parent / entry, root / entry.removeprefix("../"))
        place = next((place for place in places if os.path.isdir(place) or os.path.isfile(place)), None)
        if place is None:
            raise DataError(f"{file}: {split}: there is no {places[0]}; correct the path, or say `images`")
        if place.is_dir():
            yield from sorted(child for child in place.rglob("*") if child.suffix.lower() in PICTURES)
        else:
            yield from _listed(place)


def _listed(listing: Path) -> list[Path]:
    try:
        lines = read_bytes(listing, _MAX_LIST_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{listing}: cannot read the list of pictures: {err}") from err
    return [listing.parent / line.strip() for line in lines if line.strip()]


def _label_file(picture: Path) -> Path:
    """Return .../labels/a.txt of .../images/a.jpg, or a.txt beside a picture in a folder of another name."""
    parts = list(picture.parts)
    for number in range(len(parts) - 2, -1, -1):
        if parts[number] == "images":
            parts[number] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _picture(
    file: Path, label_file: Path, number: int, names: Sequence[str], findings: Findings
) -> DraftPicture | None:
    """Read one picture; its header gives the size, in whose parts the labels are written."""
    place = file.name
    try:
        size = pictures.inspect(file, None)
    except DataError as err:
        findings.add("unreadable picture", place, f"{file.name}: {err}")
        return None
    objects = []
    try:
        lines = read_bytes(label_file, _MAX_LABEL_BYTES).decode().splitlines() if label_file.is_file() else []
    except (OSError, UnicodeDecodeError) as err:
        findings.add("unreadable annotation", label_file.name, str(err))
        return None
    for count, line in enumerate(lines, start=1):
        if line.strip():
            one = _object(line.split(), f"{label_file.name}: line {count}", size, len(names), findings)
            objects += [one] if one is not None else []
    return DraftPicture(place, file, number, size, objects)


def _object(
    fields: Sequence[str], place: str, size: tuple[int, int], num_labels: int, findings: Findings
) -> DraftObject | None:
    try:
        label, values = int(float(fields[0])), [float(value) for value in fields[1:]]
    except (ValueError, OverflowError):
        findings.add("bad record", place, f"expected numbers, got {' '.join(fields)!r:.80}")
        return None
    if not 0 <= label < num_labels:
        findings.add("unknown category", place, f"the class is {label}, but `names` has 0 to {num_labels - 1}")
        return None
    width, height = size
    if len(fields) == _NUM_BOX_FIELDS:
        x, y, w, h = values
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        return DraftObject(place, label, box)
    if len(fields) < _MIN_POLYGON_FIELDS or len(fields) % 2 == 0:
        text = f"expected a class with 4 numbers of a box or with pairs of a polygon, got {len(fields)} numbers"
        findings.add("bad record", place, text)
        return None
    across, down = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    polygon = [coordinate for point in zip(across, down, strict=True) for coordinate in point]
    return DraftObject(place, label, (min(across), min(down), max(across), max(down)), segmentation=[polygon])
