"""Read a data set of any known format, check it, and drop what is wrong."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from streamd.datasets import coco, panoptic, voc, yolo
from streamd.datasets.accept import accept
from streamd.datasets.findings import Draft, Findings
from streamd.datasets.records import DataSet, Problem, Record
from streamd.errors import DataError

Format = Literal["auto", "coco", "voc", "yolo", "panoptic"]

_EXPECTED = (
    "expected a JSON file of COCO, or a folder with one; a folder with Annotations/*.xml (Pascal VOC); or a folder "
    "with data.yaml (YOLO)"
)


def read(
    path: Path, *, images: Path | None = None, format: Format = "auto", split: str | None = None, deep: bool = False
) -> DataSet:
    """Read and check a data set; bad records are left out and listed in its `problems`.

    `path` is a file of annotations or the folder of a data set, of which `split` names a part: the list in ImageSets
    of VOC (none: all pictures), the key in YOLO's data.yaml, the JSON file of COCO (train.json,
    instances_train2017.json). `images` says where the pictures are if they are not where the format has them. Pictures'
    headers are read; `deep` decodes them, so that truncated ones are found.

    Raises DataError where a whole file is bad or nothing sound is left.
    """
    findings = Findings()
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder; check the path")
    draft = _read(path, images, format, split, findings)
    records = accept(draft, findings, deep=deep)
    if not records:
        raise DataError(_nothing_left(path, findings.problems))
    return DataSet(
        name=draft.name,
        labels=draft.labels,
        records=records,
        keypoint_names=draft.keypoint_names,
        stuff_labels=draft.stuff_labels,
        problems=tuple(findings.problems),
        fingerprint=_fingerprint(draft.sources, records),
    )


def _read(path: Path, images: Path | None, format: Format, split: str | None, findings: Findings) -> Draft:
    """Find out the format and read it."""
    if format in ("auto", "voc") and (folder := voc.find(path)):
        return voc.read(folder, images, split, findings)
    if format in ("auto", "yolo") and (description := yolo.find(path)):
        return yolo.read(description, images, split, findings)
    if format in ("auto", "coco", "panoptic") and (file := _json_file(path, split)):
        content = coco.load(file)
        has_segments = coco.is_panoptic(content)
        if format != "auto" and has_segments != (format == "panoptic"):
            raise DataError(
                f"{file}: is {'panoptic' if has_segments else 'not panoptic'}, but the format says {format}"
            )
        return (panoptic if has_segments else coco).read(file, content, images, findings)
    raise DataError(f"{path}: no data set was found here; {_EXPECTED}")


def _json_file(path: Path, split: str | None) -> Path | None:
    """Return the one JSON file that is meant. Raises DataError where there are several."""
    if path.is_file():
        return path if path.suffix == ".json" else None
    files = sorted((*path.glob("*.json"), *path.glob("annotations/*.json"), *path.glob("*/_annotations.coco.json")))
    fitting = [file for file in files if split is None or _is_split(file, split)]
    if len(fitting) == 1:
        return fitting[0]
    if not files:
        return None
    there = ", ".join(str(file.relative_to(path)) for file in files[:8])
    what = f"{len(fitting)} JSON files fit" if fitting else "no JSON file fits"
    wanted = f" the split {split!r}" if split else ""
    raise DataError(f"{path}: {what}{wanted}; name one of them: {there}")


def _is_split(file: Path, split: str) -> bool:
    last = file.stem.rpartition("_")[2]
    return split in (file.stem, last, last.rstrip("0123456789"), file.parent.name)


def _nothing_left(path: Path, problems: Sequence[Problem]) -> str:
    if not problems:
        return f"{path}: the data set has no picture; check the path and the split"
    kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(one.kind for one in problems).most_common())
    first = problems[0]
    return f"{path}: no picture is usable: {kinds}; the first: {first.place}: {first.text}"


def _fingerprint(sources: Sequence[Path], records: Sequence[Record]) -> str:
    """Return a sha256 that changes with the annotations, and with the name or size of a picture's file."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    for record in records:
        digest.update(b"%s\0%d\n" % (os.fsencode(record.file.name), record.file.stat().st_size))
    return digest.hexdigest()
