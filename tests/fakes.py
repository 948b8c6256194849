"""Stand-ins for cameras and clocks: frames made of one pixel, connections that play a script, time that is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from streamd.errors import SourceError
from streamd.messages import Detections, Frame, Picture, Result, StageTimes, Stamp

PIXEL = Picture(
    planes=(torch.zeros(1, 1, 3, dtype=torch.uint8),), layout="rgb", matrix="bt709", full_range=True, rotation=0
)
NO_OBJECTS = Detections(
    boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32), labels=np.zeros(0, np.int64)
)
NO_TIMES = StageTimes(decode=0, wait=0, infer=0, post=0, total=0)

Step = Frame | SourceError | Callable[[], None] | None  # what one packet of a script gives, fails with, or does


def make_frame(
    stream: str = "gate", seq: int = 0, pts_s: float | None = None, *, epoch: int = 0, corrupt: bool = False
) -> Frame:
    """Make a frame of one pixel; 25 a second where no time is given."""
    return Frame(
        stream=stream,
        seq=seq,
        pts_s=seq / 25 if pts_s is None else pts_s,
        stamp=Stamp(epoch=epoch, arrived_ns=0, arrived_at=0.0, captured_at=0.0, clock="arrival"),
        decode_ms=0.0,
        picture=PIXEL,
        width=1,
        height=1,
        keyframe=seq == 0,
        corrupt=corrupt,
    )


def make_frames(
    count: int, stream: str = "gate", *, first_seq: int = 0, fps: float = 25, epoch: int = 0
) -> list[Frame]:
    """Make the frames of a connection, whose presentation times begin at 0."""
    return [make_frame(stream, first_seq + index, index / fps, epoch=epoch) for index in range(count)]


def make_result(frame: Frame) -> Result:
    return Result(frame=frame, detections=NO_OBJECTS, times=NO_TIMES, dropped=0, model="people")


class FakeClock:
    """Tell the time that a test sets; to wait is to move on at once."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Stand in for threading.Event.wait."""
        if not event.is_set():
            self.waits_s.append(seconds)
            self.now_s += seconds
        return event.is_set()


class FakeConnection:
    """Play a script of frames, of None for packets that complete no frame, of errors and of calls."""

    decoder = "fake: in a test"

    def __init__(self, script: Iterable[Step]) -> None:
        self._script = script
        self.closed = False
        self.num_packets = 0

    def frames(self) -> Iterator[Frame | None]:
        for step in self._script:
            if isinstance(step, SourceError):
                raise step
            if callable(step):
                step()
            else:
                self.num_packets += 1
                yield step

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeCamera:
    """Give one scripted connection after the other; an error in place of a script refuses the connection."""

    def __init__(self, *connections: Iterable[Step] | SourceError) -> None:
        self._connections = iter(connections)
        self.opened: list[FakeConnection] = []
        self.first_seqs: list[int] = []

    def connect(self, first_seq: int) -> FakeConnection:
        self.first_seqs.append(first_seq)
        script = next(self._connections, None)
        assert script is not None, "the supervisor connected more often than the test has scripts"
        if isinstance(script, SourceError):
            raise script
        self.opened.append(FakeConnection(script))
        return self.opened[-1]


def in_threads(targets: Sequence[Callable[[], None]], timeout_s: float = 10.0) -> None:
    """Run functions at once and wait for all; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), f"a thread did not end within {timeout_s} s"
