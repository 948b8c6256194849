"""Read Pascal VOC folders: one XML file for each picture.

`supervision` reads them too, and a test compares the two; but it reads all or nothing: it raises for the first thing
that is wrong, without its place, and it opens every picture. So the files are read here, by Expat alone, and a
document type, without which there are no entities, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from streamd.bounded import read_bytes
from streamd.datasets.findings import Draft, DraftObject, DraftPicture, Findings
from streamd.errors import DataError
from streamd.files import PICTURES

_MAX_BYTES = 16 << 20  # of one file; those of VOC have 2 kB
_MAX_LIST_BYTES = 1 << 30
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the parts of a VOC data set lie."""

    annotations: Path
    images: Path
    splits: Path


def find(path: Path) -> Folder | None:
    """Return the folders of a VOC data set that lies at `path` or one level below."""
    for root in (path, *(sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else ())):
        if (root / "Annotations").is_dir():
            return Folder(root / "Annotations", root / "JPEGImages", root / "ImageSets" / "Main")
    if path.is_dir() and next(path.glob("*.xml"), None):
        return Folder(path, path, path)
    return None


def splits(folder: Folder) -> list[str]:
    """Name the lists of pictures that the data set has."""
    return sorted(file.stem for file in folder.splits.glob("*.txt"))


def read(folder: Folder, images: Path | None, split: str | None, findings: Findings) -> Draft:
    """Read the annotations of a split, or all. Raises DataError.

    The labels are the names in all files, sorted, so that every split of a data set has the same. Corners count
    pixels from 1 and include both ends, so x1 and y1 become less by 1. What is `difficult` teaches neither object nor
    background, as VOC's own evaluation has it.
    """
    files = sorted(folder.annotations.glob("*.xml"))
    wanted, split_files = _wanted(folder, split, files)
    roots: dict[str, Element] = {}
    for file in files:
        try:
            roots[file.stem] = _parse(file)
        except DataError as err:
            if file.stem in wanted:
                findings.add("unreadable annotation", file.name, str(err))
    names = sorted({_text(one, "name") for root in roots.values() for one in root.iter("object")} - {""})
    if not names:
        raise DataError(f"{folder.annotations}: no object in {len(files)} XML files; is this the right folder?")
    index = {name: number for number, name in enumerate(names)}
    there = {file.stem for file in files}
    for stem in wanted:
        if stem not in there:
            findings.add("missing file", f"{split}.txt: {stem}", f"there is no {folder.annotations / stem}.xml")
    image_folder = images or (folder.images if folder.images.is_dir() else folder.annotations)
    pictures = [
        _picture(stem, number, roots[stem], image_folder, index, findings)
        for number, stem in enumerate(wanted, start=1)
        if stem in roots
    ]
    sources = (*split_files, *(folder.annotations / f"{stem}.xml" for stem in wanted if stem in there))
    return Draft(f"{folder.annotations.parent.name} {split or ''}".strip(), tuple(names), pictures, sources)


def _wanted(folder: Folder, split: str | None, files: Sequence[Path]) -> tuple[list[str], list[Path]]:
    """Return the stems of the files that a split names, each once, and the split's own file."""
    if split is None:
        return [file.stem for file in files], []
    listing = folder.splits / f"{split}.txt"
    try:
        lines = read_bytes(listing, _MAX_LIST_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(
            f"{listing}: cannot read the split {split!r}; there are: {', '.join(splits(folder)) or 'none'}"
        ) from err
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip())), [listing]


def _parse(file: Path) -> Element:
    """Raises DataError with what is wrong, without the file's name."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(read_bytes(file, _MAX_BYTES), True)
        return builder.close()
    except expat.ExpatError as err:
        raise DataError(f"not valid XML: {err}") from err
    except (OSError, ValueError) as err:
        raise DataError(f"cannot be read: {err}") from err


def _refuse_doctype(*_: object) -> None:
    raise DataError("declares a document type; VOC has none, and entities could grow without end: remove it")


def _picture(
    stem: str, number: int, root: Element, images: Path, index: dict[str, int], findings: Findings
) -> DraftPicture:
    place = f"{stem}.xml"
    objects = []
    for count, one in enumerate(root.iter("object"), start=1):
        where = f"{place}: object {count}"
        if (name := _text(one, "name")) in index:
            box = _box(one)
            objects.append(DraftObject(where, index[name], box, is_crowd=_text(one, "difficult") == "1"))
        else:
            findings.add("unknown category", where, "has no name")
    return DraftPicture(place, _file(stem, root, images), number, _size(root), objects)


def _file(stem: str, root: Element, images: Path) -> Path:
    """Find the picture: by the name of the XML file, or by the name in it, which tools leave behind when they copy."""
    namesakes = (images / f"{stem}{suffix}" for suffix in sorted(PICTURES, key=lambda suffix: suffix != ".jpg"))
    named = images / Path(_text(root, "filename") or f"{stem}.jpg").name
    return next((file for file in namesakes if file.is_file()), named)


def _size(root: Element) -> tuple[int, int] | None:
    size = root.find("size")
    if size is None:
        return None
    width, height = (_number(_text(size, side)) for side in ("width", "height"))
    return (int(width), int(height)) if width and height and width.is_integer() and height.is_integer() else None


def _box(one: Element) -> Sequence[object]:
    """Return x1 y1 x2 y2. Where xmax <= xmin it is empty: by the letter one pixel, in truth a slip of the mouse."""
    corners = one.find("bndbox")
    values = [_number(_text(corners, side)) if corners is not None else None for side in _SIDES]
    if any(value is None for value in values):
        return values
    left, top, right, bottom = (value for value in values if value is not None)
    if right <= left or bottom <= top:
        return left, top, right, bottom
    return left - 1, top - 1, right, bottom


def _text(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
