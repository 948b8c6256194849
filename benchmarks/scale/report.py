"""Boil the runs down to tables, and write them with the machine and the command in them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measure import Machine
from benchmarks.scale.messages import SINKS, Cost
from benchmarks.scale.streams import Return, Streams

RETURN_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Line:
    """y = slope * x + base, by least squares."""

    slope: float
    base: float

    @classmethod
    def fit(cls, points: Mapping[float, float]) -> Line:
        """Needs two points or more."""
        slope, base = statistics.linear_regression([*points], [*points.values()])
        return cls(slope, base)


def stream_tables(runs: Sequence[Streams]) -> list[Table]:
    """One row for each number of streams, and what one more costs."""
    by_case = _grouped(runs, lambda run: (run.mode, str(run.picture), run.num_streams))
    header = ["", "cameras", "CPU of a stream, % of a core", "streams a core", "of what was sent, read"]
    header += ["threads", "descriptors", "RSS, MiB", "PSS, MiB", "own pages, MiB", "all sent a message after, s"]
    header += ["server, cores", "others, cores"]
    rows = [
        [
            f"{mode}, {picture}, {case[0].kbit_s:.0f} kbit/s",
            str(num_streams),
            _span([run.cpu_percent_per_stream for run in case], "{:.2f}"),
            f"{100 / statistics.median(run.cpu_percent_per_stream for run in case):.0f}",
            _span([run.read_share * 100 for run in case], "{:.1f} %"),
            _span([run.held.num_threads for run in case], "{:.0f}"),
            _span([run.held.num_descriptors for run in case], "{:.0f}"),
            _span([run.held.rss_mib for run in case], "{:.0f}"),
            _span([run.held.pss_mib for run in case], "{:.0f}"),
            _span([run.held.own_mib for run in case], "{:.0f}"),
            _span([run.all_streams_s for run in case], "{:.1f}"),
            _span([run.server_cores for run in case], "{:.2f}"),
            _span([run.others_cores for run in case], "{:.2f}"),
        ]
        for (mode, picture, num_streams), case in by_case.items()
    ]
    return [Table("What so many cameras cost", header, rows), *_one_more(by_case)]


READINGS: Mapping[str, tuple[Callable[[Streams], float], str]] = {
    "CPU, % of a core": (lambda run: run.cpu_cores * 100, "{:.3f}"),
    "RSS, MiB": (lambda run: run.held.rss_mib, "{:.2f}"),
    "PSS, MiB": (lambda run: run.held.pss_mib, "{:.2f}"),
    "own pages, MiB": (lambda run: run.held.own_mib, "{:.2f}"),
    "threads": (lambda run: run.held.num_threads, "{:.2f}"),
    "descriptors": (lambda run: run.held.num_descriptors, "{:.2f}"),
}


def _one_more(by_case: Mapping[tuple[str, str, int], Sequence[Streams]]) -> Iterable[Table]:
    for (mode, picture), cases in groupby(by_case, key=lambda case: case[:2]):
        numbers = [case[2] for case in cases]
        if len(numbers) < 2:
            continue
        rows = []
        for title, (read, form) in READINGS.items():
            runs_of = {number: by_case[mode, picture, number] for number in numbers}
            medians = {float(number): statistics.median(map(read, runs)) for number, runs in runs_of.items()}
            line = Line.fit(medians)
            rows.append([title, form.format(line.slope), form.format(line.base)])
        title = f"{mode}, {picture}: a line through {', '.join(map(str, numbers))} cameras"
        yield Table(title, ("", "one more stream", "none"), rows)


def return_tables(runs: Sequence[Return]) -> list[Table]:
    """One row for each length of the outage."""
    header = ["cameras", "away for, s", "half are back after, s", "all are back after, s", f"<= {RETURN_WITHIN_S:g} s"]
    header += ["CPU while away, % of a core", "threads before, after", "descriptors before, after"]
    rows = [
        [
            str(run.num_streams),
            f"{run.outage_s:g}",
            f"{run.median_s:.1f}",
            f"{run.last_s:.1f}",
            "met" if run.last_s <= RETURN_WITHIN_S else "NOT MET",
            f"{run.cpu_cores_while_away * 100:.1f}",
            " ".join(map(str, run.num_threads)),
            " ".join(map(str, run.num_descriptors)),
        ]
        for run in runs
    ]
    return [Table("All cameras lose power; times from when the server listens again", header, rows)]


def message_tables(runs: Sequence[Cost]) -> list[Table]:
    """For each format: what a message costs at its maker, in the publisher's threads, and in Redis."""
    tables = []
    for format, costs in _grouped(runs, lambda cost: cost.format).items():
        loads = _grouped(costs, lambda cost: str(cost.load))
        sinks = [sink for sink in SINKS if sink != "none"]
        header = ["", "payload, bytes", "make, encode, queue"]
        header += [f"publish: {sink}" for sink in sinks]
        header += [f"redis-server: {sink}" for sink in sinks if sink != "zeromq"]
        header += ["entry in Redis, bytes"]
        rows = []
        for load, of_load in loads.items():
            of_sink = _grouped(of_load, lambda cost: cost.sink)
            row = [load, f"{of_load[0].payload_bytes:.0f}", _span([cost.encode_us for cost in of_load], "{:.0f}")]
            row += [_span([cost.publish_us for cost in of_sink[sink]], "{:.0f}") for sink in sinks]
            row += [
                _span([cost.server_us or 0.0 for cost in of_sink[sink]], "{:.0f}") for sink in sinks if sink != "zeromq"
            ]
            row += [f"{statistics.median(cost.redis_bytes or 0.0 for cost in of_sink['redis stream']):.0f}"]
            rows.append(row)
        title = f"{format}, {costs[0].rate_hz:g} messages/s: microseconds of CPU a message"
        tables.append(Table(title, header, rows))
    return tables


def write(machine: Machine, runs: Sequence[Any], tables: Sequence[Table], out: Path) -> tuple[Path, Path]:
    """Write OUT.json with every run and OUT.md for people."""
    out.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = out.with_name(out.name + ".json"), out.with_name(out.name + ".md")
    found = {"machine": asdict(machine), "runs": [asdict(run) for run in runs]}
    as_json.write_text(json.dumps(found, indent=1) + "\n")
    as_markdown.write_text("\n".join([*_head(machine), *markdown(tables)]) + "\n")
    return as_json, as_markdown


def markdown(tables: Sequence[Table]) -> Iterable[str]:
    """Yield the tables' lines."""
    for table in tables:
        yield from ("", f"## {table.title}", "", f"| {' | '.join(table.header)} |", f"|{'---|' * len(table.header)}")
        yield from (f"| {' | '.join(row)} |" for row in table.rows)


def _head(machine: Machine) -> Iterable[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield from (f"# {machine.command}", "", f"{machine.date}, revision {machine.revision}.", "")
    yield f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}; {packages}."
    yield "Medians (least-most) where there was more than one run."


def _grouped(runs: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Put the runs of one key together; keys come in order."""
    found: dict[Any, list[Any]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _span(values: Sequence[float], form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"
