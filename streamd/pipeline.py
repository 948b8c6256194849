"""The data path: streams into models into results. connection.py, lane.py and runner.py alone know the stages.

Supervisor threads --Frame--> Batcher --frames--> Runner --detections--> InOrder --Result--> deliver
                              `----------------- a Lane for each model and device -----------------'
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import torch

from streamd.changes import Changes, Names
from streamd.config import Config
from streamd.connection import Connectors, connector
from streamd.device_errors import probe
from streamd.errors import ModelError, SourceError, StreamdError
from streamd.gate import judge
from streamd.in_order import InOrder
from streamd.lane import Lane, devices
from streamd.lanes import Prepared, flat, load, warm, warm_new
from streamd.messages import Frame, Result, Status, StreamState
from streamd.metrics.readings import LaneMeter, ModelReading, StreamReading
from streamd.model_file import is_replaced
from streamd.models.spec import ModelSpec
from streamd.room import require_room
from streamd.streams import Streams
from streamd.swap import OnFailure, Swaps
from streamd.workers import Workers

_ROOM_FOR_A_MODEL = 2 * (os.cpu_count() or 1) + 8, 32  # threads and descriptors: measuring, workers, its file


class Pipeline:
    """All the threads between the cameras and the publishers.

    `warm_up`, `start`, then `close_intake`, `drain` and `join_sources`: in this order, each once, by one thread.
    Between `start` and `close_intake`, `prepare` and `apply` follow a changed configuration, `prepare_rollback` and
    `roll_back` take a model back to the version before: one change at a time.
    """

    def __init__(
        self,
        config: Config,
        deliver: Callable[[Result], None],
        on_status: Callable[[Status], None] = lambda status: None,
        on_crash: Callable[[Exception], None] = lambda err: None,
        on_end: Callable[[], None] = lambda: None,
        on_failure: OnFailure = lambda lane, err: None,
        *,
        retry: bool = True,
    ) -> None:
        """Load the models. Raises ModelError or ConfigError.

        `deliver` gets each stream's results in order, from worker threads, and must not block for long.
        `on_crash` hears of an error that is a bug and ends the daemon, `on_end` that the last stream ended,
        `on_failure` of a new version of a model that fails and is to be rolled back.
        Without `retry` a stream that fails ends, and its last status says why.
        """
        self._config = config
        self._in_order = InOrder(deliver)
        self._lanes = load(config, {}, self._in_order)
        self._files = {name: lanes[0].file for name, lanes in self._lanes.items()}  # what the configuration named
        self._swaps = Swaps(on_failure)
        self._workers = Workers(on_crash)
        self._connectors = Connectors()
        self._streams = Streams(self._connectors, on_status, on_crash, on_end, retry=retry)
        self._streams.change(config, self._lanes, Changes(streams=Names(added=tuple(config.streams))))

    @property
    def lanes(self) -> list[Lane]:
        """All lanes: one for each model and device."""
        return flat(self._lanes)

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """What each model says of itself, by its name in the configuration."""
        return {name: lanes[0].spec for name, lanes in self._lanes.items()}

    @property
    def num_running(self) -> int:
        """Count the streams that deliver frames."""
        return sum(stream.status.state == StreamState.RUNNING for stream in self._streams)

    def statuses(self) -> list[Status]:
        """Describe every stream as it is now."""
        return [stream.status for stream in self._streams]

    def readings(self) -> list[StreamReading]:
        """Say what every stream has counted."""
        return [stream.reading for stream in self._streams]

    def meters(self) -> list[LaneMeter]:
        """Say what every model has counted on each of its devices."""
        return [lane.meter for lane in self.lanes]

    def models(self) -> list[ModelReading]:
        """Say which version of every model is at work."""
        return [self.model(name) for name in self._lanes]

    def model(self, name: str) -> ModelReading:
        """Say which version of a model is at work."""
        return self._swaps.reading(name, self.specs[name].weights_sha256)

    def replaced(self, config: Config) -> list[str]:
        """Name the models whose path means another file than when it was last followed."""
        known = self._files.items()
        return [name for name, file in known if name in config.models and is_replaced(file, config.models[name])]

    def first_frame(self, name: str) -> tuple[Frame, str]:
        """Connect a stream that was not started; return its first frame and its decoder. Raises SourceError."""
        config = self._config.streams[name]
        device = self._streams[name].lane.model.device
        connection = connector(name, config, self._connectors.decoders(device))(0)
        deadline = time.monotonic() + config.open_timeout_s + config.stall_timeout_s
        try:
            for frame in connection.frames():
                if frame is not None and not frame.corrupt:
                    return frame, connection.decoder
                if time.monotonic() > deadline:
                    raise SourceError("packets come, but no frame that can be decoded", "waiting_keyframe")
            raise SourceError("holds no frame that can be decoded", permanent=True)
        finally:
            connection.close()

    def warm_up(self) -> None:
        """Run each model until its settings are chosen, then start its workers."""
        for lane in self.lanes:
            served = [stream.name for stream in self._streams if stream.lane is lane]
            self._workers.start(lane, warm(lane, {name: self._config.streams[name] for name in served}))

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these streams, each once; all of them by default."""
        self._streams.start(names)

    def prepare(self, config: Config, changes: Changes) -> Prepared:
        """Load and warm what a changed configuration needs, and judge it; the data path goes on as it is.

        Raises ModelError or ConfigError, and then nothing has changed.
        """
        try:
            return self._prepare(config, changes)
        except (StreamdError, torch.OutOfMemoryError) as err:
            for name in changes.models.changed:
                self._swaps.note(name, "refused", f"the new version is refused: {err}")
                reason = f"the new version of the model {name} is refused: {err}"
                self._streams.say(self._config.streams_of(name), reason)
            if isinstance(err, StreamdError):
                raise
            wanted = ", ".join((*changes.models.added, *changes.models.changed))
            raise ModelError(f"not enough GPU memory for {wanted} beside the models at work: {err}") from err

    def _prepare(self, config: Config, changes: Changes) -> Prepared:
        if changes.models.added or changes.models.changed:
            require_room(*_ROOM_FOR_A_MODEL)
        unchanged = {name: lanes for name, lanes in self._lanes.items() if name not in changes.models.changed}
        lanes = load(config, unchanged, self._in_order, beside=True)
        for name in (*changes.streams.added, *changes.streams.changed, *changes.moved):
            for lane in lanes[config.model_of(name)]:
                self._connectors.decoders(lane.model.device).check(config.streams[name].decoder)
        work = warm_new(config, lanes, self.lanes)
        swapped = [name for name in changes.models.changed if name in lanes and name in self._lanes]
        notes = [self._judge(name, lanes[name], config) for name in swapped]
        return Prepared(config, lanes, work, tuple(filter(None, notes)))

    def _judge(self, name: str, new: list[Lane], config: Config) -> str:
        """Have a new version pass its gate; the same one with other settings has passed."""
        old = self._lanes[name]
        if config.models[name].gate is None or new[0].file.is_same_as(old[0].file):
            return ""
        served = [stream for stream in self._streams if stream.lane in old]
        running = [stream.name for stream in served if stream.status.state == StreamState.RUNNING]
        return judge(old, new, config.models[name], running)

    def apply(self, prepared: Prepared, changes: Changes) -> None:
        """Go over to what was prepared; a stream that did not change notices nothing."""
        config, old = prepared.config, self._lanes
        for name in changes.models.changed:
            if name in old and name in prepared.lanes:
                self._swaps.went_live(old[name], prepared.lanes[name], config.models[name].probation_s)
        kept = {name: self._files[name] for name in old if name not in changes.models.changed}
        self._files = {name: kept.get(name, lanes[0].file) for name, lanes in prepared.lanes.items()}
        self._swaps.forget_all_but(prepared.lanes)
        self._exchange(prepared, changes)

    def prepare_rollback(self, name: str) -> Prepared:
        """Make the version of a model ready that it had before. Raises ConfigError or ModelError."""
        previous = self._swaps.previous(name)
        if previous.lanes:
            return Prepared(self._config, {**self._lanes, name: [*previous.lanes]}, {})
        wanted = devices(previous.config)[: len(self._config.streams_of(name))]
        lanes = [Lane(name, previous.config, one, self._in_order, previous.file, beside=True) for one in wanted]
        everything = {**self._lanes, name: lanes}
        return Prepared(self._config, everything, warm_new(self._config, everything, self.lanes))

    def roll_back(self, name: str, prepared: Prepared, why: str) -> None:
        """Go over to the version before; the configuration stays, and is followed again when it changes."""
        streams = self._config.streams_of(name)
        self._swaps.went_back(name, why)
        self._exchange(prepared, Changes(moved=tuple(streams)))
        self._streams.say(streams, f"the model {name} was rolled back: {why}")

    def look_after(self) -> None:
        """Start the streams that had no thread, end the probations that are over, let go of the models that have ended,
        and ask each GPU whether it is there.

        Every few seconds, while no change is made. Raises what says that a GPU is lost.
        """
        self._streams.start_again()
        before = self._swaps.standing_by
        self._swaps.settle(self.lanes)
        for lane in {*before} - {*self._swaps.standing_by}:
            lane.close()
        self._workers.forget_ended()
        for device in {lane.model.device for lane in self.lanes}:
            probe(device)

    def _exchange(self, prepared: Prepared, changes: Changes) -> None:
        before = self._workers.lanes
        self._config, self._lanes = prepared.config, prepared.lanes
        for lane, work in prepared.work.items():
            self._workers.start(lane, work)
        self._streams.start(self._streams.change(prepared.config, prepared.lanes, changes))
        self._end_idle_lanes(before)
        self._streams.note_end()

    def close_intake(self) -> None:
        """Ask the streams to end and take no more frames; what waits is still processed."""
        self._streams.stop()
        for lane in {*self._workers.lanes, *self.lanes} - {*self._swaps.standing_by}:
            lane.close()

    def drain(self, deadline_s: float) -> list[str]:
        """Let the workers finish what waits; return those that did not end in time."""
        deadline = time.monotonic() + deadline_s
        standing_by = self._swaps.standing_by  # they may have to help until the others have ended
        late = self._workers.join([lane for lane in self._workers.lanes if lane not in standing_by], deadline_s)
        for lane in standing_by:
            lane.close()
        return late + self._workers.join(standing_by, deadline - time.monotonic())

    def join_sources(self, deadline_s: float) -> list[str]:
        """Wait for the streams' threads; return those that did not end in time (a camera that hangs in a read)."""
        late = self._streams.join(deadline_s)
        self._connectors.close()
        return late

    def _end_idle_lanes(self, before: list[Lane]) -> None:
        """Let the lanes end that no stream uses any more; their workers still finish what they have begun."""
        used = [stream.lane for stream in self._streams]
        self._lanes = {
            name: left for name, lanes in self._lanes.items() if (left := [lane for lane in lanes if lane in used])
        }
        for lane in {*before, *flat(self._lanes)} - {*used, *self._swaps.standing_by}:
            lane.close()
        self._workers.forget_ended()
