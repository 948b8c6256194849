"""What the stages count about themselves, for a scrape to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from streamd.messages import StageTimes, Status
from streamd.metrics.histogram import BATCH_SIZES, SECONDS, Histogram


@dataclass(frozen=True, slots=True)
class StreamReading:
    """How a stream is, and what it has done since the daemon started."""

    status: Status
    num_packets: int  # access units read from the source
    num_dropped: Mapping[str, int]  # decoded frames that were not processed, by reason
    num_failures: Mapping[str, int]  # ended connections and failed tries, by the state that each led to
    newest_age_s: float | None  # since the newest frame was decoded; None before the first


@dataclass(frozen=True, slots=True)
class ModelReading:
    """Which version of a model is at work, and what became of new ones since the daemon started."""

    model: str  # its name in the configuration
    sha256: str  # of the weights at work
    previous: str | None  # of the version that a roll-back goes to; None where there is none
    on_probation: bool  # the version before stands by in memory
    num_outcomes: Mapping[str, int]  # of new versions: live, refused, rolled_back
    last_event: str  # what last became of one, in a sentence; empty before the first


class LaneMeter:
    """Measure one model on one device. Its threads write; any thread may read."""

    def __init__(
        self, model: str, device: str, network: str, sha256: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`model` is the name in the configuration; `network` and `sha256` are the artifact's."""
        self.model = model
        self.device = device
        self.network = network
        self.sha256 = sha256
        self.batch_sizes = Histogram(BATCH_SIZES)
        self.queue_waits = Histogram(SECONDS)  # of each frame, from decoded to taken by a batch
        self.inferences = Histogram(SECONDS)  # of each batch: letterbox, model and suppression
        self.num_out_of_memory = 0  # batches that were tried again in parts
        self.num_senseless = 0  # frames of which the model said nothing but NaN or infinity
        self.batch_limit = 0  # frames: what a batch may have now; less than planned where memory is short
        self.has_done_any = False
        self.neglected_for_s: Callable[[], float] = lambda: 0.0  # how long frames have waited while none was taken
        self._clock = clock
        self._begun_s: dict[Hashable, float] = {}  # the batches on their way

    def begin(self, batch: Hashable, num_frames: int) -> None:
        """Note that a worker took a batch in hand."""
        self._begun_s[batch] = self._clock()
        self.batch_sizes.observe(num_frames)

    def waited(self, times: StageTimes) -> None:
        """Note how long a frame had waited for its batch."""
        self.queue_waits.observe(times.wait / 1e3)

    def end(self, batch: Hashable, times: StageTimes) -> None:
        """Note that a batch is done, with the times of one of its frames."""
        self.inferences.observe(times.infer / 1e3)
        self.has_done_any = True
        del self._begun_s[batch]

    def abandon(self, batch: Hashable) -> None:
        """Note that a batch ends without results; its frames are taken again."""
        self._begun_s.pop(batch, None)

    @property
    def busy_for_s(self) -> float:
        """How long the oldest batch has been in hand; 0 when there is none."""
        begun_s = list(self._begun_s.values())
        return self._clock() - min(begun_s) if begun_s else 0.0
