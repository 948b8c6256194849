"""Read COCO's JSON: instances and key points here, panoptic in panoptic.py."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from streamd.bounded import read_bytes
from streamd.datasets.findings import Draft, DraftObject, DraftPicture, Findings
from streamd.errors import DataError

Entry = Mapping[str, Any]

_LISTS = ("images", "annotations", "categories")
_MAX_BYTES = 4 << 30  # the largest in use, of two million pictures, have 2.5 GB
_MAX_AREA = 1e12  # px^2; beyond it a number is no area
_NUM_PROBED = 50  # pictures whose names tell which folder is meant


def load(file: Path) -> dict[str, list[Any]]:
    """Read a JSON file that holds COCO's three lists. Raises DataError."""
    try:
        text = read_bytes(file, _MAX_BYTES)
    except OSError as err:
        raise DataError(f"{file}: cannot read the annotations: {err.strerror}") from err
    content = _parse(file, text)
    if not isinstance(content, dict):
        raise DataError(f"{file}: is JSON, but no data set of COCO's form: expected an object, got {_kind(content)}")
    for name in _LISTS:
        if name not in content:
            there = ", ".join(map(repr, list(content)[:8])) or "none"
            raise DataError(
                f"{file}: the key {name!r} is missing (it has {there}); COCO's form needs {', '.join(_LISTS)}"
            )
        if not isinstance(content[name], list):
            raise DataError(f"{file}: {name}: expected a list, got {_kind(content[name])}")
    return {name: content[name] for name in _LISTS}


def is_panoptic(content: Mapping[str, list[Any]]) -> bool:
    """Tell whether the annotations are those of whole pictures."""
    return any(isinstance(one, dict) and "segments_info" in one for one in content["annotations"][:1])


def read(file: Path, content: Mapping[str, list[Any]], images: Path | None, findings: Findings) -> Draft:
    """Read instances and key points. Raises DataError."""
    categories = read_categories(file, content["categories"])
    index = {category["id"]: number for number, category in enumerate(categories)}
    keypoint_names = _keypoint_names(file, categories)
    entries = read_entries(file, content["images"], findings)
    objects = _objects_by_picture(file, content["annotations"], index, {entry["id"] for entry in entries}, findings)
    folder = find_folder(file, entries, images)
    drafts = [
        DraftPicture(
            place=f"{file.name}: image {entry['id']}",
            file=folder / entry["file_name"],
            image_id=entry["id"],
            size=size_of(entry),
            objects=objects.get(entry["id"], ()),
            has_masks=entry["has_masks"] if isinstance(entry.get("has_masks"), bool) else None,
        )
        for entry in entries
    ]
    return Draft(file.stem, tuple(category["name"] for category in categories), drafts, (file,), keypoint_names)


def read_categories(file: Path, entries: Sequence[Any]) -> list[Entry]:
    """Return the categories by rising id, which gives each label its number. Raises DataError."""
    for number, entry in enumerate(entries):
        is_sound = isinstance(entry, dict) and _is_id(entry.get("id")) and _is_text(entry.get("name"))
        if not is_sound:
            raise DataError(f"{file}: categories[{number}]: expected an integer 'id' and a 'name', got {entry!r:.80}")
    if not entries:
        raise DataError(f"{file}: categories: the list is empty; there is nothing to learn")
    for what in ("id", "name"):
        value, count = Counter(entry[what] for entry in entries).most_common(1)[0]
        if count > 1:
            raise DataError(f"{file}: categories: the {what} {value!r} is there {count} times")
    return sorted(entries, key=lambda entry: entry["id"])


def read_entries(file: Path, entries: Sequence[Any], findings: Findings) -> list[Entry]:
    """Return the entries of pictures that have an id and a name; list the others."""
    sound = []
    for number, entry in enumerate(entries):
        is_sound = isinstance(entry, dict) and _is_id(entry.get("id")) and _is_file_name(entry.get("file_name"))
        if is_sound:
            sound.append(entry)
        else:
            text = f"a picture needs an integer 'id' and a 'file_name', got {entry!r:.80}"
            findings.add("bad record", f"{file.name}: images[{number}]", text)
    return sound


def find_folder(file: Path, entries: Sequence[Entry], images: Path | None) -> Path:
    """Return the folder that the names of the pictures start from. Raises DataError."""
    if images is not None:
        if not images.is_dir():
            raise DataError(f"{images}: there is no such folder of pictures; check the key or option `images`")
        return images
    names = [entry["file_name"] for entry in entries[:_NUM_PROBED]]
    split = file.stem.rpartition("_")[2]  # instances_val2017: val2017
    near = (file.parent, file.parent.parent)
    candidates = [folder for base in near for folder in (base / "images" / split, base / "images", base / split, base)]
    counts = [sum(os.path.isfile(folder / name) for name in names) for folder in candidates]
    if names and not max(counts):
        places = ", ".join(str(folder) for folder in candidates[:4])
        raise DataError(
            f"{file}: none of its pictures ({names[0]}, ...) was found; looked in {places} and beside; "
            "say with `images` where they are"
        )
    return candidates[counts.index(max(counts))]


def size_of(entry: Entry) -> tuple[int, int] | None:
    """Return width and height where the entry says them."""
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if type(width) is int and type(height) is int else None


def _objects_by_picture(
    file: Path, annotations: Sequence[Any], index: Mapping[int, int], known: set[int], findings: Findings
) -> dict[int, list[DraftObject]]:
    objects: dict[int, list[DraftObject]] = {}
    ids: set[object] = set()
    for number, entry in enumerate(annotations):
        place = f"{file.name}: annotations[{number}]"
        if not isinstance(entry, dict) or not _is_id(entry.get("image_id")):
            findings.add("bad record", place, f"an annotation needs an integer 'image_id', got {entry!r:.80}")
            continue
        if _is_id(entry.get("id")):
            place = f"{file.name}: annotation {entry['id']}"
            if entry["id"] in ids:
                findings.add("duplicate id", place, "an earlier annotation has this id too")
                continue
            ids.add(entry["id"])
        one = _object(entry, place, index, known, findings)
        if one is not None:
            objects.setdefault(entry["image_id"], []).append(one)
    return objects


def _object(
    entry: Entry, place: str, index: Mapping[int, int], known: set[int], findings: Findings
) -> DraftObject | None:
    category = entry.get("category_id")
    label = index.get(category) if type(category) is int else None
    if entry["image_id"] not in known:
        findings.add("unknown picture", place, f"no picture has the id {entry['image_id']}")
    elif label is None:
        findings.add("unknown category", place, f"no category has the id {category!r:.40}")
    elif entry.get("iscrowd", 0) not in (0, 1):
        findings.add("bad record", place, f"'iscrowd' is {entry['iscrowd']!r:.40}, expected 0 or 1")
    else:
        return DraftObject(
            place,
            label,
            _corners(entry.get("bbox")),
            bool(entry.get("iscrowd", 0)),
            entry.get("segmentation") or None,  # an empty list says that there is none
            keypoints=entry.get("keypoints"),
            area=_area(entry.get("area")),
        )
    return None


def _area(area: object) -> float:
    """Return the annotated area, NaN where there is no sensible one."""
    if isinstance(area, bool) or not isinstance(area, int | float) or not 0 < area < _MAX_AREA:
        return math.nan
    return float(area)


def _corners(box: object) -> Sequence[object] | None:
    """Turn x y width height into x1 y1 x2 y2; anything else is left to the check, which names it."""
    if box is None:
        return None
    if not isinstance(box, list):
        return (box,)
    if len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return box
    try:
        x, y, width, height = map(float, box)
    except OverflowError:  # JSON's whole numbers have no end
        return box
    return x, y, x + width, y + height


def _keypoint_names(file: Path, categories: Sequence[Entry]) -> tuple[str, ...]:
    """Return the points that the categories have in common. Raises DataError where two differ."""
    for category in categories:
        names = category.get("keypoints") or []
        if not isinstance(names, list) or not all(map(_is_text, names)):
            raise DataError(f"{file}: categories: 'keypoints' must be a list of names, got {names!r:.80}")
    found = {tuple(category["keypoints"]): category["name"] for category in categories if category.get("keypoints")}
    if len(found) > 1:
        raise DataError(
            f"{file}: categories: {' and '.join(map(repr, found.values()))} have different key points; a model has one "
            "list of them: split the data set"
        )
    return next(iter(found), ())


def _parse(file: Path, text: bytes) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # msgspec refuses NaN, which json reads, and which is then one bad record; json also names the line
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        raise DataError(
            f"{file}: line {err.lineno}, column {err.colno}: not valid JSON: {err.msg}; was the file cut off?"
        ) from err
    except (ValueError, RecursionError) as err:  # not UTF-8, a number of thousands of digits, nested too deeply
        raise DataError(f"{file}: not valid JSON: {err}") from err


def _is_id(value: object) -> bool:
    return type(value) is int


def _is_file_name(value: object) -> bool:
    return _is_text(value) and value not in ("", ".", "..") and "\0" not in str(value)


def _is_text(value: object) -> bool:
    """Tell text from other values, and from half of a character, which JSON can say and nothing can write."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)
