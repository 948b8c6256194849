"""A sheet of pictures, the best and the worst: what is there in green, what was found in other colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamd.datasets.masks import decode
from streamd.datasets.records import DataSet, Rle
from streamd.draw import save_png
from streamd.evaluation.matching import Match
from streamd.evaluation.plots import COLOURS

_TRUTH = "#00c853"
_DARK = "#101418"
_COLUMNS = 4
_TILE_PX = 480  # a tile's width and the height of its picture
_CAPTION_PX = 44
_GAP_PX = 8
_DEEP = frozenset(("#0072b2", "#d55e00", "#7f52a0", "#7a7a7a"))  # colours on which white letters are clearer
_OPACITY = 0.4
_MIN_POINT_SCORE = 0.05

Read = Callable[[Match], np.ndarray]


def choose(matches: Sequence[Match], num_pictures: int = 12) -> list[Match]:
    """Take the best half and the worst half by F1; of equally good ones those with more objects."""
    telling = [one for one in matches if len(one.truth) or len(one.shown)]
    ranked = sorted(telling, key=lambda one: (one.f1, min(8, len(one.truth))), reverse=True)
    if len(ranked) <= num_pictures:
        return ranked
    half = num_pictures // 2
    worst = sorted(telling, key=lambda one: (one.f1, -one.num_missed - one.num_wrong))[:half]
    return [*ranked[: num_pictures - half], *reversed(worst)]


def draw(matches: Sequence[Match], dataset: DataSet, read: Read, file: Path) -> None:
    """Draw the chosen pictures onto one sheet; `read` gives a picture as uint8 RGB. Raises OutputError."""
    rows = -(-len(matches) // _COLUMNS)
    columns = min(_COLUMNS, len(matches))
    step_x, step_y = _TILE_PX + _GAP_PX, _TILE_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * step_x - _GAP_PX, rows * step_y - _GAP_PX), "white")
    for index, one in enumerate(matches):
        sheet.paste(_tile(one, dataset, read(one)), (index % _COLUMNS * step_x, index // _COLUMNS * step_y))
    save_png(np.asarray(sheet), file)


def _tile(one: Match, dataset: DataSet, picture: np.ndarray) -> Image.Image:
    """Draw one picture, scaled first, so that lines and letters are equally large on all."""
    height, width = picture.shape[:2]
    scale = min(_TILE_PX / width, _TILE_PX / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    found, objects = one.prediction, one.prediction.record.objects
    if found.masks is not None:
        masks = [(found.masks[row], COLOURS[found.labels[row] % len(COLOURS)]) for row in one.shown]
        image = _tint(image, masks)
    if objects.masks is not None:
        image = _outline(image, [objects.masks[row] for row in one.truth])
    pen = ImageDraw.Draw(image)
    for row in one.truth:
        pen.rectangle(_scaled(objects.boxes[row], scale), outline=_TRUTH, width=3)  # to be seen around what was found
        if objects.keypoints is not None and found.keypoints is not None:
            _draw_points(pen, objects.keypoints[row] * (scale, scale, 1), _TRUTH, 0.5)
    for row in one.shown:
        colour = COLOURS[found.labels[row] % len(COLOURS)]
        pen.rectangle(_scaled(found.boxes[row], scale), outline=colour, width=2)
        if found.keypoints is not None:
            _draw_points(pen, found.keypoints[row] * (scale, scale, 1), colour, _MIN_POINT_SCORE)
    taken: list[tuple[float, float, float, float]] = []
    for row in one.shown:  # last, so that no line runs through a title
        colour, box = COLOURS[found.labels[row] % len(COLOURS)], _scaled(found.boxes[row], scale)
        _write(pen, f"{dataset.labels[found.labels[row]]} {found.scores[row]:.2f}", box, colour, image.size, taken)
    tile = Image.new("RGB", (_TILE_PX, _TILE_PX + _CAPTION_PX), "#e9ecef")
    tile.paste(image, ((_TILE_PX - size[0]) // 2, (_TILE_PX - size[1]) // 2))
    _caption(tile, one)
    return tile


def _caption(tile: Image.Image, one: Match) -> None:
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, _TILE_PX, _TILE_PX, _TILE_PX + _CAPTION_PX), fill=_DARK)
    counts = f"F1 {one.f1:.2f}: {one.num_right} right, {one.num_wrong} wrong, {one.num_missed} missed"
    middle = _TILE_PX + _CAPTION_PX / 2
    font = ImageFont.load_default(17)
    pen.text((_TILE_PX - 10, middle), counts, fill="white", font=font, anchor="rm")
    name, room = one.prediction.record.file.stem, _TILE_PX - 34 - pen.textlength(counts, font=font)
    while pen.textlength(name, font=font) > room:  # the end of a name tells pictures apart
        name = f"\N{HORIZONTAL ELLIPSIS}{name[2:]}"
    pen.text((10, middle), name, fill="#b8c0c8", font=font, anchor="lm")


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: tuple[float, ...],
    colour: str,
    limit: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a title at the first corner of its box where it covers no other; no corner is free: no title."""
    font = ImageFont.load_default(13)
    width, height = pen.textlength(text, font=font) + 6, 17.0
    left = min(max(0.0, box[0]), limit[0] - width)
    for top in (box[1] - height, box[1], box[3] - height, box[3]):
        place = (left, top, left + width, top + height)
        free = top >= 0 and top + height <= limit[1]
        if free and not any(_overlap(place, other) for other in taken):
            taken.append(place)
            pen.rectangle(place, fill=colour)
            pen.text(
                (left + 3, top + height / 2), text, fill="white" if colour in _DEEP else _DARK, font=font, anchor="lm"
            )
            return


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _tint(image: Image.Image, masks: Sequence[tuple[Rle, str]]) -> Image.Image:
    for rle, colour in masks:
        cover = Image.fromarray(decode(rle) * np.uint8(255 * _OPACITY)).resize(image.size)
        image.paste(Image.new("RGB", image.size, colour), mask=cover)
    return image


def _outline(image: Image.Image, masks: Sequence[Rle]) -> Image.Image:
    """Draw the edges of masks, two pixels wide."""
    for rle in masks:
        inside = np.asarray(Image.fromarray(decode(rle) * np.uint8(255)).resize(image.size)) > 127
        edge = np.zeros_like(inside)
        for one, next_one in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
            differs = inside[one] != inside[next_one]
            edge[one] |= differs
            edge[next_one] |= differs
        cover = Image.fromarray(edge.astype(np.uint8) * 255)
        image.paste(Image.new("RGB", image.size, _TRUTH), mask=cover)
    return image


def _draw_points(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: str, threshold: float) -> None:
    for x, y, sure in points.tolist():
        if sure >= threshold:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline=_DARK)


def _scaled(box: np.ndarray, scale: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (box * scale).tolist()
    return x1, y1, max(x1, x2), max(y1, y2)
