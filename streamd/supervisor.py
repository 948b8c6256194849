"""Keep one stream running: connect, decode, hand over, and after a failure back off and try again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from streamd.backoff import Backoff
from streamd.errors import SourceError
from streamd.messages import Frame, Stamp, Status, StreamState
from streamd.metrics.readings import StreamReading

logger = logging.getLogger(__name__)

Clock = Callable[[], float]  # seconds, monotonic
Wait = Callable[[threading.Event, float], bool]  # wait for the event so many seconds; True if it came

_HEALTHY_AFTER_S = 30.0  # a connection that delivered for so long makes the next failure the first again
_REBOOT_S = 300.0  # a camera that delivered so recently will be back soon,
_REBOOT_CEILING_S = 8.0  # and is then to be seen within 15 s, one time-out of opening included
_KEYFRAME_WITHIN_S = 60.0  # a camera that sends none begins a new connection with one


class Connection(Protocol):
    """An open source with its decoder."""

    @property
    def decoder(self) -> str:
        """Which decoder is at work, and why; it may change while frames come."""
        ...

    @property
    def num_packets(self) -> int:
        """Count the access units that were read."""
        ...

    def frames(self) -> Iterator[Frame | None]:
        """Yield each decoded frame, and None for a packet that completed none. Raises SourceError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """How a supervisor treats its stream's frames."""

    fps: float | None = None  # most frames a second that are handed over
    realtime: bool = False  # a file: hand over as its presentation times say
    loop: bool = False  # a file: start again at the end
    drop_corrupt: bool = True
    retry: bool = True  # False: the first failure ends the stream, in the failure's state
    stall_timeout_s: float = 5.0


class Supervisor:
    """Run one stream in a thread of its own; nothing that happens to it reaches another stream."""

    def __init__(
        self,
        stream: str,
        policy: Policy,
        connect: Callable[[int], Connection],
        hand_over: Callable[[Frame], bool],
        on_status: Callable[[Status], None],
        backoff: Backoff | None = None,
        clock: Clock = time.monotonic,
        wait: Wait = threading.Event.wait,
    ) -> None:
        """`connect` takes the first frame's seq; `hand_over` returns False when nobody wants frames any more."""
        self.stream = stream
        self._policy = policy
        self._connect = connect
        self._hand_over = hand_over
        self._on_status = on_status
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._wait = wait
        self._stop = threading.Event()
        self._next_seq = 0
        self._thinning = _Thinning(policy.fps)
        self._num_connections = 0
        self._running_since_s = math.inf  # of this connection
        self._num_packets = 0  # of all connections
        self._num_skipped_late = 0
        self._num_corrupt = 0
        self._num_thinned = 0
        self._num_failures: Counter[str] = Counter()
        self._last_error = ""  # since the stream last ran
        self._newest_frame_s: float | None = None
        self._clock_is_unset = False  # the camera's, by the newest frame
        self._status = Status(stream, StreamState.CONNECTING, "", "", time.time(), None, 0, 0, 0, 0)

    @property
    def status(self) -> Status:
        """The state as last published, with present counts. `dropped` holds what this stage dropped itself."""
        return self._described(self._status.state, self._status.reason, self._status.retry_in_s, self._status.at)

    @property
    def reading(self) -> StreamReading:
        """Everything that this stage counts, as it is now."""
        newest_s = self._newest_frame_s
        return StreamReading(
            status=self.status,
            num_packets=self._num_packets,
            num_dropped={
                "corrupt": self._num_corrupt,
                "late": self._num_skipped_late,
                "thinned": self._num_thinned,
            },
            num_failures=dict(self._num_failures),
            newest_age_s=None if newest_s is None else self._clock() - newest_s,
        )

    def note_failure(self, err: SourceError, retry_in_s: float) -> None:
        """Say that the stream could not be run at all; who calls this tries again."""
        self._num_failures[err.state] += 1
        self._enter(StreamState(err.state), str(err), retry_in_s=retry_in_s)

    def stop(self) -> None:
        """Ask the thread to end; it does within the read time-out at the latest."""
        self._stop.set()

    def run(self) -> None:
        """Be the stream's thread: return when stopped, at the end of a file, or at a failure that is not retried."""
        while not self._stop.is_set():
            try:
                self._run_connection()
                if not self._policy.loop:
                    break
            except SourceError as err:
                self._num_failures[err.state] += 1
                self._last_error = err.state
                if not self._policy.retry:
                    self._enter(StreamState(err.state), str(err))
                    return
                if self._clock() - self._running_since_s >= _HEALTHY_AFTER_S:
                    self._backoff.reset()
                self._wait_to_retry(err)
        self._enter(StreamState.ENDED, "stopped" if self._stop.is_set() else "the file came to its end")

    def _run_connection(self) -> None:
        """Connect and read until the end of a file. Raises SourceError."""
        self._running_since_s = math.inf
        self._enter(StreamState.CONNECTING)
        connection = self._connect(self._next_seq)
        try:
            self._num_connections += 1
            self._enter(StreamState.WAITING_KEYFRAME, decoder=connection.decoder)
            self._read(connection)
        finally:
            connection.close()

    def _read(self, connection: Connection) -> None:
        packets_before = self._num_packets
        last_frame_s = last_good_s = self._clock()
        pace = _Pace(self._clock, self._wait) if self._policy.realtime else None
        last: Frame | None = None
        for frame in connection.frames():
            self._num_packets = packets_before + connection.num_packets
            if self._stop.is_set():
                return
            now = self._clock()
            if now - last_good_s > _KEYFRAME_WITHIN_S + self._policy.stall_timeout_s:
                raise SourceError(f"no key frame for {now - last_good_s:.0f} s", "waiting_keyframe")
            if frame is None:
                if last is not None and now - last_frame_s > self._policy.stall_timeout_s:
                    raise SourceError(f"packets come, but no frame for {now - last_frame_s:.1f} s", "stalled")
                continue
            last_frame_s = self._newest_frame_s = now
            self._next_seq = frame.seq + 1
            if frame.corrupt and self._policy.drop_corrupt:
                self._num_corrupt += 1
                if self._status.state == StreamState.RUNNING and now - last_good_s > self._policy.stall_timeout_s:
                    self._enter(StreamState.WAITING_KEYFRAME, f"only damaged frames for {now - last_good_s:.1f} s")
                continue
            if last is not None and frame.stamp.epoch == last.stamp.epoch and frame.pts_s <= last.pts_s:
                self._num_skipped_late += 1  # a repeated or backward presentation time
                continue
            if last is None:
                self._running_since_s = now
                self._last_error = ""
            self._note_running(connection.decoder, frame.stamp)
            last = frame
            if pace:
                if pace.wait_for(frame, self._stop):
                    return
                frame = _arriving_now(frame)
            if not self._thinning.admits(frame):
                self._num_thinned += 1
            elif not self._hand_over(frame):
                self._stop.set()
                return
            last_frame_s = last_good_s = self._clock()  # a hand-over that waits for the model is no stall of the source
        if last is None and not self._stop.is_set():
            raise SourceError("holds no frame that can be decoded", permanent=True)
        if pace:
            pace.wait_for_end(self._stop)

    def _note_running(self, decoder: str, stamp: Stamp) -> None:
        """Say that good frames come, and what else the operator should know of them, once for each change."""
        is_unset, took_over = stamp.unset_at is not None, decoder != self._status.decoder
        if self._status.state == StreamState.RUNNING and is_unset == self._clock_is_unset and not took_over:
            return
        self._clock_is_unset = is_unset
        remarks = ["another decoder took over"] if took_over else []
        if stamp.unset_at is not None:
            said = datetime.fromtimestamp(stamp.unset_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
            remarks.append(f"the camera's clock was never set (it says {said}); times are those of arrival")
        self._enter(StreamState.RUNNING, "; ".join(remarks), decoder=decoder)

    def _wait_to_retry(self, err: SourceError) -> None:
        if err.permanent:
            delay_s = self._backoff.long_delay_s()
        else:
            was_here = self._newest_frame_s is not None and self._clock() - self._newest_frame_s < _REBOOT_S
            delay_s = self._backoff.next_delay_s(_REBOOT_CEILING_S if was_here else math.inf)
        self._enter(StreamState(err.state), str(err), retry_in_s=delay_s)
        self._wait(self._stop, delay_s)

    def _enter(
        self, state: StreamState, reason: str = "", *, decoder: str | None = None, retry_in_s: float | None = None
    ) -> None:
        self._status = self._described(state, reason, retry_in_s, time.time(), decoder)
        retry = f"; next try in {retry_in_s:.1f} s" if retry_in_s is not None else ""
        level = logging.WARNING if retry_in_s is not None else logging.INFO
        logger.log(level, "%s: %s%s%s", self.stream, state, f": {reason}" if reason else "", retry)
        self._on_status(self._status)

    def _described(
        self, state: StreamState, reason: str, retry_in_s: float | None, at: float, decoder: str | None = None
    ) -> Status:
        return Status(
            stream=self.stream,
            state=state,
            reason=reason,
            decoder=self._status.decoder if decoder is None else decoder,
            at=at,
            retry_in_s=retry_in_s,
            reconnects=max(0, self._num_connections - 1),
            frames=self._next_seq,
            dropped=self._num_skipped_late + self._num_corrupt,
            corrupt=self._num_corrupt,
            error=self._last_error,
        )


def _arriving_now(frame: Frame) -> Frame:
    """Stamp a frame that was held back as if its packet had only just come, so that latencies are a camera's."""
    arrived_at = time.time() - frame.decode_ms / 1e3
    stamp = replace(
        frame.stamp,
        arrived_ns=time.monotonic_ns() - round(frame.decode_ms * 1e6),
        arrived_at=arrived_at,
        captured_at=arrived_at,
    )
    return replace(frame, stamp=stamp)


class _Thinning:
    """Let at most `fps` frames a second pass, evenly, on the stream's own clock."""

    def __init__(self, fps: float | None) -> None:
        self._interval_s = 1 / fps if fps else 0.0
        self._due_s = float("-inf")
        self._epoch = -1

    def admits(self, frame: Frame) -> bool:
        if not self._interval_s:
            return True
        if frame.stamp.epoch != self._epoch:
            self._epoch, self._due_s = frame.stamp.epoch, frame.pts_s
        if frame.pts_s < self._due_s - self._interval_s * 0.05:  # cameras' time stamps jitter
            return False
        self._due_s += self._interval_s  # keep in step, so that 25 frames/s thin out to an even 10
        if self._due_s <= frame.pts_s:
            self._due_s = frame.pts_s + self._interval_s  # after a gap do not catch up
        return True


class _Pace:
    """Hold a file's frames back until their presentation time, as a camera would."""

    def __init__(self, clock: Clock, wait: Wait) -> None:
        self._clock = clock
        self._wait = wait
        self._last: Frame | None = None
        self._zero_s = 0.0  # monotonic time of pts 0
        self._step_s = 0.04  # between the last two frames; a picture file has but one

    def wait_for(self, frame: Frame, stop: threading.Event) -> bool:
        """Wait until the frame is due; True when asked to stop."""
        now = self._clock()
        if self._last is None or frame.stamp.epoch != self._last.stamp.epoch:
            self._zero_s = now - frame.pts_s
        else:
            self._step_s = frame.pts_s - self._last.pts_s
        self._last = frame
        return self._wait(stop, max(0.0, self._zero_s + frame.pts_s - now))

    def wait_for_end(self, stop: threading.Event) -> None:
        """Wait for as long as the last frame is shown, so that a file that loops keeps its pace."""
        self._wait(stop, self._step_s)
