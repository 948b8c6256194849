"""Measure what streams and messages cost; benchmarks/README.md explains the figures.

python -m benchmarks.scale streams|outage|messages [--repeat 2] [--out benchmarks/results/NAME]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.measure import ROOT, describe_machine
from benchmarks.readers import BenchmarkError
from benchmarks.scale import report
from benchmarks.scale.cameras import Picture, make_clip
from benchmarks.scale.messages import LOADS, SINKS, measure_messages
from benchmarks.scale.streams import Mode, make_model, measure_return, measure_streams

CLIP = ROOT / "configs" / "media" / "pedestrians.mp4"
SMALL = Picture(640, 360, fps=25, bit_rate="500k")
SLOW = Picture(640, 360, fps=5, bit_rate="200k")
LARGE = Picture(1920, 1080, fps=25, bit_rate="4M")
# A machine of two cores decodes no more than this in real time, beside the cameras themselves.
CASES: tuple[tuple[Mode, Picture, tuple[int, ...]], ...] = (
    ("demux", SMALL, (1, 10, 50, 100)),
    ("demux", LARGE, (1, 10)),
    ("decode", SMALL, (1, 10, 25)),
    ("decode", SLOW, (100,)),
    ("decode", LARGE, (1, 4)),
)
OUTAGES_S = (5.0, 60.0)
PACKAGES = ("torch", "av", "pyzmq", "redis", "hiredis", "msgspec")

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Repeat = Annotated[int, typer.Option(min=1, help="Rounds; every second one runs backwards, so that drift hits all.")]
Out = Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")]


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def streams(
    seconds: Annotated[float, typer.Option(min=1, help="Length of a window.")] = 20,
    most: Annotated[int, typer.Option(min=1, help="Leave out what needs more cameras.")] = 100,
    repeat: Repeat = 2,
    out: Out = None,
) -> None:
    """CPU, memory, threads and descriptors by the number of cameras."""
    cases = [(mode, picture, number) for mode, picture, numbers in CASES for number in numbers if number <= most]
    found = []
    with tempfile.TemporaryDirectory(prefix="streamd-scale-") as name:
        folder = Path(name)
        model = make_model(folder)
        clips = {picture: make_clip(CLIP, folder, picture) for _, picture, _ in cases}
        for index in range(repeat):
            for case in cases if index % 2 == 0 else reversed(cases):
                mode, picture, number = case
                run = measure_streams(model, mode, clips[picture], number, seconds)
                found.append((cases.index(case), run))
                say(
                    f"{mode} of {number} cameras, {picture}: {run.cpu_percent_per_stream:.2f} % of a core a "
                    f"stream, {run.read_share:.1%} read, {run.held.rss_mib:.0f} MiB"
                )
    runs = [run for _, run in sorted(found, key=lambda pair: pair[0])]
    _finish(runs, report.stream_tables(runs), out)


@app.command()
def outage(
    cameras: Annotated[int, typer.Option(min=1)] = 100,
    repeat: Repeat = 2,
    out: Out = None,
) -> None:
    """How soon all cameras are back after they lost power together."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="streamd-scale-") as name:
        folder = Path(name)
        model, clip = make_model(folder), make_clip(CLIP, folder, SMALL)
        for outage_s in OUTAGES_S:
            for _ in range(repeat):
                run = measure_return(model, clip, cameras, outage_s)
                runs.append(run)
                say(f"{cameras} cameras away for {outage_s:g} s: all are back after {run.last_s:.1f} s")
    _finish(runs, report.return_tables(runs), out)


@app.command()
def messages(
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each payload, format and sink.")] = 2,
    rate: Annotated[float, typer.Option(min=1, help="Messages/s; 250 are ten cameras of 25 frames/s.")] = 250,
    repeat: Repeat = 2,
    out: Out = None,
) -> None:
    """CPU and bytes of a message, by what it holds, its format and where it goes."""
    runs = []
    for _ in range(repeat):
        for format in ("json", "msgpack"):
            for load in LOADS:
                costs = [measure_messages(load, format, sink, seconds, rate) for sink in SINKS]
                runs += costs
                totals = ", ".join(f"{cost.sink} {cost.total_us:.0f}" for cost in costs)
                say(f"{load}, {format}: {costs[0].payload_bytes:.0f} bytes; us of the daemon's CPU: {totals}")
    _finish(runs, report.message_tables(runs), out)


def _finish(runs: Sequence[Any], tables: Sequence[report.Table], out: Path | None) -> None:
    say("\n".join(report.markdown(tables)))
    if out:
        machine = describe_machine(sys.argv[1:], "benchmarks.scale", PACKAGES)
        say(f"written: {', '.join(map(str, report.write(machine, runs, tables, out)))}")


if __name__ == "__main__":
    try:
        app()
    except BenchmarkError as err:
        say(str(err))
        sys.exit(1)
