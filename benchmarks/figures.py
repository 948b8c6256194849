"""From what was observed to figures: find the access unit of each message, then rates, losses and latencies."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import percentile
from benchmarks.readers import BenchmarkError, Observation
from streamd import wire
from streamd.wire import DetectionsMessage

MATCH_TOLERANCE_S = 0.005  # an eighth of a frame at 25 frames/s: time stamps are rounded to RTP's 90 kHz
MAX_UNMATCHED = 0.01


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the tail of some milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> Spread:
        mean = statistics.fmean(values_ms) if values_ms else float("nan")
        return cls(mean, *(percentile(values_ms, share) for share in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of one reader."""

    reader: str
    seconds: float
    frames_per_s: float
    frames_per_s_of: Mapping[str, float]  # by stream
    dropped: float  # share of the access units sent in the window that no message came for
    latency_ms: Spread  # from the server's sending of the access unit to the arrival of its message
    cpu_ms_per_frame: float
    cpu_cores: float
    threads_ms_per_frame: Mapping[str, float]  # CPU by group of threads
    peak_memory_mib: float
    first_message_s: float  # from the start of the process
    first_of_all_s: float  # until every stream has sent one
    stages_ms: Mapping[str, Spread]  # as the reader says itself
    server_cores: float
    subscriber_cores: float
    others_cores: float  # everybody else on the machine: more than a tenth of a core spoils the run
    settings: str  # how streamd chose to run the model
    num_unmatched: int  # messages whose access unit was not found
    sender_clock_ms: float | None  # median distance of captured_at from the true time of sending; None without RTCP

    @property
    def slowest(self) -> float:
        """The slowest stream's share of the mean rate."""
        rates = self.frames_per_s_of.values()
        return min(rates) / statistics.fmean(rates) if self.frames_per_s else 0.0


class SentLog:
    """When the server sent each access unit; finds one by stream, connection and presentation time."""

    def __init__(self, units: Iterable[Mapping[str, Any]]) -> None:
        """`units` as RtspServer.sent gives them, of the connections of one run."""
        by_client: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        for unit in units:
            by_client[unit["mount"].removeprefix("/"), unit["client"]].append((unit["pts_s"], unit["sent_at"]))
        self._connections: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        num_connections: dict[str, int] = defaultdict(int)
        for stream, client in sorted(by_client):
            sent = by_client[stream, client]
            # The receiver's clock begins with its first packet (RFC 2326, RTP-Info); the server's does not begin at 0.
            pts_s, sent_at = [unit[0] - sent[0][0] for unit in sent], [unit[1] for unit in sent]
            self._connections[stream, num_connections[stream]] = pts_s, sent_at
            num_connections[stream] += 1

    def sent_at(self, stream: str, epoch: int, pts_s: float) -> float | None:
        """Return the Unix time of the sending of the access unit; None where there is none with this time."""
        known_pts_s, sent_at = self._connections.get((stream, epoch), ([], []))
        index = bisect_left(known_pts_s, pts_s - MATCH_TOLERANCE_S)
        if index == len(known_pts_s) or known_pts_s[index] > pts_s + MATCH_TOLERANCE_S:
            return None
        return sent_at[index]

    def num_sent(self, window: tuple[float, float]) -> int:
        """Count what was sent within the window."""
        return sum(window[0] <= at < window[1] for _, times in self._connections.values() for at in times)


def work_out(observation: Observation, units: Iterable[Mapping[str, Any]]) -> Figures:
    """Turn one run into figures. Raises BenchmarkError where messages cannot be told apart by their time stamps."""
    log = SentLog(units)
    begin, end = observation.window
    seconds = end - begin
    messages = [(arrival.at, wire.decode(arrival.payload, "detections")) for arrival in observation.arrivals]
    streams = sorted({message.stream for _, message in messages})
    in_window = [(at, message) for at, message in messages if begin <= at < end]
    if not in_window:
        raise BenchmarkError(f"{observation.reader}: no message came within {seconds:.0f} s")
    sent = [(at, message, log.sent_at(message.stream, message.epoch, message.pts)) for at, message in messages]
    latencies_ms = [(at - sent_at) * 1e3 for at, _, sent_at in sent if sent_at is not None and begin <= at < end]
    num_unmatched = len(in_window) - len(latencies_ms)
    if num_unmatched > len(in_window) * MAX_UNMATCHED or min(latencies_ms, default=0.0) < 0:
        raise BenchmarkError(
            f"{observation.reader}: {num_unmatched} of {len(in_window)} messages belong to no access unit that was "
            f"sent, or came before it was sent ({min(latencies_ms, default=0.0):.1f} ms): latencies would be wrong"
        )
    num_answered = sum(sent_at is not None and begin <= sent_at < end for _, _, sent_at in sent)
    first_at = [min(at for at, message in messages if message.stream == stream) for stream in streams]
    return Figures(
        reader=observation.reader,
        seconds=seconds,
        frames_per_s=len(in_window) / seconds,
        frames_per_s_of=_rates([message for _, message in in_window], streams, seconds),
        dropped=1 - num_answered / max(1, log.num_sent(observation.window)),
        latency_ms=Spread.of(latencies_ms),
        cpu_ms_per_frame=observation.cpu_s / len(in_window) * 1e3,
        cpu_cores=observation.cpu_s / seconds,
        threads_ms_per_frame={
            group: used_s / len(in_window) * 1e3 for group, used_s in sorted(observation.threads_s.items())
        },
        peak_memory_mib=observation.peak_memory_mib,
        first_message_s=min(first_at) - observation.started_at,
        first_of_all_s=max(first_at) - observation.started_at,
        stages_ms=_stages([message for _, message in in_window]),
        server_cores=observation.server_cpu_s / seconds,
        subscriber_cores=observation.subscriber_cpu_s / seconds,
        others_cores=observation.others_cpu_s / seconds,
        settings=observation.settings,
        num_unmatched=num_unmatched,
        sender_clock_ms=_sender_clock_ms([(message, at) for _, message, at in sent if at is not None]),
    )


def _rates(messages: Sequence[DetectionsMessage], streams: Sequence[str], seconds: float) -> dict[str, float]:
    return {stream: sum(message.stream == stream for message in messages) / seconds for stream in streams}


def _stages(messages: Sequence[DetectionsMessage]) -> dict[str, Spread]:
    names = wire.Milliseconds.__struct_fields__
    return {name: Spread.of([getattr(message.ms, name) for message in messages]) for name in names}


def _sender_clock_ms(matched: Sequence[tuple[DetectionsMessage, float]]) -> float | None:
    """Check the match by another way: the sender reports say, too, when each access unit was sent."""
    distances = [abs(message.captured_at_s - at) * 1e3 for message, at in matched if message.clock == "sender"]
    return statistics.median(distances) if distances else None
