"""Publish at least once: into the spool on disk, from there into Redis Streams, and out of it when Redis has it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from streamd.backoff import Backoff
from streamd.errors import PublishError, StreamdError
from streamd.publish import REPORT_INTERVAL_S, Outgoing
from streamd.publish.retries import Retries
from streamd.publish.spool import Entry, Spool
from streamd.room import require_room
from streamd.threads import name_thread

logger = logging.getLogger(__name__)

COMMIT_INTERVAL_S = 0.02  # entries of so long share a commit, which is an fsync
RETRY_CEILING_S = 5.0
LOSS_INTERVAL_S = 60.0  # between two lines of the log about what was not stored
TIDY_INTERVAL_S = 1.0  # confirmed entries are deleted with the next commit, or else after so long


class Store(Protocol):
    """The far side. Used by one thread."""

    @property
    def name(self) -> str:
        """What the operator knows it by, without a secret."""

    def open(self) -> None:
        """Check what only the user can mend; raise PublishError."""

    def ping(self) -> None:
        """Raise PublishError where the far side is away."""

    def store(self, entries: Sequence[Entry]) -> None:
        """Append entries of one stream in order, all or none; raise PublishError where that is not confirmed."""

    def close(self) -> None:
        """Release everything."""


class StoredPublisher:
    """Carry the messages that are marked `stored` into the store, each at least once, in order per stream.

    One thread writes to the spool, one sends from it. An entry is accepted when it is on the disk; then only a disk can
    lose it. What does not get there is counted in `num_dropped`: a full memory queue, a spool at its bound, which keeps
    what it has accepted, or a disk that fails. In the last case, and where nothing older waits, `on_disk_failure` gets
    the message, to publish it live. Ids are `<epoch>-<seq>`: the epoch is random at each start, and seq counts the
    stream's entries, so a jump of seq is a loss.
    """

    def __init__(
        self,
        store: Store,
        spool: Spool,
        queue_size: int = 1000,
        backoff: Callable[[], Backoff] = lambda: Backoff(ceiling_s=RETRY_CEILING_S),
        on_disk_failure: Callable[[Outgoing], None] | None = None,
        on_crash: Callable[[Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._spool = spool
        self._queue: deque[Outgoing] = deque()
        self._queue_size = queue_size
        self._on_disk_failure = on_disk_failure
        self._on_crash = on_crash
        self._clock = clock
        self._retries = Retries(backoff, clock)
        self._epoch = secrets.token_hex(6)
        self._next_seq: dict[str, int] = {}
        self._arrived = threading.Condition()  # guards the queue and num_dropped
        self._news = threading.Event()  # for the sender: something was accepted, or all is written
        self._all_written = threading.Event()
        self._stopping = threading.Event()
        self._deadline = float("inf")
        self._writer = threading.Thread(target=self._guarded, args=(self._write,), name="spool")
        self._sender = threading.Thread(target=self._send_and_close, name="spool to redis")
        self._log = _Complaints(self.name, clock)
        self._num_sent = self._num_dropped = self._num_accepted = 0
        self._call_began: float | None = None
        self._is_failing = self._has_crashed = False

    @property
    def name(self) -> str:
        return f"stored {self._store.name}"

    @property
    def num_accepted(self) -> int:
        """Entries that were written to the disk since the start."""
        return self._num_accepted

    @property
    def num_sent(self) -> int:
        """Entries that the store has confirmed since the start."""
        return self._num_sent

    @property
    def num_dropped(self) -> int:
        """Entries that were not accepted, and those that a damaged spool took with it."""
        return self._num_dropped + self._spool.num_damaged

    @property
    def queue_size(self) -> int:
        """The most messages that wait for the disk."""
        return self._queue_size

    @property
    def num_queued(self) -> int:
        """Messages on their way to the disk."""
        return len(self._queue)

    @property
    def spool(self) -> Spool:
        return self._spool

    @property
    def healthy(self) -> bool:
        """Whether both threads live, and neither the disk nor the store fails."""
        is_alive = self._writer.is_alive() and self._sender.is_alive() and not self._has_crashed
        return is_alive and not self._is_failing and not self._log.is_losing

    @property
    def sending_for_s(self) -> float:
        """How long the store has held the thread, 0 when it does not."""
        began = self._call_began
        return 0.0 if began is None else self._clock() - began

    def start(self) -> None:
        """Start; raise PublishError where the URL is wrong. A disk that fails is no reason: it may come back."""
        self._store.open()
        try:
            require_room(2, 0)
        except StreamdError as err:
            raise PublishError(f"{self.name}: {err}") from err
        self._writer.start()
        self._sender.start()

    def put(self, outgoing: Outgoing) -> None:
        """Queue a message that is marked `stored` and return at once, from any thread; others are not for here."""
        if not outgoing.stored:
            return
        with self._arrived:
            is_taken = len(self._queue) < self._queue_size and not self._stopping.is_set()
            if is_taken:
                self._queue.append(outgoing)
                self._arrived.notify()
            else:
                self._num_dropped += 1
        if not is_taken:
            self._log.lost(1, f"the disk is too slow: {self._queue_size} messages wait for it")

    def resize(self, queue_size: int) -> None:
        """Let so many messages wait for the disk from the next one on."""
        with self._arrived:
            self._queue_size = queue_size

    def stop(self, deadline_s: float) -> None:
        """Write what is queued to the disk, and send for at most `deadline_s`; the rest waits for the next start."""
        self._deadline = self._clock() + deadline_s
        self._stopping.set()
        with self._arrived:
            self._arrived.notify_all()
        for thread in (self._writer, self._sender):
            if thread.ident:
                thread.join(max(0.0, self._deadline - self._clock()))
        if self._sender.is_alive():
            logger.warning("%s: still sending after %.1f s; it ends by its own time-out", self.name, deadline_s)

    def _guarded(self, run: Callable[[], None]) -> None:
        name_thread(threading.current_thread().name)
        try:
            run()
        except Exception as err:
            self._has_crashed = True
            logger.exception("%s: the publisher crashed", self.name)
            if self._on_crash:
                self._on_crash(err)

    def _write(self) -> None:
        try:
            self._write_until_stopped()
        finally:
            self._all_written.set()
            self._news.set()

    def _write_until_stopped(self) -> None:
        if self._spool.path.exists():
            self._add([])  # opens it: what an earlier life left there is to be sent
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._queue or self._stopping.is_set(), TIDY_INTERVAL_S)
            is_last = self._stopping.wait(COMMIT_INTERVAL_S)
            with self._arrived:
                batch = list(self._queue)
                self._queue.clear()
            if batch or self._spool.has_garbage:
                self._add(batch)
            if is_last and not batch:
                return

    def _add(self, batch: list[Outgoing]) -> None:
        entries = [Entry(one.stream, one.kind, self._next_id(one.stream), one.payload) for one in batch]
        try:
            num_taken = self._spool.add(entries)
        except PublishError as err:
            self._drop(len(batch), str(err))
            if self._on_disk_failure and not self._spool.waiting():
                for outgoing in batch:
                    self._on_disk_failure(outgoing)
            return
        finally:
            for notice in self._spool.take_notices():
                logger.error("%s: %s", self.name, notice)
        self._num_accepted += num_taken
        if num_taken < len(batch):
            self._drop(len(batch) - num_taken, f"the spool is full: {self._spool.num_entries} entries wait in it")
        else:
            self._log.took_all()
        self._news.set()

    def _drop(self, number: int, why: str) -> None:
        self._log.lost(number, why)
        with self._arrived:
            self._num_dropped += number

    def _next_id(self, stream: str) -> str:
        seq = self._next_seq.get(stream, 0)
        self._next_seq[stream] = seq + 1
        return f"{self._epoch}-{seq}"

    def _send_and_close(self) -> None:
        self._guarded(self._send)
        self._writer.join()  # by now it stops, or this thread has crashed and the daemon stops
        if self._spool.has_garbage:
            self._add([])
        self._spool.close()
        self._store.close()

    def _send(self) -> None:
        while True:
            self._news.clear()
            is_stopping = self._stopping.is_set() and self._all_written.is_set()
            waiting = self._spool.waiting()
            due = list(waiting) if is_stopping else self._retries.due(waiting)
            all_well = self._send_once(due)
            if is_stopping and (not due or not all_well or self._clock() >= self._deadline):
                return
            if not due:
                self._news.wait(self._retries.wait_s(waiting))

    def _send_once(self, streams: Sequence[str]) -> bool:
        """Send a batch of each stream; False where one failed. A stream that is refused does not hold up the others."""
        was_failing, all_well = self._is_failing, True
        for stream in streams:
            self._call_began = self._clock()
            try:
                self._send_batch(stream)
            except PublishError as err:
                self._is_failing, all_well = True, False
                is_away = self._is_away()
                self._retries.failed(stream, is_away)
                self._log.unsent(stream, str(err), self._spool.num_entries)
                if is_away:
                    break
            finally:
                self._call_began = None
        if streams and all_well:
            self._is_failing = self._retries.is_waiting
        if was_failing and not self._is_failing:
            logger.info("%s: sends again; %d entries wait in the spool", self.name, self._spool.num_entries)
        return all_well

    def _send_batch(self, stream: str) -> None:
        entries, mark = self._spool.oldest(stream)
        if not entries:
            return
        self._store.store(entries)
        self._spool.confirm(entries, mark)
        self._num_sent += len(entries)
        self._retries.succeeded(stream)

    def _is_away(self) -> bool:
        try:
            self._store.ping()
        except PublishError:
            return True
        return False


class _Complaints:
    """Tell the operator of losses and failures, each with at most one line an interval."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.is_losing = False
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()  # losses come from several threads
        self._num_lost = 0  # since the last line
        self._next_loss = self._next_failure = float("-inf")

    def lost(self, number: int, why: str) -> None:
        with self._lock:
            self.is_losing = True
            self._num_lost += number
            if self._clock() < self._next_loss:
                return
            self._next_loss = self._clock() + LOSS_INTERVAL_S
            num_lost, self._num_lost = self._num_lost, 0
        logger.warning("%s: %d entries not stored: %s", self._name, num_lost, why)

    def took_all(self) -> None:
        with self._lock:
            was_losing, self.is_losing = self.is_losing, False
            num_lost, self._num_lost = self._num_lost, 0
        if was_losing:
            logger.info("%s: stores again; %d more entries were not stored", self._name, num_lost)

    def unsent(self, stream: str, why: str, num_waiting: int) -> None:
        if self._clock() < self._next_failure:
            return
        self._next_failure = self._clock() + REPORT_INTERVAL_S
        logger.warning("%s: %s: %s; %d entries wait in the spool", self._name, stream, why, num_waiting)
