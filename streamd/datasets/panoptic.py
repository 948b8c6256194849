"""Read COCO's panoptic JSON with its folder of PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamd.datasets import coco, masks, pictures
from streamd.datasets.coco import Entry
from streamd.datasets.findings import Draft, DraftObject, DraftPicture, Findings
from streamd.datasets.records import Segment
from streamd.errors import DataError

THINGS = "things"  # the name of channel 0, which stands for all of them
_NUM_THREADS = 4  # Pillow and numpy let go of the interpreter while they work


class _Categories(NamedTuple):
    things: Mapping[int, int]  # category id -> index into the labels
    stuff: Mapping[int, int]  # -> index into the stuff labels


def read(file: Path, content: Mapping[str, list[Any]], images: Path | None, findings: Findings) -> Draft:
    """Read segments; a thing's box and mask are made of its pixels, so every PNG is decoded. Raises DataError."""
    entries = coco.read_categories(file, content["categories"])
    things = [entry for entry in entries if entry.get("isthing", 1)]
    stuff = [entry for entry in entries if not entry.get("isthing", 1)]
    categories = _Categories(
        {entry["id"]: number for number, entry in enumerate(things)},
        {entry["id"]: number for number, entry in enumerate(stuff, start=1)},
    )
    folder = file.with_suffix("")
    if not folder.is_dir():
        raise DataError(f"{file}: the folder {folder} with its PNG files is missing; it must lie beside the JSON file")
    annotations = _by_picture(file, content["annotations"], findings)
    sound = coco.read_entries(file, content["images"], findings)
    pictures_folder = coco.find_folder(file, sound, images)

    def draft(entry: Entry) -> tuple[DraftPicture | None, Findings]:
        own = Findings()
        return _picture(file, entry, annotations.get(entry["id"]), categories, (pictures_folder, folder), own), own

    drafts = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for one, own in pool.map(draft, sound):
            findings.problems += own.problems
            drafts += [one] if one is not None else []
    return Draft(
        name=file.stem,
        labels=tuple(entry["name"] for entry in things),
        pictures=drafts,
        sources=(file, *(one.segments_file for one in drafts if one.segments_file is not None)),
        stuff_labels=(THINGS, *(entry["name"] for entry in stuff)),
    )


def _by_picture(file: Path, annotations: Sequence[Any], findings: Findings) -> dict[int, Entry]:
    found: dict[int, Entry] = {}
    for number, entry in enumerate(annotations):
        place = f"{file.name}: annotations[{number}]"
        is_sound = (
            isinstance(entry, dict)
            and type(entry.get("image_id")) is int
            and isinstance(entry.get("file_name"), str)
            and isinstance(entry.get("segments_info"), list)
        )
        if not is_sound:
            text = f"needs 'image_id', 'file_name' and 'segments_info', got {entry!r:.80}"
            findings.add("bad record", place, text)
        elif entry["image_id"] in found:
            findings.add("duplicate id", place, f"image {entry['image_id']} was annotated before")
        else:
            found[entry["image_id"]] = entry
    return found


def _picture(
    file: Path,
    entry: Entry,
    annotation: Entry | None,
    categories: _Categories,
    folders: tuple[Path, Path],
    findings: Findings,
) -> DraftPicture | None:
    """Read the segments of one picture; None where they cannot be used."""
    place = f"{file.name}: image {entry['id']}"
    if annotation is None:
        findings.add("bad record", place, "the picture has no annotation")
        return None
    segments_file = folders[1] / annotation["file_name"]
    try:
        ids = pictures.read_segment_ids(segments_file)
    except DataError as err:
        findings.add("unreadable annotation" if os.path.isfile(segments_file) else "missing file", place, str(err))
        return None
    size = coco.size_of(entry) or (ids.shape[1], ids.shape[0])
    if ids.shape != size[::-1]:
        text = f"{segments_file.name} has {ids.shape[1]} x {ids.shape[0]} pixels, the picture {size[0]} x {size[1]}"
        findings.add("size differs", place, text)
        return None
    segments, objects = _segments(annotation["segments_info"], place, ids, categories, findings)
    return DraftPicture(
        place,
        folders[0] / entry["file_name"],
        entry["id"],
        size,
        objects,
        has_masks=True,
        segments_file=segments_file,
        segments=segments,
    )


def _segments(
    entries: Sequence[Any], place: str, ids: np.ndarray, categories: _Categories, findings: Findings
) -> tuple[tuple[Segment, ...], list[DraftObject]]:
    present = set(np.unique(ids).tolist()) - {0}
    segments, objects = [], []
    for number, entry in enumerate(entries):
        where = f"{place}: segments_info[{number}]"
        segment = _segment(entry, categories)
        if segment is None:
            findings.add("bad segment", where, f"needs an 'id' and a known 'category_id', got {entry!r:.80}")
        elif segment.id not in present:
            findings.add("bad segment", where, f"no pixel of the PNG has the id {segment.id}")
        else:
            present.discard(segment.id)
            segments.append(segment)
            if segment.is_thing:
                mask = masks.encode_pixels(ids == segment.id)
                box = masks.box_of(mask)
                objects.append(DraftObject(where, segment.label, box, segment.is_crowd, mask=mask))
    if present:
        findings.add("bad segment", place, f"{len(present)} ids of the PNG are not in its segments_info: not labelled")
    return tuple(segments), objects


def _segment(entry: Any, categories: _Categories) -> Segment | None:
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or type(entry.get("category_id")) is not int:
        return None
    category = entry["category_id"]
    is_thing = category in categories.things
    label = categories.things.get(category, categories.stuff.get(category))
    return None if label is None else Segment(entry["id"], label, is_thing, bool(entry.get("iscrowd", 0)))
