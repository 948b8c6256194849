"""Publishing: a queue and a thread for each sink, so that neither inference nor another sink ever waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from streamd.backoff import Backoff
from streamd.errors import PublishError
from streamd.threads import name_thread
from streamd.wire import Kind

logger = logging.getLogger(__name__)

MAX_BATCH = 128  # messages a send: bounds the memory and the time of one Redis round trip
REPORT_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """One encoded message on its way to a sink."""

    stream: str
    kind: Kind
    payload: bytes
    stored: bool = False  # goes into its Redis Stream by the spool


class Sink(Protocol):
    """Where messages go. Opened by the thread that starts the publisher, then used by the publisher's thread alone."""

    @property
    def name(self) -> str:
        """What the operator knows it by, without a secret."""

    def open(self) -> None:
        """Set up what needs no far side; raise PublishError on what only the user can mend, such as a taken port."""

    def ping(self) -> None:
        """Raise PublishError where the far side is away."""

    def send(self, messages: Sequence[Outgoing]) -> None:
        """Send all in order; raise PublishError when the far side fails."""

    def close(self) -> None:
        """Release everything, within a second or so."""


class Counted(Protocol):
    """The part of a publisher that is counted."""

    @property
    def name(self) -> str: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def num_queued(self) -> int: ...
    @property
    def num_sent(self) -> int: ...
    @property
    def num_dropped(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def sending_for_s(self) -> float: ...


class Carrier(Counted, Protocol):
    """A publisher of either kind: live, or stored on its way."""

    def start(self) -> None: ...

    def put(self, outgoing: Outgoing) -> None: ...

    def resize(self, queue_size: int) -> None: ...

    def stop(self, deadline_s: float) -> None: ...


class Publisher:
    """Carry messages to one sink from a thread of its own.

    One thread a sink instead of one for all: a Redis that hangs until its time-out must not delay ZeroMQ.
    A full queue loses its oldest message, since the newest is worth most. A failed batch waits until the sink answers
    again, is tried once more, and then given up: no message is refused for ever and in front of all others. A send that
    failed half-way may thus deliver twice.

    `on_crash` is called from the thread with an error that is no PublishError, which is a bug: stop the daemon.
    """

    def __init__(
        self,
        sink: Sink,
        queue_size: int = 1000,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> None:
        self._sink = sink
        self._queue: deque[Outgoing] = deque()
        self._queue_size = queue_size
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._on_crash = on_crash
        self._condition = threading.Condition()  # guards the queue and num_dropped
        self._stopping = threading.Event()
        self._deadline = float("inf")  # of the flush, by the clock
        self._thread = threading.Thread(target=self._run, name=f"publish {sink.name}")
        self._num_sent = 0
        self._num_dropped = 0
        self._call_began: float | None = None
        self._journal = _Journal(sink.name)

    @property
    def name(self) -> str:
        """What the operator knows the sink by, without a secret."""
        return self._sink.name

    @property
    def sink(self) -> Sink:
        return self._sink

    @property
    def queue_size(self) -> int:
        """The most messages that wait."""
        return self._queue_size

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_sent(self) -> int:
        return self._num_sent

    @property
    def num_dropped(self) -> int:
        """Messages lost to a full queue, to a failing sink, or left over at the stop."""
        return self._num_dropped

    @property
    def healthy(self) -> bool:
        """Whether the last send succeeded and the thread lives."""
        return self._thread.is_alive() and not self._journal.failing

    @property
    def sending_for_s(self) -> float:
        """How long the sink has held the thread, 0 when it does not: a watchdog's sign of a thread that is stuck."""
        began = self._call_began
        return 0.0 if began is None else self._clock() - began

    def start(self) -> None:
        """Open the sink and start; raise PublishError where the sink cannot be opened."""
        self._sink.open()
        try:
            self._thread.start()
        except RuntimeError as err:
            self._sink.close()
            raise PublishError(f"{self._sink.name}: no thread to publish from: {err}") from err

    def resize(self, queue_size: int) -> None:
        """Let so many messages wait from the next one on."""
        with self._condition:
            self._queue_size = queue_size

    def put(self, outgoing: Outgoing) -> None:
        """Queue a message and return at once, from any thread; a full queue loses its oldest."""
        with self._condition:
            while len(self._queue) >= self._queue_size:
                self._queue.popleft()
                self._num_dropped += 1
            self._queue.append(outgoing)
            self._condition.notify()

    def stop(self, deadline_s: float) -> None:
        """Send what is queued for at most `deadline_s`, then close the sink. What is left counts as dropped.

        A send that hangs at the deadline is left to its own time-out; its thread then closes the sink.
        """
        self._deadline = self._clock() + deadline_s
        with self._condition:
            self._stopping.set()
            self._condition.notify()
        if not self._thread.ident:
            return
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            logger.warning("%s: still sending after %.1f s; it ends by its own time-out", self._sink.name, deadline_s)

    def _run(self) -> None:
        name_thread(self._thread.name)
        try:
            while batch := self._take():
                self._deliver(batch)
        except Exception as err:
            logger.exception("%s: the publisher crashed", self._sink.name)
            if self._on_crash:
                self._on_crash(err)
        finally:
            with self._condition:
                self._num_dropped += len(self._queue)
                self._queue.clear()
            self._sink.close()

    def _take(self) -> list[Outgoing]:
        """Wait for messages; an empty list means the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self._stopping.is_set())
            if self._stopping.is_set() and (self._journal.failing or self._clock() >= self._deadline):
                return []
            return [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]

    def _deliver(self, batch: list[Outgoing]) -> None:
        for _ in range(2):
            if self._succeeds(lambda: self._sink.send(batch)):
                self._num_sent += len(batch)
                self._backoff.reset()
                self._journal.sent(self._num_dropped, self._clock())
                return
            if not self._wait_for_sink():
                break
        with self._condition:
            self._num_dropped += len(batch)

    def _wait_for_sink(self) -> bool:
        """Back off until the sink answers; False when the stop comes first and the sink is still away."""
        while True:
            is_stopping = self._stopping.wait(self._backoff.next_delay_s())
            if self._clock() >= self._deadline:
                return False
            if self._succeeds(self._sink.ping):
                return True
            if is_stopping:
                return False

    def _succeeds(self, call: Callable[[], None]) -> bool:
        self._call_began = self._clock()
        try:
            call()
        except PublishError as err:
            self._journal.failed(err, self._num_dropped, self._clock())
            return False
        finally:
            self._call_began = None
        return True


class _Journal:
    """Tell the operator of failures, losses and recoveries, with at most one complaint an interval."""

    def __init__(self, name: str) -> None:
        self.failing = False
        self._name = name
        self._complained = False  # of the present failure
        self._failing_since = 0.0
        self._lost_before = 0  # dropped when the failure began, or at the last complaint of a slow sink
        self._next_complaint = float("-inf")

    def failed(self, err: PublishError, num_dropped: int, now: float) -> None:
        first = not self.failing
        if first:
            self.failing, self._complained = True, False
            self._failing_since, self._lost_before = now, num_dropped
        if now < self._next_complaint:
            return
        self._next_complaint, self._complained = now + REPORT_INTERVAL_S, True
        if first:
            logger.warning("%s: %s; trying again", self._name, err)
        else:
            lost, outage_s = num_dropped - self._lost_before, now - self._failing_since
            logger.warning("%s: failing for %.0f s, %d messages lost: %s", self._name, outage_s, lost, err)

    def sent(self, num_dropped: int, now: float) -> None:
        lost = num_dropped - self._lost_before
        if self.failing:
            self.failing, self._lost_before = False, num_dropped
            if self._complained:
                outage_s = now - self._failing_since
                logger.info("%s: publishing again after %.1f s; %d messages were lost", self._name, outage_s, lost)
        elif lost and now >= self._next_complaint:
            self._next_complaint, self._lost_before = now + REPORT_INTERVAL_S, num_dropped
            logger.warning("%s: too slow for what is published: %d messages lost", self._name, lost)
