"""Show live what a daemon publishes: a table of its streams, or each message as a line of JSON."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streamd import wire
from streamd.client import GapCounter, Subscription, subscribe
from streamd.curve import ClientKeys
from streamd.messages import StreamState
from streamd.redact import redact
from streamd.wire import DetectionsMessage, Message, StatusMessage

WINDOW_S = 5.0  # over which rates, latencies and shares are measured
REFRESH_S = 0.25
MAX_LATENCY_S = 60.0  # more, or less than none, is a camera whose clock is wrong

COLOURS: dict[str, str] = {
    StreamState.CONNECTING: "yellow",
    StreamState.WAITING_KEYFRAME: "yellow",
    StreamState.ENDED: "dim",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What one detections message adds to the measurements of its stream."""

    at_s: float  # Unix time of its arrival here
    latency_ms: float
    seq: int
    dropped: int


@dataclass(slots=True)
class StreamRow:
    """What is known of one stream."""

    status: StatusMessage | None = None  # sent at changes only: none is known of a stream that ran before we came
    last: DetectionsMessage | None = None
    last_at_s: float = 0.0
    first_at_s: float = 0.0
    samples: deque[Sample] = field(default_factory=deque)  # of the window, and the one before it


class StreamTable:
    """The state behind the live table; the clock is passed in, as Unix time.

    `same_machine` says that the daemon's clock is ours: latency is then capture to arrival here, where the camera's
    clock allows it, else the time within the daemon.
    """

    def __init__(self, same_machine: bool) -> None:
        self.same_machine = same_machine
        self.rows: dict[str, StreamRow] = {}
        self._gaps = GapCounter()

    def update(self, message: Message, now_s: float) -> None:
        """Take in a message that arrived at `now_s`."""
        row = self.rows.setdefault(message.stream, StreamRow(first_at_s=now_s))
        if isinstance(message, StatusMessage):
            row.status = message
            return
        self._gaps.add(message)
        if row.last is not None and message.seq < row.last.seq:
            row.samples.clear()  # the daemon started anew, and its counts with it
        row.last, row.last_at_s = message, now_s
        row.samples.append(Sample(now_s, self._latency_ms(message, now_s), message.seq, message.dropped))
        _forget_old(row.samples, now_s)

    def frames_per_s(self, stream: str, now_s: float) -> float:
        """Return the rate of the messages that arrived within the window."""
        row = self.rows[stream]
        span_s = min(WINDOW_S, now_s - row.first_at_s)
        return len(_within(row.samples, now_s)) / span_s if span_s > 0 else 0.0

    def latency_ms(self, stream: str, now_s: float) -> tuple[float, float] | None:
        """Return the median and the 95th percentile of the window, None without a message in it."""
        latencies = sorted(sample.latency_ms for sample in _within(self.rows[stream].samples, now_s))
        if not latencies:
            return None
        return latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.95)]

    def dropped_share(self, stream: str) -> float | None:
        """Return the share of decoded frames that was not processed, over the window; None where it is not known."""
        samples = self.rows[stream].samples
        if len(samples) < 2:
            return None
        processed, dropped = samples[-1].seq - samples[0].seq, samples[-1].dropped - samples[0].dropped
        return dropped / (processed + dropped) if processed + dropped > 0 else 0.0

    def num_missed(self, stream: str) -> int:
        """Return how many messages of the stream were published and did not arrive here."""
        return self._gaps.num_missed.get(stream, 0)

    def _latency_ms(self, message: DetectionsMessage, now_s: float) -> float:
        since_capture_s = now_s - message.captured_at_s
        measurable = self.same_machine and 0 <= since_capture_s < MAX_LATENCY_S
        return since_capture_s * 1000 if measurable else message.ms.total


def render(table: StreamTable, now_s: float) -> RenderableType:
    """Draw the table as it stands at `now_s`, and under it the reasons of what does not run; it fits 80 columns."""
    drawn = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    drawn.add_column("stream", no_wrap=True, max_width=16)
    drawn.add_column("state", no_wrap=True)
    drawn.add_column("objects", no_wrap=True, ratio=1)
    for heading in ("fps", "p50", "p95", "drop", "miss"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for stream in sorted(table.rows):
        drawn.add_row(*_cells(table, stream, now_s))
    if not table.rows:
        drawn.add_row("-", Text("waiting", style="yellow"), Text("no message yet", style="dim"))
    span = "from capture to here" if table.same_machine else "within the daemon"
    explanation = Text(f"p50, p95: latency {span}, ms; over the last {WINDOW_S:g} s", style="dim")
    return Group(drawn, *_reasons(table), explanation)


def watch(
    url: str,
    stream: str | None,
    json_lines: bool,
    console: Console,
    seconds: float | None = None,
    keys: ClientKeys | None = None,
) -> None:
    """Show what `url` publishes until Ctrl-C, or for `seconds`; raise SubscribeError where it cannot be reached."""
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    try:
        with subscribe(url, stream, kinds=("detections", "status"), keys=keys) as messages:
            if json_lines:
                _print_lines(messages, console, deadline)
            else:
                _show_table(messages, StreamTable(is_same_machine(url)), console, deadline, redact(url))
    except KeyboardInterrupt:
        return


def is_same_machine(url: str) -> bool:
    """Say whether a daemon that publishes on `url` shares our clock."""
    parts = urlsplit(url)
    return parts.scheme in ("ipc", "unix") or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _print_lines(messages: Subscription[Message], console: Console, deadline: float) -> None:
    while (remaining_s := deadline - time.monotonic()) > 0:
        message = messages.receive(min(remaining_s, 1.0))
        if message is not None:
            console.file.write(wire.encode(message).decode() + "\n")  # not console.print, which would wrap the line
            console.file.flush()


def _show_table(
    messages: Subscription[Message], table: StreamTable, console: Console, deadline: float, where: str
) -> None:
    console.print(f"[bold]streamd[/] {where}, Ctrl-C ends", highlight=False)
    next_refresh = 0.0
    with Live(console=console, auto_refresh=False) as live:
        while (now := time.monotonic()) < deadline:
            if now >= next_refresh:
                live.update(render(table, time.time()), refresh=True)
                next_refresh = now + REFRESH_S
            message = messages.receive(max(0.0, min(next_refresh, deadline) - now))
            if message is not None:
                table.update(message, time.time())
        live.update(render(table, time.time()), refresh=True)


def _cells(table: StreamTable, stream: str, now_s: float) -> tuple[str | Text, ...]:
    row = table.rows[stream]
    latency = table.latency_ms(stream, now_s)
    p50, p95 = (f"{latency[0]:.0f}", f"{latency[1]:.0f}") if latency else ("-", "-")
    share = table.dropped_share(stream)
    num_missed = table.num_missed(stream)
    return (
        stream,
        _state(row, now_s),
        _objects(row.last) if latency else "",
        f"{table.frames_per_s(stream, now_s):.1f}",
        p50,
        p95,
        "-" if share is None else f"{share:.0%}",
        Text(str(num_missed), style="yellow" if num_missed else ""),
    )


def _state(row: StreamRow, now_s: float) -> Text:
    state = row.status.state if row.status else StreamState.RUNNING
    silent_s = now_s - (row.last_at_s if row.last else row.first_at_s)
    if state == StreamState.RUNNING:
        is_silent = silent_s > WINDOW_S
        return Text(f"silent {silent_s:.0f} s", style="yellow") if is_silent else Text(state, style="green")
    name = "no keyframe" if state == StreamState.WAITING_KEYFRAME else state
    return Text(name, style=COLOURS.get(state, "red"))


def _objects(message: DetectionsMessage | None) -> Text:
    counts = Counter(found.label for found in message.objects) if message else Counter[str]()
    seen = ", ".join(f"{label} {count}" for label, count in counts.most_common())
    return Text(seen or "none", style="" if seen else "dim")


def _reasons(table: StreamTable) -> list[Text]:
    rows = sorted(table.rows.items())
    return [Text(f"{stream}: {row.status.reason}") for stream, row in rows if row.status and row.status.reason]


def _within(samples: deque[Sample], now_s: float) -> list[Sample]:
    return [sample for sample in samples if now_s - sample.at_s <= WINDOW_S]


def _forget_old(samples: deque[Sample], now_s: float) -> None:
    while len(samples) > 1 and now_s - samples[1].at_s > WINDOW_S:
        samples.popleft()
