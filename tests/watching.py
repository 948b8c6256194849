"""Be the stream that reads one camera of `tests.rtsp_server`, and keep what it hands over and says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from streamd.backoff import Backoff
from streamd.config import StreamConfig
from streamd.connection import connector
from streamd.decode import Decoders
from streamd.messages import Frame, Status
from streamd.supervisor import Policy, Supervisor
from tests.clips import REST, TOP_LEFT
from tests.decoding import luma_of
from tests.rtsp_server import Cameras, CameraServer

WITHIN_S = 40.0


@dataclass
class Seen:
    """What a stream handed over and said."""

    frames: list[Frame] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)

    @property
    def states(self) -> list[str]:
        return [str(status.state) for status in self.statuses]

    @property
    def last(self) -> Status:
        return self.statuses[-1]

    @property
    def epochs(self) -> list[int]:
        """The epochs, one after the other."""
        return list(dict.fromkeys(frame.stamp.epoch for frame in self.frames))

    @property
    def clocks(self) -> list[str]:
        """The clocks that were used, one after the other."""
        clocks = [str(frame.stamp.clock) for frame in self.frames]
        return clocks[:1] + [after for before, after in pairwise(clocks) if after != before]


def watch(
    cameras: Cameras, num_frames: int = 50, *, until: Callable[[Seen], bool] | None = None, **settings: Any
) -> Seen:
    """Serve a camera and read it until there are so many frames, or until told; `settings` are the stream's."""
    seen = Seen()
    ended = threading.Event()
    decoders = Decoders(torch.device("cpu"))

    def hand_over(frame: Frame) -> bool:
        seen.frames.append(frame)
        return not (until(seen) if until else len(seen.frames) >= num_frames)

    with CameraServer({"gate": cameras}) as server:
        limits = {"read_timeout_s": 2, "stall_timeout_s": 2}
        config = StreamConfig.model_validate({"url": server.url("gate")} | limits | settings)
        supervisor = Supervisor(
            "gate",
            Policy(fps=config.fps, stall_timeout_s=config.stall_timeout_s),
            connector("gate", config, decoders),
            hand_over,
            seen.statuses.append,
            Backoff(0.1, ceiling_s=0.2),
        )

        def work() -> None:
            supervisor.run()
            ended.set()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert ended.wait(WITHIN_S), f"{len(seen.frames)} frames, {seen.states}, {seen.last.reason}"
        finally:
            supervisor.stop()
            thread.join(WITHIN_S)
    return seen


def shown(frame: Frame) -> int:
    """Return which drawing, modulo 30, a frame shows; fail where it shows anything else, such as a grey picture."""
    luma = luma_of(frame.picture)
    height, width = luma.shape
    corner, rest = luma[2 : height // 2 - 2, 2 : width // 2 - 2], luma[height // 2 + 2 : -2, 2:-2]
    index = round((float(np.median(rest)) - REST) / 5)
    assert np.abs(corner - TOP_LEFT).max() < 12 and np.abs(rest - REST - 5 * index).max() < 12, "no drawing"
    return index


def assert_clean(seen: Seen) -> None:
    """Check that each frame shows a drawing, and that times rise within each epoch."""
    for frame in seen.frames:
        assert not frame.corrupt
        shown(frame)
    for before, after in pairwise(seen.frames):
        assert before.stamp.epoch < after.stamp.epoch or before.pts_s < after.pts_s
        assert before.stamp.arrived_ns <= after.stamp.arrived_ns or before.stamp.epoch == after.stamp.epoch
