"""Draw a data set onto one sheet: its labels, its boxes' sizes, and twelve samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamd.datasets import masks, pictures
from streamd.datasets.records import DataSet, Record
from streamd.draw import contact_sheet, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# COCO's: a box is small below 32 x 32 pixels and large from 96 x 96 on.
SIZE_LIMITS_PX = (32, 96)

_NUM_SAMPLES = 12
_COLUMNS = 4
# Of the labels, in the diagram and in the samples. Bright, because photographs are dark.
_COLOURS = ("#00a5f5", "#ffab00", "#6ee84a", "#ff5fa2", "#b98cff", "#f2dd00", "#2fdcb4", "#ff7d3b")
_WIDTH_PX = 1600
_CHARTS_PX = 430  # height
_GAP_PX = 12
_DPI = 100
_MAX_BARS = 15
_MAX_NAME = 20  # characters
_SAMPLE_PX = 560  # longest side of a sample, before it is put onto the sheet
_OPACITY = 0.45  # of masks
_SEED = 0  # the same samples each time
_DARK = "#101418"


def draw(dataset: DataSet, file: Path) -> None:
    """Write the sheet as PNG. Raises OutputError, and DataError where a picture cannot be read."""
    samples = [_sample(dataset, record) for record in _choose(dataset)]
    sheet = contact_sheet(samples, _COLUMNS, _WIDTH_PX)
    gap = np.full((_GAP_PX, _WIDTH_PX, 3), 255, np.uint8)
    save_png(np.concatenate((_charts(dataset), gap, sheet)), file)


def sides_px(dataset: DataSet) -> np.ndarray:
    """Return the square root of each box's area, crowds left out, float64 [N]."""
    areas = [
        (one.boxes[:, 2] - one.boxes[:, 0]) * (one.boxes[:, 3] - one.boxes[:, 1])
        for one in (record.objects for record in dataset.records)
    ]
    crowds = [record.objects.is_crowd for record in dataset.records]
    sides: np.ndarray = np.sqrt(np.concatenate(areas)[~np.concatenate(crowds)].astype(np.float64))
    return sides


def label_counts(dataset: DataSet) -> np.ndarray:
    """Count the objects of each label, crowds left out, int64 [C]."""
    labels = [record.objects.labels[~record.objects.is_crowd] for record in dataset.records]
    counts: np.ndarray = np.bincount(np.concatenate(labels), minlength=len(dataset.labels))
    return counts


def _choose(dataset: DataSet) -> list[Record]:
    """Draw records that have objects, if there are any; the first has the usual shape, which the tiles take."""
    records = [record for record in dataset.records if len(record.objects.boxes)] or list(dataset.records)
    order = np.random.default_rng(_SEED).permutation(len(records))[:_NUM_SAMPLES]
    chosen = [records[number] for number in order]
    usual = float(np.median([record.width / record.height for record in dataset.records]))
    return sorted(chosen, key=lambda record: abs(np.log(record.width / record.height / usual)))


def _sample(dataset: DataSet, record: Record) -> np.ndarray:
    """Draw one picture with masks, boxes, key points and, where there are several labels, names."""
    scale = min(1.0, _SAMPLE_PX / max(record.width, record.height))
    size = max(1, round(record.width * scale)), max(1, round(record.height * scale))
    image = Image.fromarray(pictures.read(record.file, (record.width, record.height))).resize(size)
    objects = record.objects
    colours = [_COLOURS[label % len(_COLOURS)] for label in objects.labels]
    for rle, colour in zip(objects.masks or (), colours, strict=False):
        cover = Image.fromarray(masks.decode(rle) * np.uint8(255 * _OPACITY)).resize(size)
        image.paste(Image.new("RGB", size, colour), mask=cover)
    pen = ImageDraw.Draw(image)
    width = max(2, round(max(size) / 200))
    for row, (box, colour) in enumerate(zip(objects.boxes * scale, colours, strict=True)):
        corners = np.minimum(box, (*size, *size)).tolist()
        pen.rectangle(
            (corners[0], corners[1], max(corners[0], corners[2] - 1), max(corners[1], corners[3] - 1)),
            outline=colour,
            width=1 if objects.is_crowd[row] else width,
        )
        if objects.keypoints is not None:
            for x, y, visibility in objects.keypoints[row].tolist():
                if visibility:
                    _dot(pen, x * scale, y * scale, colour if visibility > 1 else "white")
    if len(dataset.labels) > 1:
        for box, label in zip(objects.boxes * scale, objects.labels, strict=True):
            _write(pen, dataset.labels[label], (float(box[0]), float(box[1])), _COLOURS[label % len(_COLOURS)])
    return np.asarray(image)


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, colour: str) -> None:
    pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline=_DARK)


def _write(pen: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], colour: str) -> None:
    font = ImageFont.load_default(13)
    left, top = max(0.0, corner[0]), max(0.0, corner[1] - 16)
    pen.rectangle((left, top, left + pen.textlength(text, font=font) + 5, top + 16), fill=colour)
    pen.text((left + 3, top + 8), text, fill=_DARK, font=font, anchor="lm")


def _charts(dataset: DataSet) -> np.ndarray:
    """Return the diagrams as uint8 RGB [_CHARTS_PX,_WIDTH_PX,3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH_PX / _DPI, _CHARTS_PX / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    num_objects = sum(len(record.objects.boxes) for record in dataset.records)
    figure.suptitle(
        f"{dataset.name}: {len(dataset.records)} pictures, {num_objects} objects, {len(dataset.problems)} problems",
        fontsize=15,
    )
    left, middle, right = figure.subplots(1, 3)
    _draw_labels(left, dataset)
    _draw_sizes(middle, dataset)
    _draw_counts(right, dataset)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_labels(axes: Axes, dataset: DataSet) -> None:
    """Draw a bar for each label, in the colour that its boxes have below."""
    counts = label_counts(dataset)
    ranked = np.argsort(-counts, kind="stable")[:_MAX_BARS]
    names = [_short(dataset.labels[label]) for label in ranked]
    bars = axes.barh(range(len(ranked)), counts[ranked], color=[_COLOURS[label % len(_COLOURS)] for label in ranked])
    axes.bar_label(bars, padding=3, fontsize="small")
    axes.set_yticks(range(len(ranked)), names)
    axes.set_ylim(max(3, len(ranked)) - 0.4, -0.6)
    axes.margins(x=0.15)
    rest = f", the first {_MAX_BARS} of {len(counts)} labels" if len(counts) > _MAX_BARS else ""
    axes.set(title=f"objects of each label{rest}", xlabel="objects")
    _tidy(axes)


def _draw_sizes(axes: Axes, dataset: DataSet) -> None:
    """Draw the distribution of the boxes' sizes, with the limits of small, medium and large."""
    sides = sides_px(dataset)
    axes.set(title="size of boxes", xlabel="root of the area, pixels", ylabel="objects", xscale="log")
    if len(sides):
        low, high = max(1.0, float(sides.min()) * 0.9), max(2.0, float(sides.max()) * 1.1)
        axes.hist(np.maximum(sides, low), bins=np.geomspace(low, high, 41).tolist(), color=_COLOURS[0])
        axes.set_xlim(low, high)
        limits = (low, *SIZE_LIMITS_PX, high)
        for name, first, last in zip(("small", "medium", "large"), limits, limits[1:], strict=False):
            if low < last and first < high:
                axes.axvline(last, color=_DARK, linewidth=0.8, linestyle=":")
                share = np.mean((sides >= first) & (sides < last))
                middle = float(np.sqrt(max(first, low) * min(last, high)))
                axes.text(
                    middle,
                    0.98,
                    f"{name}\n{share:.0%}",
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="top",
                    fontsize="small",
                )
        axes.margins(y=0.22)
        ticks = [tick for tick in (2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048) if low <= tick <= high]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    _tidy(axes)


def _draw_counts(axes: Axes, dataset: DataSet) -> None:
    counts = np.array([len(record.objects.boxes) for record in dataset.records])
    step = max(1, -(-int(counts.max()) // 40))
    axes.hist(counts, bins=(np.arange(0, counts.max() + 2 * step, step) - 0.5).tolist(), color=_COLOURS[1])
    axes.set(title=f"objects of a picture: {counts.mean():.1f} in the mean", xlabel="objects", ylabel="pictures")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
