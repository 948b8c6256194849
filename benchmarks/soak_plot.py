"""Draw what a soak has seen.

python -m benchmarks.soak_plot benchmarks/results/soak.json benchmarks/results/soak.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FAULT, MISSED, QUIET, BUSY, LATENCY = "#cccccc", "#d62728", "#1f77b4", "#c6d9ec", "#2ca02c"


def draw(record_path: Path, out: Path) -> None:
    """Draw memory, descriptors, threads and p99 over time, with the faults as grey bars."""
    record: dict[str, Any] = json.loads(record_path.read_text())
    figure, panels = plt.subplots(4, 1, figsize=(11, 9), sharex=True, layout="constrained")
    samples = record["samples"]
    for panel, key, title in (
        (panels[0], "memory_mib", "memory (RssAnon), MiB"),
        (panels[1], "descriptors", "descriptors"),
        (panels[2], "threads", "threads"),
    ):
        _shade(panel, record["faults"])
        for is_quiet, colour, label in ((False, BUSY, "under a fault"), (True, QUIET, "between faults")):
            points = [(one["minute"], one["usage"][key]) for one in samples if one["is_quiet"] == is_quiet]
            if points:
                panel.plot(*zip(*points, strict=True), ".", color=colour, markersize=4, label=label)
        panel.set_ylabel(title)
    panels[0].legend(loc="lower right", fontsize="small")
    _shade(panels[3], record["faults"])
    minutes = [one["minute"] for one in record["witnesses"]]
    panels[3].plot(minutes, [one["p99_ms"] for one in record["witnesses"]], color=LATENCY, label="p99")
    panels[3].plot(minutes, [one["p50_ms"] for one in record["witnesses"]], color=LATENCY, alpha=0.5, label="median")
    idle_ms = [one["idle_p99_ms"] for one in record["witnesses"]]
    panels[3].plot(minutes, idle_ms, color="grey", lw=0.8, label="delay of an idle process, p99")
    panels[3].set_ylabel("capture to\nsubscriber, ms")
    panels[3].set_ylim(bottom=0)
    panels[3].legend(loc="upper right", fontsize="small")
    panels[3].set_xlabel("minutes")
    missed = sum(bool(one["missed"]) for one in record["faults"])
    figure.suptitle(f"{len(record['faults'])} faults (grey; red: {missed} did not go as they must)")
    figure.savefig(out, dpi=90)
    plt.close(figure)


def _shade(panel: Axes, faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        panel.axvspan(fault["began"], fault["ended"], color=MISSED if fault["missed"] else FAULT, alpha=0.35, lw=0)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
