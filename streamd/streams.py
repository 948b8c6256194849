"""All streams at work: made, started, moved to other lanes, and removed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from streamd.changes import Changes
from streamd.config import Config
from streamd.connection import Connectors
from streamd.errors import SourceError
from streamd.lane import Lane
from streamd.lanes import Lanes
from streamd.messages import Status
from streamd.room import NO_THREADS
from streamd.stream import Stream
from streamd.threads import guarded, join

_THREAD_RETRY_S = 5.0  # the interval of `Pipeline.look_after`
_LEAVE_S = 2.0  # for a stream that is removed; a camera that hangs ends later, by its time-out
_DECODER_NICENESS = 5  # stream threads yield to the model's: a late frame costs one frame, a late model costs all


class Streams:
    """Give each stream a lane and a thread. Changed by one thread at a time; any may read."""

    def __init__(
        self,
        connectors: Connectors,
        on_status: Callable[[Status], None],
        on_crash: Callable[[Exception], None],
        on_end: Callable[[], None],
        *,
        retry: bool,
    ) -> None:
        """`on_end` hears once that all streams have ended by themselves; the others are as the pipeline's."""
        self._connectors = connectors
        self._on_status = on_status
        self._on_crash = on_crash
        self._on_end = on_end
        self._retry = retry
        self._by_name: dict[str, Stream] = {}  # never changed but replaced whole: other threads read it
        self._leaving: list[threading.Thread] = []  # of streams that were removed
        self._ending = threading.Lock()
        self._is_over = False

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Stream:
        return self._by_name[name]

    def change(self, config: Config, lanes: Lanes, changes: Changes) -> list[str]:
        """Follow a changed configuration; name the streams that are now to be started."""
        stay_connected = [name for name in changes.moved if self._move(self[name], lanes[config.model_of(name)])]
        anew = [*changes.streams.changed, *(name for name in changes.moved if name not in stay_connected)]
        self._disconnect([self[name] for name in (*changes.streams.removed, *anew)])
        kept = {name: stream for name, stream in self._by_name.items() if name in config.streams and name not in anew}
        made: dict[str, Stream] = {}
        for name in (*changes.streams.added, *anew):
            made[name] = self._make(name, config, lanes, kept | made)
        self._by_name = {name: (kept | made)[name] for name in config.streams}
        return [*made]

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these streams, each once; all of them by default."""
        for name in self._by_name if names is None else names:
            self._start(self[name])

    def start_again(self) -> None:
        """Try to start the streams for which there was no thread."""
        for stream in self:
            if stream.is_started and stream.thread is None:
                self._start(stream)

    def stop(self) -> None:
        """Ask all streams to end."""
        for stream in self:
            stream.supervisor.stop()

    def join(self, deadline_s: float) -> list[str]:
        """Wait for all threads, those of removed streams too; name those that did not end in time."""
        return join([stream.thread for stream in self if stream.thread] + self._leaving, deadline_s)

    def say(self, names: Iterable[str], reason: str) -> None:
        """Tell the subscribers of these streams; the next status is as before."""
        for stream in map(self.__getitem__, names):
            self._tell(stream, replace(stream.supervisor.status, reason=reason, at=time.time()))

    def note_end(self) -> None:
        """Say once that all streams have ended by themselves."""
        with self._ending:
            is_over = not self._is_over and all(stream.has_ended for stream in self)
            self._is_over |= is_over
        if is_over:
            self._on_end()

    def _make(self, name: str, config: Config, lanes: Lanes, others: Mapping[str, Stream]) -> Stream:
        stream = config.streams[name]
        lane = _least_used(lanes[config.model_of(name)], others.values())
        connect = self._connectors.connector(name, stream, lane.model.device)
        return Stream(name, stream, lane, connect, self._tell, retry=self._retry)

    def _start(self, stream: Stream) -> None:
        stream.is_started = True
        stream.thread = guarded(f"stream {stream.name}", lambda: self._run(stream), self._on_crash)
        try:
            stream.thread.start()
        except RuntimeError:
            stream.thread = None
            stream.supervisor.note_failure(SourceError(NO_THREADS), retry_in_s=_THREAD_RETRY_S)

    def _run(self, stream: Stream) -> None:
        with suppress(OSError):  # not allowed in some containers; then they compete
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _DECODER_NICENESS)
        stream.supervisor.run()
        if not stream.is_leaving:  # else all of them might seem to have ended while the new ones are not there yet
            stream.has_ended = True
            self.note_end()

    def _move(self, stream: Stream, lanes: list[Lane]) -> bool:
        """Send a stream's frames to its new model; False where that is on another device, so that it must reconnect."""
        near = [lane for lane in lanes if lane.model.device == stream.lane.model.device]
        if near and stream.lane not in near:
            stream.move(_least_used(near, self))
        return bool(near)

    def _disconnect(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.is_leaving = True
            stream.supervisor.stop()
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        threads = [stream.thread for stream in streams if stream.thread]
        if join(threads, _LEAVE_S):
            self._leaving += [thread for thread in threads if thread.is_alive()]
        for stream in streams:
            stream.leave()

    def _tell(self, stream: Stream, status: Status) -> None:
        """Pass a status on, unless the stream was replaced by one that now speaks for the name."""
        if self._by_name.get(stream.name, stream) is stream:
            self._on_status(stream.complete(status))


def _least_used(lanes: list[Lane], streams: Iterable[Stream]) -> Lane:
    at_work = [stream.lane for stream in streams]
    return min(lanes, key=at_work.count)
