"""Show what a data set holds and what is wrong with it, as tables and as one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from streamd.datasets import overview
from streamd.datasets.overview import SIZE_LIMITS_PX, label_counts, sides_px
from streamd.datasets.records import DataSet, Problem

EXIT_OK = 0
EXIT_PROBLEMS = 1

_NUM_SHOWN = 4  # problems of each kind
_MAX_LABELS = 40  # rows of the table
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def show(dataset: DataSet, console: Console, picture: Path | None = None) -> int:
    """Print the report, and draw it to `picture`, a PNG. Returns 0, or 1 where there are problems.

    Raises OutputError where the picture cannot be written, DataError where a sample of it cannot be read.
    """
    console.print(_summary(dataset), highlight=False)
    console.print(_labels(dataset))
    console.print(_quantiles(dataset))
    for line in _problems(dataset.problems):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if picture is not None:
        overview.draw(dataset, picture)
        console.print(f"drawn: {picture}", highlight=False, markup=False)
    return EXIT_PROBLEMS if dataset.problems else EXIT_OK


def _summary(dataset: DataSet) -> str:
    records = dataset.records
    counts = [len(record.objects.boxes) for record in records]
    num_crowds = sum(int(record.objects.is_crowd.sum()) for record in records)
    num_masked = sum(record.objects.masks is not None for record in records)
    parts = [
        f"[bold]{dataset.name}[/bold]: {len(records)} pictures, {sum(counts)} objects, {len(dataset.labels)} labels",
        f"{counts.count(0)} pictures without objects" if 0 in counts else "",
        f"{num_crowds} crowds" if num_crowds else "",
        f"masks in {num_masked} pictures" if num_masked else "",
        f"{len(dataset.keypoint_names)} key points" if dataset.keypoint_names else "",
        f"{len(dataset.stuff_labels) - 1} kinds of stuff" if dataset.stuff_labels else "",
    ]
    return f"{'; '.join(part for part in parts if part)}\nfingerprint {dataset.fingerprint[:16]}"


def _labels(dataset: DataSet) -> Table:
    """Tabulate the objects and the pictures of each label, the most frequent first."""
    table = Table("label", box=None, header_style="bold")
    for name in ("objects", "share", "pictures"):
        table.add_column(name, justify="right")
    counts = label_counts(dataset)
    pictures = Counter(label for record in dataset.records for label in set(record.objects.labels.tolist()))
    ranked = np.argsort(-counts, kind="stable").tolist()
    for label in ranked[:_MAX_LABELS]:
        share = f"{counts[label] / max(1, counts.sum()):.1%}"
        table.add_row(dataset.labels[label], str(counts[label]), share, str(pictures[label]))
    if len(ranked) > _MAX_LABELS:
        rest = ranked[_MAX_LABELS:]
        table.add_row(f"{len(rest)} more", str(counts[rest].sum()), f"{counts[rest].sum() / counts.sum():.1%}", "")
    return table


def _quantiles(dataset: DataSet) -> Table:
    """Tabulate how large pictures and boxes are, and how many objects a picture has."""
    table = Table("", box=None, header_style="bold")
    for quantile in _QUANTILES:
        table.add_column(f"{quantile:.0%}", justify="right")
    table.add_column("")
    sides = sides_px(dataset)
    small, large = SIZE_LIMITS_PX
    parts = [np.mean(part) if len(sides) else 0 for part in (sides < small, (sides >= small) & (sides < large))]
    sizes = (
        f"{parts[0]:.0%} small (below {small}), {parts[1]:.0%} medium, {1 - sum(parts):.0%} large ({large} and more)"
    )
    rows: Sequence[tuple[str, Iterable[float], str]] = (
        ("picture's width, px", [record.width for record in dataset.records], ""),
        ("picture's height, px", [record.height for record in dataset.records], ""),
        ("box, root of its area, px", sides, sizes if len(sides) else ""),
        ("objects a picture", [len(record.objects.boxes) for record in dataset.records], ""),
    )
    for name, values, note in rows:
        numbers = list(values)
        cells = [f"{value:.0f}" for value in np.quantile(numbers, _QUANTILES)] if numbers else [""] * len(_QUANTILES)
        table.add_row(name, *cells, note)
    return table


def _problems(problems: Sequence[Problem]) -> list[str]:
    if not problems:
        return ["no problems found"]
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; what they concern was left out:"]
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        lines.append(f"  {kind}: {count}")
        of_kind = [problem for problem in problems if problem.kind == kind]
        lines += [f"    {problem.place}: {problem.text}" for problem in of_kind[:_NUM_SHOWN]]
        if count > _NUM_SHOWN:
            lines.append(f"    ... and {count - _NUM_SHOWN} more")
    return lines
