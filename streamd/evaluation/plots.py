"""Diagrams of a run and of an evaluation, as PNG. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamd.errors import ConfigError, DataError, OutputError
from streamd.evaluation.coco_metrics import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; black stands for the mean.
COLOURS = ("#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#f0c800", "#7f52a0", "#7a7a7a")
_MEAN = "#101418"
_DPI = 120
_MAX_CURVES = 8  # in one diagram; more cannot be told apart
_MAX_NUMBERED = 20  # classes up to which a confusion matrix shows its counts
_MAX_DOTS = 60  # of a line
_MAX_NAME = 18  # characters of a label on an axis


def precision_recall(curves: Mapping[str, Curves], file: Path) -> None:
    """Draw precision over recall at IoU 0.5: for each kind (boxes, masks, ...) one diagram, with the best F1's place.

    Beyond eight labels, those with the highest and the lowest AP50 are drawn, and the mean always. Raises OutputError.
    """
    num_rows = min(_MAX_CURVES, max(len(one.labels) for one in curves.values())) // 2 + 1
    figure = _figure(5.6 * len(curves), 4.8 + 0.2 * num_rows)
    for index, (kind, one) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), index)
        measured = np.flatnonzero(np.isfinite(one.precision).any(axis=1))
        means = np.nanmean(one.precision[measured], axis=1) if len(measured) else np.zeros(0)
        ranked = measured[np.argsort(-means, kind="stable")]
        half = _MAX_CURVES // 2
        drawn = ranked if len(ranked) <= _MAX_CURVES else np.concatenate((ranked[:half], ranked[-half:]))
        for colour, row in zip(COLOURS, drawn, strict=False):
            _draw_curve(axes, one, int(row), colour)
        if len(measured) > 1:
            mean = one.precision[measured].mean(axis=0)
            title = f"mean of {len(measured)}: {mean.mean():.3f}"
            axes.plot(one.recall, mean, color=_MEAN, linewidth=2, linestyle="--", label=title)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=f"{kind}, IoU 0.5")
        if len(measured):
            title = "label: AP50; best F1 (the dot) at score"
            legend = axes.legend(
                title=title, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small"
            )
            legend.get_title().set_fontsize("small")
            legend.set_frame_on(False)
    _save(figure, file)


def _draw_curve(axes: Axes, curves: Curves, row: int, colour: str) -> None:
    precision, recall = curves.precision[row], curves.recall
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    title = f"{_short(curves.labels[row])}: {precision.mean():.3f}"
    if f1[best] > 0:
        title += f"; {f1[best]:.2f} at {curves.scores[row, best]:.2f}"
        axes.plot(recall[best], precision[best], "o", color=colour, markersize=6)
    axes.plot(recall, precision, color=colour, linewidth=1.6, label=title)


def confusion(counts: np.ndarray, labels: Sequence[str], score_threshold: float, file: Path) -> None:
    """Draw a confusion matrix [C+1,C+1] of objects: the true labels are rows. Raises OutputError.

    Colours are shares of the row: of the objects of a label, and of the predictions of what is no object.
    """
    names = [*map(_short, labels), "nothing"]
    side = min(16.0, max(4.6, 2.6 + 0.5 * len(names)))
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = min(9.0, 560 / len(names))
    turned = {"rotation": 90} if len(names) > _MAX_NUMBERED else {"rotation": 40, "ha": "right"}
    axes.set_xticks(range(len(names)), names, fontsize=size, **(turned if len(names) > 3 else {}))
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="found", ylabel="true", title=f"objects by label, IoU 0.5, score from {score_threshold:.2f} on")
    if len(names) <= _MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.55 else _MEAN
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize="small")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the row", fraction=0.04)
    _save(figure, file)


def curves(metrics: Path, file: Path) -> None:
    """Draw a run's losses, learning rates and scores over epochs, of its lines of JSON.

    A line is an object with `epoch` (a number, with its fraction) and any of `loss`, `loss/NAME`, `lr`, `lr/NAME` and
    `val/NAME`; other keys are left out. Raises DataError, OutputError.
    """
    series = _read(metrics)
    panels = {
        "loss": {name: points for name, points in series.items() if name.split("/")[0] == "loss"},
        "learning rate": {name: points for name, points in series.items() if name.split("/")[0] == "lr"},
        "score": {name: points for name, points in series.items() if name.split("/")[0] == "val"},
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise DataError(f"{metrics}: no line has an epoch and a loss, a learning rate or a score; has the run begun?")
    figure = _figure(5.2 * len(panels), 4.2)
    for index, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), index)
        colours = iter(COLOURS * (1 + len(lines) // len(COLOURS)))
        for name, points in lines.items():
            _draw_series(axes, name, np.array(points), _MEAN if name == "loss" else next(colours))
        axes.set(xlabel="epoch", title=title)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0, top=1 if title == "score" else None)
        axes.legend(fontsize="small")
    _save(figure, file)


def _draw_series(axes: Axes, name: str, points: np.ndarray, colour: str) -> None:
    """Draw what was measured at a few epochs with dots, and what was at every step pale with its running mean."""
    epochs, values = points.T
    title = name.partition("/")[2] or name
    if len(values) <= _MAX_DOTS or name.split("/")[0] == "lr":
        marker = "o" if len(values) <= _MAX_DOTS else None
        axes.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=title)
        return
    axes.plot(epochs, values, color=colour, alpha=0.2, linewidth=0.8)
    width = max(3, len(values) // 40)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    mean = (sums[width:] - sums[:-width]) / width
    axes.plot(epochs[width - 1 :], mean, color=colour, linewidth=1.6, label=title)


def _read(metrics: Path) -> dict[str, list[tuple[float, float]]]:
    """Read (epoch, value) by name; a last line that a killed run left unfinished is left out."""
    try:
        lines = metrics.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{metrics}: cannot read the metrics: {err}") from err
    series: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as err:
            if number == len(lines):
                break
            raise DataError(f"{metrics}: line {number} is not JSON: {err}") from err
        if not isinstance(values, dict) or not _is_number(values.get("epoch")):
            continue
        for name, value in values.items():
            if _is_number(value):
                series.setdefault(name, []).append((float(values["epoch"]), float(value)))
    return series


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _figure(width: float, height: float) -> Figure:
    """Make a figure of its own, without pyplot's global state. Raises ConfigError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError("diagrams need matplotlib: `pip install matplotlib`") from err
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> None:
    for axes in figure.axes:
        if axes.get_images() or axes.get_label() == "<colorbar>":
            continue
        axes.grid(color="#d9dde2", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what the font does not know
            figure.savefig(file, dpi=_DPI)
    except OSError as err:
        raise OutputError(f"{file}: cannot write the picture: {err.strerror or err}") from err


def _short(name: str) -> str:
    """Shorten a label, and keep matplotlib from reading it: `$` begins a formula, and `_` hides a line."""
    if len(name) > _MAX_NAME:
        name = name[: _MAX_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")
