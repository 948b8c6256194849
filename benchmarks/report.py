"""Put results beside each other and beside the targets: a table on the terminal, Markdown and JSON for the record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.absence import Frozen, Idle
from benchmarks.figures import Figures
from benchmarks.measure import Machine
from benchmarks.readers import StageCosts

FIRST_MESSAGE_S = 4.0
FAIR_SHARE = 0.95
OTHER_SHARE = 0.15
IDLE_CORE_PERCENT = 2.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each reader, one after the other, between two readings of the bare model."""

    streamd: Figures
    naive: Figures
    bare_before: float  # images/s
    bare_after: float


@dataclass(frozen=True, slots=True)
class Scale:
    """All runs with one number of streams."""

    num_streams: int
    pairs: Sequence[Pair]
    costs: StageCosts


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one call of the benchmark found."""

    machine: Machine
    model: str
    model_sha256: str
    clip: str
    bare_layout: str
    scales: Sequence[Scale] = ()
    idle: Idle | None = None
    frozen: Sequence[Frozen] = field(default=())


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison."""

    title: str
    read: Callable[[Figures], float]
    form: str = "{:.1f}"


ROWS = (
    Row("frames/s, all streams", lambda run: run.frames_per_s),
    Row("frames/s, mean stream", lambda run: statistics.fmean(run.frames_per_s_of.values())),
    Row("frames/s, slowest stream", lambda run: min(run.frames_per_s_of.values())),
    Row("slowest / mean", lambda run: run.slowest, "{:.2f}"),
    Row("sent frames dropped, %", lambda run: run.dropped * 100),
    Row("send to publish p50, ms", lambda run: run.latency_ms.p50),
    Row("send to publish p95, ms", lambda run: run.latency_ms.p95),
    Row("send to publish p99, ms", lambda run: run.latency_ms.p99),
    Row("CPU per frame, ms", lambda run: run.cpu_ms_per_frame),
    Row("CPU, cores", lambda run: run.cpu_cores, "{:.2f}"),
    Row("peak memory, MiB", lambda run: run.peak_memory_mib, "{:.0f}"),
    Row("first message, s", lambda run: run.first_message_s, "{:.2f}"),
    Row("first of every stream, s", lambda run: run.first_of_all_s, "{:.2f}"),
    Row("RTSP server, cores", lambda run: run.server_cores, "{:.2f}"),
    Row("subscriber, cores", lambda run: run.subscriber_cores, "{:.3f}"),
    Row("everybody else, cores", lambda run: run.others_cores, "{:.2f}"),
)
BY_TITLE = {row.title: row for row in ROWS}

# By number of streams: what streamd's figure may be, as a multiple of the naive reader's in the same pair.
RATIO_TARGETS: dict[int, dict[str, tuple[str, float]]] = {
    1: {"CPU per frame, ms": ("<=", 0.60), "send to publish p95, ms": ("<=", 0.65)},
    8: {"frames/s, all streams": (">=", 1.30), "send to publish p95, ms": ("<=", 0.60)},
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what was found."""

    text: str
    found: float
    sign: str
    limit: float

    @property
    def met(self) -> bool:
        return self.found >= self.limit if self.sign == ">=" else self.found <= self.limit

    def __str__(self) -> str:
        return f"{self.text}: {self.found:.3g}, to reach {self.sign} {self.limit:g}: {'met' if self.met else 'NOT MET'}"


def ratio(scale: Scale, title: str) -> float:
    """Return the median over the pairs of streamd's figure as a multiple of the naive reader's."""
    read = BY_TITLE[title].read
    ratios = [read(pair.streamd) / naive for pair in scale.pairs if (naive := read(pair.naive))]
    return statistics.median(ratios) if ratios else float("nan")


def verdicts(results: Results) -> list[Verdict]:
    """Hold the results against every target that they say something about."""
    found = []
    for scale in results.scales:
        streams = f"{scale.num_streams} stream{'s' if scale.num_streams > 1 else ''}"
        for title, (sign, limit) in RATIO_TARGETS.get(scale.num_streams, {}).items():
            found.append(Verdict(f"{streams}, {title}, streamd / naive", ratio(scale, title), sign, limit))
        runs = [pair.streamd for pair in scale.pairs]
        if scale.num_streams == 8:
            slowest = statistics.median(run.slowest for run in runs)
            found.append(Verdict(f"{streams}, slowest / mean", slowest, ">=", FAIR_SHARE))
        first_s = statistics.median(run.first_message_s for run in runs)
        found.append(Verdict(f"{streams}, first message, s", first_s, "<=", FIRST_MESSAGE_S))
        other = scale.costs.other_share
        found.append(Verdict(f"{streams}, CPU that is not decode or forward", other, "<=", OTHER_SHARE))
    if results.idle:
        idle = results.idle
        text = f"{idle.num_streams} cameras away, % of a core"
        found.append(Verdict(text, idle.core_percent, "<=", IDLE_CORE_PERCENT))
    return found


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of each table."""
    made = [_comparison(scale) for scale in results.scales]
    made += [_stages(scale) for scale in results.scales]
    if results.idle:
        idle = results.idle
        row = [str(idle.num_streams), f"{idle.seconds:.0f}", f"{idle.core_percent:.2f}"]
        made.append(("Idle: nothing listens at any camera's address", ["cameras", "seconds", "% of a core"], [row]))
    if results.frozen:
        made.append(_frozen(results.frozen))
    return made


def _comparison(scale: Scale) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    targets = RATIO_TARGETS.get(scale.num_streams, {})
    for row in ROWS:
        ours = [row.read(pair.streamd) for pair in scale.pairs]
        theirs = [row.read(pair.naive) for pair in scale.pairs]
        target = " ".join(map(str, targets[row.title])) if row.title in targets else ""
        cells = [_span(values, row.form) for values in (ours, theirs)]
        rows.append([row.title, *cells, f"{ratio(scale, row.title):.2f}", target])
    bare = [value for pair in scale.pairs for value in (pair.bare_before, pair.bare_after)]
    rows.append(["bare model between the runs, images/s", _span(bare, "{:.1f}"), "", "", ""])
    title = f"{scale.num_streams} stream(s), median (least-most) of {len(scale.pairs)} pair(s)"
    return title, ["", "streamd", "naive", "ratio", "to reach"], rows


def _stages(scale: Scale) -> tuple[str, list[str], list[list[str]]]:
    """Where a frame's CPU goes by stage and by thread, and how long it takes in each stage."""
    run = scale.pairs[-1].streamd
    costs = scale.costs
    rest_ms = costs.total_ms - sum(costs.stages_ms.values())
    stages = {**costs.stages_ms, "reading, threads, publishing": rest_ms}
    rows = [["CPU of " + stage, f"{ms:.2f}", f"{ms / costs.total_ms:.0%}"] for stage, ms in stages.items()]
    rows += [
        ["CPU of threads " + group, f"{ms:.2f}", f"{ms / run.cpu_ms_per_frame:.0%}"]
        for group, ms in run.threads_ms_per_frame.items()
        if ms >= 0.005
    ]
    rows += [
        ["time in " + name, f"{spread.mean:.1f}", f"p95 {spread.p95:.1f}"] for name, spread in run.stages_ms.items()
    ]
    title = f"{scale.num_streams} stream(s): a frame in streamd; it chose {run.settings}"
    return title, ["", "ms", ""], rows


def _frozen(runs: Sequence[Frozen]) -> tuple[str, list[str], list[list[str]]]:
    header = ["", "before", "during", "after", "longest silence, s", "frozen one back after, s"]
    rows = [
        [
            run.reader,
            *(f"{rate:.1f}" for rate in run.others),
            f"{run.longest_silence_s:.2f}",
            "never" if run.back_after_s is None else f"{run.back_after_s:.1f}",
        ]
        for run in runs
    ]
    title = f"One of {runs[0].num_streams} cameras frozen for {runs[0].phase_s:.0f} s: frames/s of the others together"
    return title, header, rows


def _span(values: Sequence[float], form: str) -> str:
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))}-{form.format(max(values))})"


def show(results: Results, console: Console) -> None:
    """Print everything on the terminal."""
    for title, header, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for verdict in verdicts(results):
        console.print(str(verdict), style="green" if verdict.met else "red", markup=False, soft_wrap=True)


def write(results: Results, out: Path) -> tuple[Path, Path]:
    """Write OUT.json with everything and OUT.md for people."""
    out.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = out.with_name(out.name + ".json"), out.with_name(out.name + ".md")
    found = {**asdict(results), "verdicts": [{**asdict(each), "met": each.met} for each in verdicts(results)]}
    as_json.write_text(json.dumps(found, indent=1) + "\n")
    as_markdown.write_text("\n".join(_markdown(results)) + "\n")
    return as_json, as_markdown


def _markdown(results: Results) -> Iterable[str]:
    machine = results.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield from (f"# {machine.command}", "", f"{machine.date}, revision {machine.revision}.", "")
    yield f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}; {packages}."
    yield f"Model {results.model} (weights {results.model_sha256[:16]}), clip {results.clip}."
    yield f"Bare model: {results.bare_layout}."
    for title, header, rows in tables(results):
        yield from ("", f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}")
        yield from (f"| {' | '.join(row)} |" for row in rows)
    yield from ("", "## Targets", "")
    yield from (f"- {verdict}" for verdict in verdicts(results))
