"""Draw the state of a daemon as a table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamd.control_messages import DaemonState, ModelEntry, PublisherEntry, StreamEntry
from streamd.messages import StreamState
from streamd.watch import COLOURS, WINDOW_S


class Rates:
    """Tell how many results a second each stream publishes, from one state to the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def update(self, state: DaemonState) -> Mapping[str, float]:
        """Take in a state; return the rate of every stream that was seen before."""
        now = self._clock()
        known = {entry.status.stream: self._seen.get(entry.status.stream, deque()) for entry in state.streams}
        self._seen = known  # what is gone is forgotten
        rates = {}
        for entry in state.streams:
            seen = known[entry.status.stream]
            seen.append((now, entry.published))
            while len(seen) > 2 and now - seen[0][0] > WINDOW_S:
                seen.popleft()
            span_s = now - seen[0][0]
            if span_s > 0:
                rates[entry.status.stream] = (entry.published - seen[0][1]) / span_s
        return rates


def render(state: DaemonState, rates: Mapping[str, float]) -> RenderableType:
    """Draw the daemon, its streams with what is wrong with them, its models and its publishers."""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stream", no_wrap=True, max_width=16)
    table.add_column("state", no_wrap=True)
    table.add_column("model", no_wrap=True, ratio=1)
    headings = ("fps", "published", "dropped", "reconnects")
    for heading in headings if rates else headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in state.streams:
        rate = [f"{rates.get(entry.status.stream, 0.0):.1f}"] if rates else []
        counts = (entry.published, entry.status.dropped, entry.status.reconnects)
        table.add_row(entry.status.stream, _state(entry), entry.model, *rate, *map(str, counts))
    head = Text(f"streamd {state.version}, process {state.pid}, up {_duration(state.uptime_s)}", style="bold")
    reasons = [Text(f"{one.status.stream}: {one.status.reason}") for one in state.streams if one.status.reason]
    models = [
        Text(f"model {one.name}: {one.network} {one.sha256[:12]} on {', '.join(one.devices)}{_event(one)}", style="dim")
        for one in state.models
    ]
    return Group(head, table, *reasons, *models, *map(_publisher, state.publishers))


def _event(entry: ModelEntry) -> str:
    probation = "; on probation" if entry.on_probation else ""
    return probation + (f"; {entry.last_event}" if entry.last_event else "")


def _state(entry: StreamEntry) -> Text:
    state = entry.status.state
    return Text(state, style="green" if state == StreamState.RUNNING else COLOURS.get(state, "red"))


def _publisher(entry: PublisherEntry) -> Text:
    said = [f"{entry.sent} sent", f"{entry.dropped} lost"]
    if entry.spool:
        said.append(f"{entry.spool.entries} in the spool ({entry.spool.bytes / (1 << 20):.1f} MiB)")
    if not entry.healthy:
        said.append("failing")
    return Text(f"{entry.name}: {', '.join(said)}", style="dim" if entry.healthy else "red")


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.0f} days"
    if hours >= 2:
        return f"{hours:.0f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
