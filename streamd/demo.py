"""`streamd demo`: the real daemon on a clip as if it were two cameras, and a real subscriber that shows it live."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from pydantic import SecretStr
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streamd.client import Subscription, subscribe
from streamd.config import Config, MetricsConfig, ModelConfig, PublishConfig, StreamConfig, ZeroMqConfig
from streamd.connection import connector
from streamd.daemon import EXIT_OK, SHUTDOWN_DEADLINE_S, Daemon
from streamd.decode import Decoders
from streamd.draw import VideoWriter, annotate, caption, contact_sheet, load_library, save_png, to_rgb
from streamd.errors import StreamdError
from streamd.messages import Frame
from streamd.models import weights
from streamd.watch import REFRESH_S, StreamTable, render
from streamd.wire import DetectionsMessage, Message

_FIRST, _SECOND = "gate", "yard"
_START_S = 120.0  # within which the first result must come: a large model takes its time to warm up
_PLAIN_INTERVAL_S = 5.0  # between tables where the output is no terminal
_SHEET_COLUMNS, _SHEET_WIDTH_PX = 3, 1440


@dataclass(slots=True, eq=False)
class StreamRecord:
    """What arrived of one stream."""

    num_frames: int = 0
    num_objects: int = 0
    num_dropped: int = 0
    latencies_ms: list[float] = field(default_factory=list)  # from the frame to its arrival here
    first_at_s: float = 0.0  # Unix time
    last_at_s: float = 0.0
    by_pts: dict[float, DetectionsMessage] = field(default_factory=dict)  # the first of each time: the clip repeats

    def add(self, message: DetectionsMessage, now_s: float) -> None:
        self.first_at_s = self.first_at_s or now_s
        self.last_at_s = now_s
        self.num_frames += 1
        self.num_objects += len(message.objects)
        self.num_dropped = message.dropped
        self.latencies_ms.append((now_s - message.captured_at_s) * 1e3)
        self.by_pts.setdefault(message.pts, message)


@dataclass(slots=True, eq=False)
class Recording:
    """What the subscriber received, and the table that it showed."""

    table: StreamTable = field(default_factory=lambda: StreamTable(same_machine=True))
    streams: dict[str, StreamRecord] = field(default_factory=lambda: {_FIRST: StreamRecord(), _SECOND: StreamRecord()})

    @property
    def num_frames(self) -> int:
        return sum(record.num_frames for record in self.streams.values())

    @property
    def last_at_s(self) -> float:
        return max(record.last_at_s for record in self.streams.values())

    def add(self, message: Message, now_s: float) -> None:
        """Take in a message that arrived at `now_s`, Unix time."""
        self.table.update(message, now_s)
        if isinstance(message, DetectionsMessage):
            self.streams[message.stream].add(message, now_s)


def demo(model: str, *, seconds: float = 30, out: Path = Path("demo-out"), console: Console | None = None) -> int:
    """Run the daemon for so long, show what it publishes, and leave a video and a contact sheet in `out`.

    Ctrl-C ends early and still leaves the files. Raises ModelError, OutputError, and what stops the daemon.
    """
    console = console or Console()
    recording = record(model, seconds, console)
    if not recording.num_frames:
        console.print("ended before the first result: there is nothing to draw")
        return EXIT_OK
    console.print(summary(recording))
    with console.status("drawing the video and the contact sheet"):
        written = draw_files(recording, out)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return EXIT_OK


def record(model: str, seconds: float, console: Console) -> Recording:
    """Run the daemon until `seconds` after the first result, or Ctrl-C, while a subscriber shows what arrives."""
    artifact = weights.resolve(model)
    endpoint = f"tcp://127.0.0.1:{_free_port()}"
    recording = Recording()
    console.print(f"[bold]streamd demo[/]: publishing on {endpoint} for {seconds:g} s, Ctrl-C ends", highlight=False)
    with (
        suppress(KeyboardInterrupt),
        subscribe(endpoint, kinds=("detections", "status")) as messages,  # before the daemon, to miss nothing
        _DaemonThread(_config(artifact, endpoint)) as daemon,
        _screen(recording, console) as refresh,
    ):
        _receive(messages, recording, seconds, daemon, refresh)
    return recording


def _receive(
    messages: Subscription[Message],
    recording: Recording,
    seconds: float,
    daemon: _DaemonThread,
    refresh: Callable[[], None],
) -> None:
    deadline = time.monotonic() + _START_S
    began = False
    while time.monotonic() < deadline:
        daemon.check()
        message = messages.receive(REFRESH_S / 2)
        if message is not None:
            recording.add(message, time.time())
            if not began and recording.num_frames:
                began, deadline = True, time.monotonic() + seconds
        refresh()
    if not began:
        raise StreamdError(f"the demo's daemon gave no result within {_START_S:g} s; try a smaller model")


@contextmanager
def _screen(recording: Recording, console: Console) -> Iterator[Callable[[], None]]:
    """Give a function that shows the table when it is due: in place on a terminal, else as plain text."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            show = _Due(REFRESH_S, lambda: live.update(_draw(recording), refresh=True))
            yield show.if_due
            show.now()
    else:
        show = _Due(_PLAIN_INTERVAL_S, lambda: console.print(_draw(recording)))
        yield show.if_due
        show.now()


def _draw(recording: Recording) -> RenderableType:
    return render(recording.table, time.time())


class _Due:
    """Call a function at most once an interval."""

    def __init__(self, interval_s: float, call: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._call = call
        self._due_s = time.monotonic() + interval_s

    def if_due(self) -> None:
        if time.monotonic() >= self._due_s:
            self.now()

    def now(self) -> None:
        self._due_s = time.monotonic() + self._interval_s
        self._call()


class _DaemonThread:
    """The daemon in a thread of this process: its errors are raised here, and it ends with the block."""

    def __init__(self, config: Config) -> None:
        self._daemon = Daemon(config)
        self._thread = threading.Thread(target=self._run, name="daemon", daemon=True)
        self._error: Exception | None = None

    def check(self) -> None:
        """Raise what the daemon died of."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._daemon.run() != EXIT_OK:
                self._error = StreamdError("the daemon crashed; the lines above say where")
        except Exception as err:  # raised by `check` in the thread that shows the demo
            self._error = err

    def __enter__(self) -> _DaemonThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self._daemon.stop("the demo is over")
        self._thread.join(SHUTDOWN_DEADLINE_S * 2)  # a start that is under way is not interrupted


def draw_files(recording: Recording, out: Path) -> tuple[Path, Path]:
    """Draw what was received onto the clip's frames: the first camera's video, and a contact sheet of both.

    Raises OutputError.
    """
    torch.set_num_threads(1)  # for one small picture at a time, more threads cost more than they give
    load_library()
    video, sheet = out / "annotated.mp4", out / "contact-sheet.png"
    chosen = {name: _spread(sorted(one.by_pts), index) for index, (name, one) in enumerate(recording.streams.items())}
    tiles: dict[str, list[np.ndarray]] = {name: [] for name in recording.streams}
    with VideoWriter(video) as writer:
        for frame in clip_frames():
            pts_s = round(frame.pts_s, 6)  # as in the messages
            seen = {name: one.by_pts[pts_s] for name, one in recording.streams.items() if pts_s in one.by_pts}
            wanted = {name: message for name, message in seen.items() if name == _FIRST or pts_s in chosen[name]}
            if not wanted:
                continue
            picture = to_rgb(frame.picture)
            for name, message in wanted.items():
                drawn = annotate(picture, message)
                if name == _FIRST:
                    writer.write(drawn, pts_s)
                if pts_s in chosen[name]:
                    tiles[name].append(caption(drawn, f"{name}  {pts_s:.1f} s  {len(message.objects)} objects"))
    pictures = [tile for row in tiles.values() for tile in row]
    save_png(contact_sheet(pictures, _SHEET_COLUMNS, _SHEET_WIDTH_PX), sheet)
    return video, sheet


def clip_frames() -> Iterator[Frame]:
    """Decode the demo's clip once, as the daemon does."""
    connection = connector("clip", StreamConfig(url=SecretStr(str(clip()))), Decoders(torch.device("cpu")))(0)
    try:
        yield from (frame for frame in connection.frames() if frame is not None)
    finally:
        connection.close()


def clip() -> Path:
    """Say where the demo's clip lies: in the checkout, or in the installed package."""
    return Path(str(files("streamd.configs").joinpath("media", "pedestrians.mp4")))


def summary(recording: Recording) -> RenderableType:
    """Tell what arrived, by stream."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stream")
    for heading in ("frames", "objects", "frames/s", "p50 ms", "p95 ms", "dropped"):
        table.add_column(heading, justify="right")
    for name, one in recording.streams.items():
        rate = (one.num_frames - 1) / max(1e-3, one.last_at_s - one.first_at_s) if one.num_frames > 1 else 0.0
        latencies = sorted(one.latencies_ms) or [float("nan")]
        table.add_row(
            name,
            str(one.num_frames),
            str(one.num_objects),
            f"{rate:.1f}",
            f"{latencies[len(latencies) // 2]:.0f}",
            f"{latencies[int(len(latencies) * 0.95)]:.0f}",
            str(one.num_dropped),
        )
    return Group(
        Text("\nreceived in all", style="bold"),
        table,
        Text("p50, p95: from a frame's arrival in the daemon to its result's arrival here", style="dim"),
    )


def _spread(values: list[float], row: int) -> list[float]:
    """Pick the values for a row of the sheet, evenly; the rows are shifted against each other."""
    middles = [(2 * column + row + 0.5) / (2 * _SHEET_COLUMNS) for column in range(_SHEET_COLUMNS)]
    return [values[index] for index in sorted({int(middle * len(values)) for middle in middles})] if values else []


def _config(artifact: Path, endpoint: str) -> Config:
    url = SecretStr(str(clip()))
    return Config(
        models={"demo": ModelConfig(path=str(artifact))},
        streams={_FIRST: StreamConfig(url=url, loop=True), _SECOND: StreamConfig(url=url, loop=True, fps=5)},
        publish=PublishConfig(zeromq=ZeroMqConfig(bind=endpoint)),
        metrics=MetricsConfig(listen=None),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
