"""The data path: streams into models into results. pipeline.py, lane.py and runner.py alone know the stages.

Supervisor threads --Frame--> Batcher --frames--> Runner --detections--> InOrder --Result--> deliver
                              `----------------- a Lane for each model and device -----------------'
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from streamd.allocator import keep_freed_memory
from streamd.changes import Changes
from streamd.config import Config, StreamConfig
from streamd.decode import Decoder, Decoders, Wish
from streamd.device_errors import probe
from streamd.errors import ModelError, SourceError, StreamdError
from streamd.gate import judge
from streamd.in_order import InOrder
from streamd.lane import Lane, devices
from streamd.lanes import Lanes, Prepared, Work, flat, load, warm, warm_new
from streamd.messages import Frame, Result, Status, StreamState
from streamd.metrics.readings import LaneMeter, ModelReading, StreamReading
from streamd.model_file import is_replaced
from streamd.models.spec import ModelSpec
from streamd.redact import register_url
from streamd.room import require_room
from streamd.sources import Source, SourceOptions, Timeline, Transport, open_source
from streamd.stream import Stream
from streamd.swap import OnFailure, Swaps
from streamd.thread_names import name_thread

logger = logging.getLogger(__name__)

_ROOM_FOR_A_MODEL = 2 * (os.cpu_count() or 1) + 8, 32  # threads and descriptors: measuring, workers, its file
_THREAD_RETRY_S = 5.0  # the interval of `look_after`
_LEAVE_S = 2.0  # for a stream that is removed; a camera that hangs ends later, by its time-out
_DECODER_NICENESS = 5  # stream threads yield to the model's: a late frame costs one frame, a late model costs all


class Connection:
    """An open source with its decoder, as a supervisor drives it."""

    def __init__(self, source: Source, decoder: Decoder, *, keyframes_only: bool = False) -> None:
        self._source = source
        self._decoder = decoder
        self._keyframes_only = keyframes_only
        self.num_packets = 0

    @property
    def decoder(self) -> str:
        """Which decoder is at work, and why; another one may take over."""
        return self._decoder.description

    def frames(self) -> Iterator[Frame | None]:
        """Yield each decoded frame, and None for a packet that completed none; begins at a key frame."""
        waiting = True
        for packet in self._source.packets():
            self.num_packets += 1
            waiting = not packet.keyframe and (waiting or self._keyframes_only)
            decoded = None
            if not waiting:
                for decoded in self._decoder.decode(packet):
                    yield decoded
            if decoded is None:
                yield None
        yield from self._decoder.flush()

    def close(self) -> None:
        self._decoder.close()
        self._source.close()


def connector(
    stream: str, config: StreamConfig, decoders: Decoders, timeline: Timeline | None = None
) -> Callable[[int], Connection]:
    """Make the function that connects a stream; its timeline lasts over all of its connections.

    Raises ConfigError where the wanted decoder cannot work here.
    """
    timeline = timeline or Timeline()
    register_url(config.url.get_secret_value())
    decoders.check(config.decoder)
    wish = Wish(config.decoder, config.is_file, config.max_latency_ms / 1e3, config.frames == "key")
    options = SourceOptions(
        url=config.url.get_secret_value(),
        transport=config.transport,
        open_timeout_s=config.open_timeout_s,
        read_timeout_s=config.read_timeout_s,
        tls_verify=config.tls_verify,
        ca_file=config.ca_file,
    )
    transport = Transport(stream, options)

    def connect(first_seq: int) -> Connection:
        source = open_source(options, timeline, transport)
        try:
            choice = decoders.choose(wish, source.video.codec_context.name)
            decoder = choice.make(stream, source.video, first_seq)
            return Connection(source, decoder, keyframes_only=wish.keyframes_only)
        except BaseException:
            source.close()
            raise

    return connect


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
        self._on_status = on_status
        self._on_crash = on_crash
        self._on_end = on_end
        keep_freed_memory()
        self._retry = retry
        self._ending = threading.Lock()
        self._is_over = False
        self._in_order = InOrder(deliver)
        self._lanes = load(config, {}, self._in_order)
        self._files = {name: lanes[0].file for name, lanes in self._lanes.items()}  # what the configuration named
        self._swaps = Swaps(on_failure)
        self._workers: dict[Lane, list[threading.Thread]] = {}
        self._leaving: list[threading.Thread] = []  # of streams that were removed
        self._decoders: dict[torch.device, Decoders] = {}
        self._timelines: dict[str, Timeline] = {}  # by name, so that epochs go on where a stream comes back
        self._examine_devices(self._lanes)
        self._streams: dict[str, Stream] = {}  # never changed but replaced whole: other threads read it
        for name in config.streams:
            self._streams |= {name: self._make_stream(name, self._streams)}

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
        return sum(stream.status.state == StreamState.RUNNING for stream in self._streams.values())

    def statuses(self) -> list[Status]:
        """Describe every stream as it is now."""
        return [stream.status for stream in self._streams.values()]

    def readings(self) -> list[StreamReading]:
        """Say what every stream has counted."""
        return [stream.reading for stream in self._streams.values()]

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
        connection = connector(name, config, self._decoders[device])(0)
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
            served = {name: self._config.streams[name] for name, stream in self._streams.items() if stream.lane is lane}
            self._start_workers(lane, warm(lane, served))

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these streams, each once; all of them by default."""
        for name in self._streams if names is None else names:
            self._start_stream(self._streams[name])

    def prepare(self, config: Config, changes: Changes) -> Prepared:
        """Load and warm what a changed configuration needs, and judge it; the data path goes on as it is.

        Raises ModelError or ConfigError, and then nothing has changed.
        """
        try:
            return self._prepare(config, changes)
        except (StreamdError, torch.OutOfMemoryError) as err:
            for name in changes.models.changed:
                self._swaps.note(name, "refused", f"the new version is refused: {err}")
                self._say(name, f"the new version of the model {name} is refused: {err}")
            if isinstance(err, StreamdError):
                raise
            wanted = ", ".join((*changes.models.added, *changes.models.changed))
            raise ModelError(f"not enough GPU memory for {wanted} beside the models at work: {err}") from err

    def _prepare(self, config: Config, changes: Changes) -> Prepared:
        if changes.models.added or changes.models.changed:
            require_room(*_ROOM_FOR_A_MODEL)
        unchanged = {name: lanes for name, lanes in self._lanes.items() if name not in changes.models.changed}
        lanes = load(config, unchanged, self._in_order)
        self._examine_devices(lanes)
        for name in (*changes.streams.added, *changes.streams.changed, *changes.moved):
            for lane in lanes[config.model_of(name)]:
                self._decoders[lane.model.device].check(config.streams[name].decoder)
        work = warm_new(config, lanes, self.lanes)
        swapped = [name for name in changes.models.changed if name in lanes and name in self._lanes]
        notes = [self._judge(name, lanes[name], config) for name in swapped]
        return Prepared(config, lanes, work, tuple(filter(None, notes)))

    def _judge(self, name: str, new: list[Lane], config: Config) -> str:
        """Have a new version pass its gate; the same one with other settings has passed."""
        old = self._lanes[name]
        if config.models[name].gate is None or new[0].file.is_same_as(old[0].file):
            return ""
        served = [stream for stream in self._streams.values() if stream.lane in old]
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
        num_streams = sum(self._config.model_of(stream) == name for stream in self._config.streams)
        wanted = devices(previous.config)[:num_streams]
        lanes = [Lane(name, previous.config, device, self._in_order, previous.file) for device in wanted]
        self._examine_devices({name: lanes})
        everything = {**self._lanes, name: lanes}
        return Prepared(self._config, everything, warm_new(self._config, everything, self.lanes))

    def roll_back(self, name: str, prepared: Prepared, why: str) -> None:
        """Go over to the version before; the configuration stays, and is followed again when it changes."""
        moved = [stream for stream in self._streams.values() if self._config.model_of(stream.name) == name]
        self._swaps.went_back(name, why)
        self._exchange(prepared, Changes(moved=tuple(stream.name for stream in moved)))
        self._say(name, f"the model {name} was rolled back: {why}")

    def look_after(self) -> None:
        """Start the streams that had no thread, end the probations that are over, and ask each GPU whether it is there.

        Every few seconds, while no change is made. Raises what says that a GPU is lost.
        """
        self._start_again()
        before = self._swaps.standing_by
        self._swaps.settle(self.lanes)
        for lane in {*before} - {*self._swaps.standing_by}:
            lane.close()
        for device in {lane.model.device for lane in self.lanes}:
            probe(device)

    def _exchange(self, prepared: Prepared, changes: Changes) -> None:
        before = [*self._workers]
        self._config, self._lanes = prepared.config, prepared.lanes
        for lane, work in prepared.work.items():
            self._start_workers(lane, work)
        stay_connected = [name for name in changes.moved if self._move(self._streams[name])]
        anew = [*changes.streams.changed, *(name for name in changes.moved if name not in stay_connected)]
        self._disconnect([self._streams[name] for name in (*changes.streams.removed, *anew)])
        kept = {name: stream for name, stream in self._streams.items() if name in prepared.config.streams}
        kept = {name: stream for name, stream in kept.items() if name not in anew}
        made: dict[str, Stream] = {}
        for name in (*changes.streams.added, *anew):
            made[name] = self._make_stream(name, kept | made)
        self._streams = {name: (kept | made)[name] for name in prepared.config.streams}
        for stream in made.values():
            self._start_stream(stream)
        self._end_idle_lanes(before)
        self._note_end()

    def close_intake(self) -> None:
        """Ask the streams to end and take no more frames; what waits is still processed."""
        for stream in self._streams.values():
            stream.supervisor.stop()
        for lane in {*self._workers, *self.lanes} - {*self._swaps.standing_by}:
            lane.close()

    def drain(self, deadline_s: float) -> list[str]:
        """Let the workers finish what waits; return those that did not end in time."""
        deadline = time.monotonic() + deadline_s
        standing_by = self._swaps.standing_by  # they may have to help until the others have ended
        late = _join([one for lane, of in self._workers.items() if lane not in standing_by for one in of], deadline_s)
        for lane in standing_by:
            lane.close()
        helpers = [worker for lane in standing_by for worker in self._workers.get(lane, ())]
        return late + _join(helpers, deadline - time.monotonic())

    def join_sources(self, deadline_s: float) -> list[str]:
        """Wait for the streams' threads; return those that did not end in time (a camera that hangs in a read)."""
        late = _join([stream.thread for stream in self._streams.values() if stream.thread] + self._leaving, deadline_s)
        for decoders in self._decoders.values():
            decoders.close()
        return late

    def _examine_devices(self, lanes: Lanes) -> None:
        for lane in flat(lanes):
            if lane.model.device not in self._decoders:
                self._decoders[lane.model.device] = Decoders(lane.model.device)

    def _start_workers(self, lane: Lane, work: Work) -> None:
        self._workers[lane] = []
        for name, run in work.items():
            worker = threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True)
            worker.start()
            self._workers[lane].append(worker)

    def _end_idle_lanes(self, before: list[Lane]) -> None:
        """Let the lanes end that no stream uses any more; their workers still finish what they have begun."""
        used = [stream.lane for stream in self._streams.values()]
        self._lanes = {
            name: left for name, lanes in self._lanes.items() if (left := [lane for lane in lanes if lane in used])
        }
        for lane in {*before, *flat(self._lanes)} - {*used, *self._swaps.standing_by}:
            lane.close()
        alive = {lane: [worker for worker in of if worker.is_alive()] for lane, of in self._workers.items()}
        self._workers = {lane: of for lane, of in alive.items() if of}

    def _make_stream(self, name: str, others: Mapping[str, Stream]) -> Stream:
        config = self._config.streams[name]
        lanes = self._lanes[self._config.model_of(name)]
        lane = min(lanes, key=lambda lane: sum(stream.lane is lane for stream in others.values()))
        # One of its own, which counts on: a camera that hung when it was removed may still have the one before.
        timeline = self._timelines[name] = Timeline(self._timelines[name].epoch if name in self._timelines else -1)
        connect = connector(name, config, self._decoders[lane.model.device], timeline)
        return Stream(name, config, lane, connect, self._tell, retry=self._retry)

    def _start_stream(self, stream: Stream) -> None:
        stream.is_started = True
        # Daemon threads only so that a camera that hangs in FFmpeg cannot keep a stopped process alive.
        stream.thread = threading.Thread(
            target=self._guarded, args=(lambda: self._run_stream(stream),), name=f"stream {stream.name}", daemon=True
        )
        try:
            stream.thread.start()
        except RuntimeError:
            stream.thread = None
            reason = "no more threads can be had; raise the limit (TasksMax= or `ulimit -u`)"
            stream.supervisor.note_failure(SourceError(reason), retry_in_s=_THREAD_RETRY_S)

    def _start_again(self) -> None:
        """Try to start the streams for which there was no thread."""
        for stream in self._streams.values():
            if stream.is_started and stream.thread is None:
                self._start_stream(stream)

    def _move(self, stream: Stream) -> bool:
        """Send a stream's frames to its new model; False where that is on another device, so that it must reconnect."""
        device = stream.lane.model.device
        lanes = [lane for lane in self._lanes[self._config.model_of(stream.name)] if lane.model.device == device]
        if lanes and stream.lane not in lanes:
            stream.move(min(lanes, key=lambda lane: sum(other.lane is lane for other in self._streams.values())))
        return bool(lanes)

    def _disconnect(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.supervisor.stop()
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        threads = [stream.thread for stream in streams if stream.thread]
        if _join(threads, _LEAVE_S):
            self._leaving += [thread for thread in threads if thread.is_alive()]
        for stream in streams:
            stream.leave()

    def _run_stream(self, stream: Stream) -> None:
        with suppress(OSError):  # not allowed in some containers; then they compete
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _DECODER_NICENESS)
        stream.supervisor.run()
        stream.has_ended = True
        self._note_end()

    def _note_end(self) -> None:
        """Say once that all streams have ended by themselves."""
        with self._ending:
            is_over = not self._is_over and all(stream.has_ended for stream in self._streams.values())
            self._is_over |= is_over
        if is_over:
            self._on_end()

    def _say(self, model: str, reason: str) -> None:
        """Tell the subscribers of each stream of a model what became of it; the next status is as before."""
        for name, stream in self._streams.items():
            if self._config.model_of(name) == model:
                self._tell(stream, replace(stream.supervisor.status, reason=reason, at=time.time()))

    def _tell(self, stream: Stream, status: Status) -> None:
        """Pass a status on, unless the stream was replaced by one that now speaks for the name."""
        if self._streams.get(stream.name, stream) is stream:
            self._on_status(stream.complete(status))

    def _guarded(self, target: Callable[[], None]) -> None:
        """Be the top of a thread: what nobody expected ends the daemon, with a trace, instead of one thread."""
        name_thread(threading.current_thread().name)
        try:
            target()
        except Exception as err:
            logger.exception("%s crashed", threading.current_thread().name)
            self._on_crash(err)


def _join(threads: list[threading.Thread], deadline_s: float) -> list[str]:
    deadline = time.monotonic() + deadline_s
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]
