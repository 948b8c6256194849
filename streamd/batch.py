"""Which frames go together, and when.

The first hand-over point between threads: stream threads `offer`, inference workers `take`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from streamd.messages import Frame

_MOST_READMITTED = 64  # frames that wait to be taken again before `readmit` itself waits
_FAST_QUEUE_FRAMES = 8  # of a file that is read as fast as the model can: enough for one batch ahead


@dataclass(slots=True)
class Mailbox:
    """What waits of one stream: the newest frame of a camera, or a short queue of a file."""

    lossless: bool
    frames: deque[Frame] = field(default_factory=deque)
    num_dropped: int = 0
    removed: bool = False
    since_s: float = 0.0  # when a frame came to wait here where there was none; the batcher's clock

    @property
    def is_full(self) -> bool:
        """Tell whether another frame would have to wait, or to replace one."""
        return len(self.frames) >= (_FAST_QUEUE_FRAMES if self.lossless else 1)


class Batcher:
    """Gather frames of many streams for one model.

    Cameras: the newest frame wins, and what it replaces is counted. Files with `pace: fast`: `offer` blocks
    instead, and nothing is lost. Under overload the stream that was served longest ago goes first, so that none
    starves. Safe to use from any thread.
    """

    def __init__(
        self,
        on_take: Callable[[Sequence[Frame]], None] = lambda frames: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_take` sees each batch's frames before any other thread can take the next, but no frame twice."""
        self._on_take = on_take
        self._clock = clock
        self._lock = threading.Lock()
        self._frame_came = threading.Condition(self._lock)
        self._room_came = threading.Condition(self._lock)
        self._mailboxes: OrderedDict[str, Mailbox] = OrderedDict()  # served longest ago first
        self._released: dict[str, Mailbox] = {}  # for the counts of frames that are still on their way
        self._readmitted: deque[Frame] = deque()  # taken once already; they go first
        self._closed = False
        self._taken_at_s = clock()

    @property
    def neglected_for_s(self) -> float:
        """How long frames have waited while none was taken; 0 where none waits."""
        with self._lock:
            since_s = [mailbox.since_s for mailbox in self._mailboxes.values() if mailbox.frames]
            if self._readmitted:
                since_s.append(self._taken_at_s)
            return self._clock() - max(self._taken_at_s, min(since_s)) if since_s else 0.0

    def add(self, stream: str, *, lossless: bool = False) -> None:
        """Make room for a stream, before its first frame."""
        with self._lock:
            self._mailboxes[stream] = Mailbox(lossless)

    def remove(self, stream: str) -> None:
        """Forget a stream and what waits of it."""
        with self._lock:
            mailbox = self._mailboxes.pop(stream, None)
            if mailbox:
                mailbox.removed = True
            self._room_came.notify_all()

    def release(self, stream: str) -> Mailbox:
        """Give a stream up, with what waits of it, so that another batcher can adopt it."""
        with self._lock:
            mailbox = self._mailboxes.pop(stream)
            mailbox.removed = True
            self._released[stream] = mailbox
            self._room_came.notify_all()
            return mailbox

    def adopt(self, stream: str, mailbox: Mailbox) -> None:
        """Take a stream over: what waited of it waits here, and its count goes on."""
        with self._lock:
            self._released.pop(stream, None)
            self._mailboxes[stream] = Mailbox(
                mailbox.lossless, mailbox.frames, mailbox.num_dropped, since_s=self._clock()
            )
            self._frame_came.notify()

    def readmit(self, frames: Sequence[Frame], num_dropped: Mapping[str, int], *, by_taker: bool = False) -> bool:
        """Have frames that were taken already, here or elsewhere, taken again before all others; False when closed.

        `num_dropped` tells of each stream what the method of this name is to say until the stream itself comes. One
        that takes from here itself is never refused; others wait for room.
        """
        with self._lock:
            if not by_taker:
                self._room_came.wait_for(lambda: len(self._readmitted) < _MOST_READMITTED or self._closed)
                if self._closed:
                    return False
            for stream, count in num_dropped.items():
                if stream not in self._mailboxes:
                    self._released[stream] = Mailbox(lossless=False, num_dropped=count)
            self._readmitted.extend(frames)
            self._frame_came.notify()
            return True

    def num_dropped(self, stream: str) -> int:
        """Count the frames of a stream that a newer one replaced."""
        with self._lock:
            mailbox = self._mailboxes.get(stream) or self._released.get(stream)
            return mailbox.num_dropped if mailbox else 0

    def offer(self, frame: Frame) -> bool:
        """Hand over a decoded frame; False when the batcher is closed or the stream was removed."""
        with self._lock:
            mailbox = self._mailboxes.get(frame.stream)
            if mailbox is None:
                return False
            if mailbox.lossless:
                self._room_came.wait_for(lambda: not mailbox.is_full or self._closed or mailbox.removed)
            if self._closed or mailbox.removed:
                return False
            if mailbox.is_full:
                mailbox.frames.clear()
                mailbox.num_dropped += 1
            elif not mailbox.frames:
                mailbox.since_s = self._clock()
            mailbox.frames.append(frame)
            self._frame_came.notify()
            return True

    def take(self, max_batch: int, max_wait_s: float = 0.0) -> list[Frame]:
        """Wait for frames, then at most `max_wait_s` longer for a full batch. Empty: closed, and nothing is left."""
        with self._lock:
            while True:
                self._frame_came.wait_for(lambda: self._closed or self._is_ready(1))
                self._wait_for_more(max_batch, self._clock() + max_wait_s)
                again = self._pick_readmitted(max_batch)
                frames = again or self._pick(max_batch)
                if frames:
                    self._taken_at_s = self._clock()
                    if not again:
                        self._on_take(frames)
                    self._room_came.notify_all()
                if frames or self._closed:
                    return frames
                # Another worker took what was there while this one waited for more.

    def close(self) -> None:
        """Take no more frames; what waits is still handed out."""
        with self._lock:
            self._closed = True
            self._frame_came.notify_all()
            self._room_came.notify_all()

    def _wait_for_more(self, max_batch: int, deadline: float) -> None:
        while not self._closed and not self._is_ready(max_batch):
            left_s = deadline - self._clock()
            if left_s <= 0:
                return
            self._frame_came.wait(left_s)

    def _is_ready(self, num_frames: int) -> bool:
        """Tell whether so many frames wait, or so many that more would only replace them."""
        if self._readmitted:
            return True
        num_waiting, all_full = 0, True
        for mailbox in self._mailboxes.values():
            num_waiting += len(mailbox.frames)
            all_full &= mailbox.is_full
            if num_waiting >= num_frames:
                return True
        return num_waiting > 0 and all_full

    def _pick_readmitted(self, max_batch: int) -> list[Frame]:
        return [self._readmitted.popleft() for _ in range(min(max_batch, len(self._readmitted)))]

    def _pick(self, max_batch: int) -> list[Frame]:
        """Take one frame of each stream in turn, the longest unserved first, until the batch is full."""
        picked: list[Frame] = []
        waiting = [name for name, mailbox in self._mailboxes.items() if mailbox.frames]
        while waiting and len(picked) < max_batch:
            for name in waiting[: max_batch - len(picked)]:
                picked.append(self._mailboxes[name].frames.popleft())
                self._mailboxes.move_to_end(name)
            waiting = [name for name in waiting if self._mailboxes[name].frames]
        return picked
