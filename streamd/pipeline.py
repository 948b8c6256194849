"""The data path: streams into models into results. pipeline.py, lane.py and runner.py alone know the stages.

Supervisor threads --Frame--> Batcher --frames--> Runner --detections--> InOrder --Result--> deliver
                              `----------------- a Lane for each model and device -----------------'
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PRIO_PROCESS, setpriority

from streamd.allocator import keep_freed_memory
from streamd.config import Config, StreamConfig
from streamd.decode import Decoder, Decoders, Wish
from streamd.errors import SourceError
from streamd.lane import Lane, devices
from streamd.messages import Frame, Result, Status, StreamState
from streamd.models.spec import ModelSpec
from streamd.redact import register_url
from streamd.sources import Source, SourceOptions, Timeline, open_source
from streamd.supervisor import Policy, Supervisor
from streamd.thread_names import name_thread

logger = logging.getLogger(__name__)

_DECODER_NICENESS = 5  # stream threads yield to the model's: a late frame costs one frame, a late model costs all


class Connection:
    """An open source with its decoder, as a supervisor drives it."""

    def __init__(self, source: Source, decoder: Decoder, *, keyframes_only: bool = False) -> None:
        self._source = source
        self._decoder = decoder
        self._keyframes_only = keyframes_only

    @property
    def decoder(self) -> str:
        """Which decoder is at work, and why; another one may take over."""
        return self._decoder.description

    def frames(self) -> Iterator[Frame | None]:
        """Yield each decoded frame, and None for a packet that completed none; begins at a key frame."""
        waiting = True
        for packet in self._source.packets():
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


def connector(stream: str, config: StreamConfig, decoders: Decoders) -> Callable[[int], Connection]:
    """Make the function that connects a stream; its timeline lasts over all of its connections.

    Raises ConfigError where the wanted decoder cannot work here.
    """
    timeline = Timeline()
    register_url(config.url.get_secret_value())
    decoders.check(config.decoder)
    wish = Wish(config.decoder, config.is_file, config.max_latency_ms / 1e3, config.frames == "key")
    options = SourceOptions(
        url=config.url.get_secret_value(),
        transport=config.transport,
        open_timeout_s=config.open_timeout_s,
        read_timeout_s=config.read_timeout_s,
    )

    def connect(first_seq: int) -> Connection:
        source = open_source(options, timeline)
        try:
            choice = decoders.choose(wish, source.video.codec_context.name)
            decoder = choice.make(stream, source.video, first_seq)
            return Connection(source, decoder, keyframes_only=wish.keyframes_only)
        except BaseException:
            source.close()
            raise

    return connect


@dataclass(slots=True)
class _Stream:
    supervisor: Supervisor
    lane: Lane
    thread: threading.Thread


class Pipeline:
    """All the threads between the cameras and the publishers.

    `warm_up`, `start`, then `close_intake`, `drain` and `join_sources`: in this order, each once, by one thread.
    """

    def __init__(
        self,
        config: Config,
        deliver: Callable[[Result], None],
        on_status: Callable[[Status], None] = lambda status: None,
        on_crash: Callable[[Exception], None] = lambda err: None,
        on_end: Callable[[], None] = lambda: None,
        *,
        retry: bool = True,
    ) -> None:
        """Load the models. Raises ModelError or ConfigError.

        `deliver` gets each stream's results in order, from worker threads, and must not block for long.
        `on_crash` hears of an error that is a bug and ends the daemon, `on_end` that the last stream ended.
        Without `retry` a stream that fails ends, and its last status says why.
        """
        self._config = config
        self._on_status = on_status
        self._on_crash = on_crash
        self._on_end = on_end
        keep_freed_memory()
        self._retry = retry
        self._ending = threading.Lock()
        self._num_ended = 0
        num_streams = Counter(config.model_of(stream) for stream in config.streams)
        self._lanes = {
            name: [Lane(name, config.models[name], device, deliver) for device in devices(config.models[name])[:count]]
            for name, count in num_streams.items()
        }
        self._workers: list[threading.Thread] = []
        self._decoders = {lane.model.device: Decoders(lane.model.device) for lane in self.lanes}
        self._streams: dict[str, _Stream] = {}
        for name in config.streams:
            self._streams[name] = self._make_stream(name)

    @property
    def lanes(self) -> list[Lane]:
        """All lanes: one for each model and device."""
        return [lane for lanes in self._lanes.values() for lane in lanes]

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """What each model says of itself, by its name in the configuration."""
        return {name: lanes[0].spec for name, lanes in self._lanes.items()}

    @property
    def num_running(self) -> int:
        """Count the streams that deliver frames."""
        return sum(stream.supervisor.status.state == StreamState.RUNNING for stream in self._streams.values())

    def statuses(self) -> list[Status]:
        """Describe every stream as it is now."""
        return [self._complete(stream.supervisor.status) for stream in self._streams.values()]

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
            plan = lane.plan(served)
            logger.info("model %s: %s on %s: %s", lane.name, lane.spec.name, lane.model.device, plan)
            for name, work in lane.threads(plan).items():
                worker = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
                worker.start()
                self._workers.append(worker)

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these streams, each once; all of them by default."""
        for name in self._streams if names is None else names:
            self._streams[name].thread.start()

    def close_intake(self) -> None:
        """Ask the streams to end and take no more frames; what waits is still processed."""
        for stream in self._streams.values():
            stream.supervisor.stop()
        for lane in self.lanes:
            lane.batcher.close()

    def drain(self, deadline_s: float) -> list[str]:
        """Let the workers finish what waits; return those that did not end in time."""
        return _join(self._workers, deadline_s)

    def join_sources(self, deadline_s: float) -> list[str]:
        """Wait for the streams' threads; return those that did not end in time (a camera that hangs in a read)."""
        late = _join([stream.thread for stream in self._streams.values()], deadline_s)
        for decoders in self._decoders.values():
            decoders.close()
        return late

    def _make_stream(self, name: str) -> _Stream:
        config = self._config.streams[name]
        lanes = self._lanes[self._config.model_of(name)]
        lane = min(lanes, key=lambda lane: sum(stream.lane is lane for stream in self._streams.values()))
        lane.batcher.add(name, lossless=config.is_file and config.pace == "fast")
        supervisor = Supervisor(
            stream=name,
            policy=Policy(
                fps=config.fps,
                realtime=config.is_file and config.pace == "realtime",
                loop=config.loop,
                drop_corrupt=config.corrupt_frames == "drop",
                retry=self._retry,
                stall_timeout_s=config.stall_timeout_s,
            ),
            connect=connector(name, config, self._decoders[lane.model.device]),
            hand_over=lane.batcher.offer,
            on_status=lambda status: self._on_status(self._complete(status)),
        )
        # Daemon threads only so that a camera that hangs in FFmpeg cannot keep a stopped process alive.
        thread = threading.Thread(
            target=self._guarded, args=(lambda: self._run_stream(supervisor),), name=f"stream {name}", daemon=True
        )
        return _Stream(supervisor, lane, thread)

    def _run_stream(self, supervisor: Supervisor) -> None:
        with suppress(OSError):  # not allowed in some containers; then they compete
            setpriority(PRIO_PROCESS, threading.get_native_id(), _DECODER_NICENESS)
        supervisor.run()
        with self._ending:
            self._num_ended += 1
            is_last = self._num_ended == len(self._streams)
        if is_last:
            self._on_end()

    def _complete(self, status: Status) -> Status:
        """Add the frames that were dropped behind the supervisor's back."""
        replaced = self._streams[status.stream].lane.batcher.num_dropped(status.stream)
        return replace(status, dropped=status.dropped + replaced)

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
