"""Compare streamd with the naive reader on RTSP cameras, in pairs of runs; benchmarks/README.md explains the figures.

python -m benchmarks.streams --streams 1,4,8
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.absence import measure_frozen, measure_idle
from benchmarks.figures import Figures, work_out
from benchmarks.measure import ROOT, describe_machine
from benchmarks.readers import BenchmarkError, observe, observe_costs
from benchmarks.report import Pair, Results, Scale
from tests.rtsp import RtspServer, encode_clip, missing_for_rtsp

SHARED = ROOT.parent / "shared"  # lies beside the checkout of those who design streamd
CLIPS = (SHARED / "videos" / "vtest.avi", ROOT / "configs" / "media" / "pedestrians.mp4")
WEIGHTS = SHARED / "parity" / "yolox_nano" / "yolox_nano.pth"
SIZE, FPS, GOP = (768, 576), 25, 25
BARE_DEADLINE_S = 300.0  # the first call may fetch and export the model
FROZEN_STREAMS = 4
DISTURBED_CORES = 0.1
DEFAULT_SECONDS, IDLE_SECONDS = 20.0, 30.0

console = Console()


def say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Bare:
    """The model, and how fast it is with nothing around it."""

    artifact: Path
    name: str
    sha256: str
    images_per_s: float
    layout: str


def measure_bare(model: str) -> Bare:
    """Measure the model alone, in a process of its own. Raises BenchmarkError."""
    command = [sys.executable, "-m", "benchmarks.bare", model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BARE_DEADLINE_S)
    if done.returncode != 0:
        raise BenchmarkError(f"the model {model} cannot be measured:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return Bare(**{**found, "artifact": Path(found["artifact"])})


@contextmanager
def cameras(clip: Path, num_streams: int) -> Iterator[tuple[RtspServer, Mapping[str, str]]]:
    """Serve a clip as so many cameras; yield the server and the address of each."""
    names = [f"cam{index}" for index in range(num_streams)]
    with tempfile.TemporaryDirectory(prefix="streamd-benchmark-") as folder:
        log = Path(folder) / "sent.jsonl"
        with RtspServer(dict.fromkeys(names, clip), log_sent=log) as server:
            yield server, {name: server.url(name) for name in names}


def new_connections(server: RtspServer, num_before: int) -> list[dict[str, Any]]:
    """Read what was sent to the clients that came after the first `num_before` lines of the log."""
    units = server.sent()
    old = {(unit["mount"], unit["client"]) for unit in units[:num_before]}
    return [unit for unit in units[num_before:] if (unit["mount"], unit["client"]) not in old]


def run_once(name: str, artifact: Path, server: RtspServer, streams: Mapping[str, str], seconds: float) -> Figures:
    num_before = len(server.sent())
    observation = observe(name, artifact, streams, server.pid, seconds)
    figures = work_out(observation, new_connections(server, num_before))
    say(
        f"  {name:8} {figures.frames_per_s:6.1f} frames/s, p95 {figures.latency_ms.p95:6.1f} ms, "
        f"{figures.cpu_ms_per_frame:5.1f} ms CPU per frame, {figures.dropped:.0%} dropped"
    )
    if figures.settings:
        say(f"           {figures.settings}")
    if figures.others_cores > DISTURBED_CORES:
        say(f"           disturbed: other processes took {figures.others_cores:.2f} cores", style="red")
    return figures


def measure_scale(bare: Bare, clip: Path, num_streams: int, repeat: int, seconds: float) -> Scale:
    """Run the pairs for one number of streams; which reader goes first alternates, so that drift hits both."""
    say(f"{num_streams} stream(s)")
    pairs = []
    with cameras(clip, num_streams) as (server, streams):
        before = measure_bare(str(bare.artifact))
        for index in range(repeat):
            order = ("streamd", "naive") if index % 2 == 0 else ("naive", "streamd")
            runs = {name: run_once(name, bare.artifact, server, streams, seconds) for name in order}
            after = measure_bare(str(bare.artifact))
            say(f"  bare model {before.images_per_s:.1f}, then {after.images_per_s:.1f} images/s")
            pairs.append(Pair(runs["streamd"], runs["naive"], before.images_per_s, after.images_per_s))
            before = after
        costs = observe_costs(bare.artifact, streams, seconds)
    return Scale(num_streams, pairs, costs)


def prepare_clip(source: Path | None, folder: Path) -> tuple[Path, str]:
    """Encode the clip that the cameras send; return it and say what it is."""
    found = source or next((clip for clip in CLIPS if clip.is_file()), CLIPS[-1])
    if not found.is_file():
        raise BenchmarkError(f"{found}: no such clip; give one with --clip FILE")
    clip = encode_clip(found, folder / "camera.mp4", fps=FPS, size=SIZE, gop=GOP, seconds=60)
    return clip, f"{found.name}, {SIZE[0]}x{SIZE[1]} at {FPS} frames/s, H.264, a key frame every {GOP}, no B-frames"


def check_machine() -> None:
    """Raise BenchmarkError where something is missing that every run needs."""
    if missing := missing_for_rtsp():
        raise BenchmarkError(f"the RTSP server cannot run: {missing}")
    if importlib.util.find_spec("cv2") is None:
        raise BenchmarkError("the naive reader needs OpenCV: pip install '.[dev]'")


def run_all(
    counts: list[int], *, seconds: float | None, repeat: int, model: str, clip: Path | None, idle: bool, frozen: bool
) -> Results:
    """Do what the options ask for."""
    check_machine()
    window_s = seconds or DEFAULT_SECONDS
    with tempfile.TemporaryDirectory(prefix="streamd-benchmark-") as folder:
        encoded, description = prepare_clip(clip, Path(folder))
        bare = measure_bare(model)
        found: dict[str, Any] = {}
        if idle:
            found["idle"] = measure_idle(bare.artifact, max(counts), seconds or IDLE_SECONDS)
        if frozen:
            with cameras(encoded, FROZEN_STREAMS) as (server, streams):
                found["frozen"] = [
                    measure_frozen(name, bare.artifact, server, streams, window_s) for name in ("streamd", "naive")
                ]
        if not (idle or frozen):
            found["scales"] = [measure_scale(bare, encoded, count, repeat, window_s) for count in counts]
    machine = describe_machine(sys.argv[1:])
    return Results(machine, bare.name, bare.sha256, description, bare.layout, **found)


def main(
    streams: Annotated[str, typer.Option(help="Numbers of cameras, separated by commas.")] = "1,4,8",
    seconds: Annotated[
        float | None, typer.Option(min=2, help="Length of a window [default: 20; with --idle 30]")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of runs for each number of cameras.")] = 3,
    model: Annotated[str, typer.Option(help="An artifact, a checkpoint or a known name.")] = (
        str(WEIGHTS) if WEIGHTS.is_file() else "yolox_nano"
    ),
    clip: Annotated[Path | None, typer.Option(help="Encoded again to what the cameras send.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Instead: CPU while no camera answers.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Instead: one of four cameras freezes.")] = False,
) -> None:
    """Compare streamd with the naive reader, on this machine's CPU."""
    try:
        counts = [int(count) for count in streams.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--streams takes numbers like 1,4,8, got '{streams}'") from None
    if min(counts) < 1:
        raise typer.BadParameter("--streams: at least one camera each")
    try:
        results = run_all(counts, seconds=seconds, repeat=repeat, model=model, clip=clip, idle=idle, frozen=frozen)
    except BenchmarkError as err:
        say(str(err), style="red")
        raise typer.Exit(1) from None
    report.show(results, console)
    if out:
        written = report.write(results, out)
        say(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    typer.run(main)
