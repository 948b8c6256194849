"""One stream at work: its supervisor, its thread, and the lane that its frames go to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from streamd.config import StreamConfig
from streamd.lane import Lane
from streamd.messages import Frame, Status
from streamd.metrics.readings import StreamReading
from streamd.supervisor import Connection, Policy, Supervisor


class Stream:
    """Join a supervisor to a lane, which may change while frames come."""

    def __init__(
        self,
        name: str,
        config: StreamConfig,
        lane: Lane,
        connect: Callable[[int], Connection],
        on_status: Callable[[Stream, Status], None],
        *,
        retry: bool = True,
    ) -> None:
        """Make room in the lane; `start` begins to read. `on_status` is called from the stream's thread."""
        self.name = name
        self.lane = lane  # until it leaves
        self._batcher = lane.batcher
        self.has_ended = False  # by itself, or with the daemon; set by the stream's thread
        self.is_leaving = False  # a change of the configuration ends it, and another may take its place
        self._has_left = False
        self._moving = threading.Lock()
        lane.batcher.add(name, lossless=config.is_file and config.pace == "fast")
        self.supervisor = Supervisor(
            stream=name,
            policy=Policy(
                fps=config.fps,
                realtime=config.is_file and config.pace == "realtime",
                loop=config.loop,
                drop_corrupt=config.corrupt_frames == "drop",
                retry=retry,
                stall_timeout_s=config.stall_timeout_s,
            ),
            connect=connect,
            hand_over=self.offer,
            on_status=lambda status: on_status(self, status),
        )
        self.is_started = False
        self.thread: threading.Thread | None = None  # none yet, or none could be had

    @property
    def status(self) -> Status:
        """Describe the stream as it is now."""
        return self.complete(self.supervisor.status)

    @property
    def reading(self) -> StreamReading:
        """Say what the stream has counted."""
        reading = self.supervisor.reading
        num_replaced = self._batcher.num_dropped(self.name)
        num_dropped = {**reading.num_dropped, "replaced": num_replaced}
        return replace(reading, status=self.complete(reading.status), num_dropped=num_dropped)

    def complete(self, status: Status) -> Status:
        """Add the frames that were dropped behind the supervisor's back."""
        return replace(status, dropped=status.dropped + self._batcher.num_dropped(self.name))

    def offer(self, frame: Frame) -> bool:
        """Hand a frame to the lane; False when nobody wants frames of this stream any more."""
        while not self._has_left:
            batcher = self._batcher
            if batcher.offer(frame):
                return True
            with self._moving:
                if self._batcher is batcher:
                    return False
            # It moved meanwhile: what waited is there already, so that the order holds.
        return False

    def move(self, lane: Lane) -> None:
        """Send the frames that wait, and all that come, to another lane of the same device; none is lost."""
        with self._moving:
            lane.batcher.adopt(self.name, self._batcher.release(self.name))
            self.lane, self._batcher = lane, lane.batcher

    def leave(self) -> None:
        """Forget what waits in the lane, after the supervisor was stopped; another stream may have the name next."""
        self._has_left = True
        self._batcher.remove(self.name)
        del self.lane  # with its model: a stream and its supervisor hold each other, and go when garbage is collected
