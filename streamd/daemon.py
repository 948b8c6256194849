"""The daemon: start, run until told otherwise, shut down in the written order."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from streamd.allocator import give_back_freed_memory
from streamd.announce import Announcer
from streamd.changes import Changes
from streamd.config import Config
from streamd.control import ControlServer, find_path
from streamd.control_messages import (
    AddRequest,
    Answer,
    ListRequest,
    RemoveRequest,
    Request,
    RollbackRequest,
    StatusRequest,
)
from streamd.device_errors import is_device_lost
from streamd.errors import ConfigError, StreamdError
from streamd.hard_end import end_within, no_end_after
from streamd.lane import Lane
from streamd.metrics.collector import Observed
from streamd.metrics.exporter import Exporter
from streamd.models import artifact
from streamd.notify import Notifier, watchdog_s
from streamd.pipeline import Pipeline
from streamd.publishers import Publishers
from streamd.reload import Reloader
from streamd.state import describe

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CRASHED = 1  # systemd restarts
SHUTDOWN_DEADLINE_S = 10.0  # the unit's TimeoutStopSec is longer
_HARD_END_S = 5.0  # after the deadline: then the process ends whatever hangs in it
_UNUSED_STOP_S = 1.0  # for publishers that have nothing to send yet
_RELOAD_STOP_S = 0.5  # for a refusal; a model that is loading takes longer, and is not waited for
_STATUS_INTERVAL_S = 5.0  # states are repeated for subscribers that came late
_GIVE_BACK_INTERVAL_S = 60.0  # memory that was freed; more often it would only be taken again


class Daemon:
    """One process with one configuration. `run` may be called once."""

    def __init__(self, config: Config, notifier: Notifier | None = None, *, path: Path | None = None) -> None:
        """`path` is the file that the configuration came from, for reloads; without one `control: auto` is off."""
        self._config = config
        self._notifier = notifier or Notifier()
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # stop, reload: a signal handler may put
        self._following = threading.Lock()  # held while the threads are exchanged
        self._stop_reason: str | None = None
        self._crashed = False
        self._publishers = Publishers(config.publish, self._on_crash)
        self._announcer = Announcer(config.publish.format, self._publishers.outlets)
        self._announcer.store(config.stored_streams)
        self._observed = Observed(self._announcer, lambda: self._publishers.all, lambda: self._publishers.stored)
        watchdog = watchdog_s()
        self._round_s = _STATUS_INTERVAL_S
        if watchdog:  # a loop that hangs is then known before the manager gives up, and two pings may come late
            self._observed.stuck_after_s = watchdog / 2
            self._round_s = min(_STATUS_INTERVAL_S, watchdog / 4)
        self._exporter = Exporter(config.metrics.listen, self._observed, config.metrics.tls)
        self._reloader = Reloader(config, path, self._follow, self._notifier, self._on_crash, self._replaced)
        self._control = self._make_control(is_service=path is not None)
        self._pipeline: Pipeline | None = None  # until it is ready
        self._started_s = time.monotonic()

    def run(self) -> int:
        """Return the exit code. Raises ConfigError, ModelError or PublishError before anything is started."""
        with no_end_after(), self._signals(), self._exporter:
            self._open_control()
            try:
                pipeline = self._start()
                try:
                    self._main_loop(pipeline)
                finally:
                    self._shut_down(pipeline)
            finally:
                if self._control:
                    self._control.stop()
        return EXIT_CRASHED if self._crashed else EXIT_OK

    def stop(self, reason: str) -> None:
        """Ask the daemon to end; safe from any thread and from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._asked.put("stop")

    def _start(self) -> Pipeline:
        self._notifier.send("STATUS=loading models")
        try:
            self._publishers.start()
            pipeline = Pipeline(
                self._config,
                deliver=self._announcer.result,
                on_status=self._announcer.status,
                on_crash=self._on_crash,
                on_end=lambda: self.stop("all files came to their end"),
                on_failure=self._on_failure,
            )
            pipeline.warm_up()
        except BaseException:
            self._publishers.stop(_UNUSED_STOP_S)
            raise
        pipeline.start()
        self._observed.pipeline, self._observed.ready = pipeline, True
        self._pipeline = pipeline
        self._reloader.start()
        self._notifier.send("READY=1", "STATUS=running")
        logger.info("ready: %d streams, %d models", len(self._config.streams), len(pipeline.specs))
        return pipeline

    def _main_loop(self, pipeline: Pipeline) -> None:
        """Repeat states and summaries until somebody asks to stop."""
        next_summary_s = time.monotonic() + self._config.metrics.log_interval_s
        next_give_back_s = time.monotonic() + _GIVE_BACK_INTERVAL_S
        summary = _Summary(self._announcer, self._publishers)
        was_stuck = False
        while self._has_time():
            self._look_after(pipeline)
            for status in pipeline.statuses():
                self._announcer.status(status)
            num_streams = len(self._config.streams)
            # Without it systemd ends a daemon whose model or publisher hangs, and starts it again.
            stuck = self._observed.stuck()
            alive = () if stuck else ("WATCHDOG=1",)
            running = f"{pipeline.num_running} of {num_streams} streams running"
            self._notifier.send("STATUS=" + "; ".join((running, *stuck)), *alive)
            if stuck and not was_stuck:
                logger.error("stuck: %s", "; ".join(stuck))
            was_stuck = bool(stuck)
            if time.monotonic() >= next_summary_s:
                next_summary_s = time.monotonic() + self._config.metrics.log_interval_s
                logger.info("%s, %d of %d streams running", summary, pipeline.num_running, num_streams)
            if time.monotonic() >= next_give_back_s:
                next_give_back_s = time.monotonic() + _GIVE_BACK_INTERVAL_S
                give_back_freed_memory()

    def _has_time(self) -> bool:
        """Wait until the next round of the main loop; False when somebody asked to stop."""
        next_round_s = time.monotonic() + self._round_s
        while self._stop_reason is None and (left_s := next_round_s - time.monotonic()) > 0:
            with suppress(queue.Empty):
                if self._asked.get(timeout=left_s) == "reload":
                    self._reloader.reload()
        return self._stop_reason is None

    def _look_after(self, pipeline: Pipeline) -> None:
        """See to versions of models on probation, and to the GPUs: where one hangs here, the watchdog ends it all."""
        try:
            with self._following:
                pipeline.look_after()
        except RuntimeError as err:
            logger.exception("a GPU does not answer")
            self._on_crash(err)

    def _replaced(self, config: Config) -> list[str]:
        assert self._pipeline is not None, "the reloader starts after it"
        return self._pipeline.replaced(config)

    def _follow(self, config: Config, changes: Changes) -> tuple[str, ...]:
        """Change what runs, in the reloader's thread. Raises StreamdError, and then nothing has changed."""
        assert self._pipeline is not None, "the reloader starts after it"
        prepared = self._pipeline.prepare(config, changes)
        fresh = self._publishers.prepare(config.publish, changes.publishers)
        with self._following:
            if self._stop_reason is not None:
                self._publishers.retire([*fresh.values()])
                raise StreamdError("the daemon is stopping")
            leaving = self._publishers.exchange(fresh, changes.publishers, config.publish)
            self._announcer.redirect(config.publish.format, self._publishers.outlets)
            self._announcer.store(config.stored_streams)
            self._pipeline.apply(prepared, changes)
            self._config = config
        self._publishers.retire(leaving)
        return prepared.notes

    def _go_back(self, model: str, why: str, failing: Lane | None = None) -> Changes:
        """Roll a model back, in the reloader's thread; only if this lane is still at work, where one is given."""
        assert self._pipeline is not None, "the reloader starts after it"
        if failing is not None and failing not in self._pipeline.lanes:
            return Changes()
        prepared = self._pipeline.prepare_rollback(model)
        with self._following:
            if self._stop_reason is not None:
                raise StreamdError("the daemon is stopping")
            self._pipeline.roll_back(model, prepared, why)
        return Changes(notes=(self._pipeline.model(model).last_event,))

    def _on_failure(self, lane: Lane, err: Exception) -> None:
        """Have a failing version rolled back; until then its frames go to the version before."""
        why = f"it failed: {artifact.last_line(err)}"
        self._reloader.ask(lambda: self._go_back(lane.name, why, lane), is_urgent=True)

    def _make_control(self, is_service: bool) -> ControlServer | None:
        control = self._config.control
        path = find_path(control.path) if control and (is_service or control.path != "auto") else None
        return ControlServer(path, self._answer, self._on_crash) if path else None

    def _open_control(self) -> None:
        """Open the control socket. Raises ConfigError, unless nobody asked for just this path."""
        try:
            if self._control:
                self._control.start()
        except ConfigError as err:
            if self._config.control and self._config.control.path != "auto":
                raise
            self._control = None
            logger.warning("%s; going on without it", err)

    def _answer(self, request: Request) -> Answer | Future[Changes]:
        """Serve the control socket, in its thread."""
        if self._pipeline is None:
            raise StreamdError("the daemon is still loading its models")
        match request:
            case AddRequest(name=name, settings=settings):
                return self._reloader.add_stream(name, settings)
            case RemoveRequest(name=name):
                return self._reloader.remove_stream(name)
            case RollbackRequest(model=model):
                return self._reloader.ask(lambda: self._go_back(model, "asked for on the control socket"))
            case StatusRequest() | ListRequest():
                uptime_s = time.monotonic() - self._started_s
                state = describe(self._config, self._pipeline, self._announcer, self._publishers, uptime_s)
                return Answer(state=state) if isinstance(request, StatusRequest) else Answer(streams=state.streams)
        return self._reloader.reload()

    def _shut_down(self, pipeline: Pipeline) -> None:
        """Stop reading, let the models finish what waits, then send what is queued."""
        end_within(SHUTDOWN_DEADLINE_S + _HARD_END_S)
        logger.info("stopping: %s", self._stop_reason or "crashed")
        self._observed.ready = False
        self._notifier.send("STOPPING=1", "STATUS=draining")
        deadline = time.monotonic() + SHUTDOWN_DEADLINE_S
        self._reloader.stop(_RELOAD_STOP_S)
        with self._following:  # a change that is being made is whole now, and no other begins
            pipeline.close_intake()
        late = pipeline.drain(SHUTDOWN_DEADLINE_S * 0.5)
        late += pipeline.join_sources(deadline - time.monotonic() - SHUTDOWN_DEADLINE_S * 0.2)
        self._publishers.stop(max(0.5, deadline - time.monotonic()))
        for name in late:
            logger.warning("%s did not end within %.0f s", name, SHUTDOWN_DEADLINE_S)
        logger.info("stopped: %d results published", self._announcer.num_results)

    def _on_crash(self, err: Exception) -> None:
        self._crashed = True
        end_within(SHUTDOWN_DEADLINE_S + _HARD_END_S)  # the main thread may hang as well, and never shut down
        cause = "the GPU is lost to this process" if is_device_lost(err) else "a bug"
        self.stop(f"{cause}: {type(err).__name__}: {err}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM, SIGINT and SIGHUP ask the main loop, and do nothing themselves."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                self._asked.put("reload")
            else:
                self.stop(signal.Signals(number).name)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        previous = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Summary:
    """Say what has happened since it was last asked, in one line."""

    def __init__(self, announcer: Announcer, publishers: Publishers) -> None:
        self._announcer = announcer
        self._publishers = publishers
        self._since_s = time.monotonic()
        self._num_results = 0

    def __str__(self) -> str:
        now, num_results = time.monotonic(), self._announcer.num_results
        rate = (num_results - self._num_results) / max(1e-3, now - self._since_s)
        self._since_s, self._num_results = now, num_results
        lost = sum(publisher.num_dropped for publisher in self._publishers.all)
        return f"{rate:.1f} frames/s published, {lost} messages lost by publishers so far"
