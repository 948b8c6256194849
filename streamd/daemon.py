"""The daemon: start, run until told otherwise, shut down in the written order."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from streamd.announce import Announcer
from streamd.config import Config, PublishConfig
from streamd.notify import Notifier
from streamd.pipeline import Pipeline
from streamd.publish import Publisher
from streamd.publish.redis_streams import RedisSink
from streamd.publish.zeromq import ZeroMqSink

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CRASHED = 1  # systemd restarts
SHUTDOWN_DEADLINE_S = 10.0  # the unit's TimeoutStopSec is longer
_STATUS_INTERVAL_S = 5.0  # states are repeated for subscribers that came late


class Daemon:
    """One process with one configuration. `run` may be called once."""

    def __init__(self, config: Config, notifier: Notifier | None = None) -> None:
        self._config = config
        self._notifier = notifier or Notifier()
        self._wake = threading.Event()
        self._stop_reason: str | None = None
        self._crashed = False
        self._publishers = make_publishers(config.publish, self._on_crash)
        self._announcer = Announcer(config.publish.format, [publisher.put for publisher in self._publishers])

    def run(self) -> int:
        """Return the exit code. Raises ConfigError, ModelError or PublishError before anything is started."""
        with self._signals():
            pipeline = self._start()
            try:
                self._main_loop(pipeline)
            finally:
                self._shut_down(pipeline)
        return EXIT_CRASHED if self._crashed else EXIT_OK

    def stop(self, reason: str) -> None:
        """Ask the daemon to end; safe from any thread and from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._wake.set()

    def _start(self) -> Pipeline:
        self._notifier.send("STATUS=loading models")
        for publisher in self._publishers:
            publisher.start()
        try:
            pipeline = Pipeline(
                self._config,
                deliver=self._announcer.result,
                on_status=self._announcer.status,
                on_crash=self._on_crash,
                on_end=lambda: self.stop("all files came to their end"),
            )
            self._announcer.know(pipeline.specs)
            pipeline.warm_up()
        except BaseException:
            self._stop_publishers(0.0)
            raise
        pipeline.start()
        self._notifier.send("READY=1", "STATUS=running")
        logger.info("ready: %d streams, %d models", len(self._config.streams), len(pipeline.specs))
        return pipeline

    def _main_loop(self, pipeline: Pipeline) -> None:
        """Repeat states and summaries until somebody asks to stop."""
        next_summary_s = time.monotonic() + self._config.metrics.log_interval_s
        summary = _Summary(self._announcer, self._publishers)
        while not self._wake.wait(_STATUS_INTERVAL_S):
            for status in pipeline.statuses():
                self._announcer.status(status)
            self._notifier.send(f"STATUS={pipeline.num_running} of {len(self._config.streams)} streams running")
            if time.monotonic() >= next_summary_s:
                next_summary_s += self._config.metrics.log_interval_s
                logger.info("%s, %d of %d streams running", summary, pipeline.num_running, len(self._config.streams))

    def _shut_down(self, pipeline: Pipeline) -> None:
        """Stop reading, let the models finish what waits, then send what is queued."""
        logger.info("stopping: %s", self._stop_reason or "crashed")
        self._notifier.send("STOPPING=1", "STATUS=draining")
        deadline = time.monotonic() + SHUTDOWN_DEADLINE_S
        pipeline.close_intake()
        late = pipeline.drain(SHUTDOWN_DEADLINE_S * 0.5)
        late += pipeline.join_sources(deadline - time.monotonic() - SHUTDOWN_DEADLINE_S * 0.2)
        self._stop_publishers(max(0.5, deadline - time.monotonic()))
        for name in late:
            logger.warning("%s did not end within %.0f s", name, SHUTDOWN_DEADLINE_S)
        logger.info("stopped: %d results published", self._announcer.num_results)

    def _stop_publishers(self, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        for publisher in self._publishers:
            publisher.stop(max(0.0, deadline - time.monotonic()))

    def _on_crash(self, err: Exception) -> None:
        self._crashed = True
        self.stop(f"a bug: {type(err).__name__}: {err}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT set a flag, and nothing more."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop(signal.Signals(number).name)

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def make_publishers(config: PublishConfig, on_crash: Callable[[Exception], None]) -> list[Publisher]:
    """Build a publisher for each sink of the configuration; none is started."""
    publishers = []
    if config.zeromq:
        sink = ZeroMqSink(config.zeromq.bind, config.zeromq.high_water_mark)
        publishers.append(Publisher(sink, config.queue_size, on_crash=on_crash))
    if config.redis:
        redis = config.redis
        redis_sink = RedisSink(redis.url.get_secret_value(), redis.pubsub, redis.streams, redis.max_len)
        publishers.append(Publisher(redis_sink, config.queue_size, on_crash=on_crash))
    return publishers


class _Summary:
    """Say what has happened since it was last asked, in one line."""

    def __init__(self, announcer: Announcer, publishers: list[Publisher]) -> None:
        self._announcer = announcer
        self._publishers = publishers
        self._since_s = time.monotonic()
        self._num_results = 0

    def __str__(self) -> str:
        now, num_results = time.monotonic(), self._announcer.num_results
        rate = (num_results - self._num_results) / max(1e-3, now - self._since_s)
        self._since_s, self._num_results = now, num_results
        lost = sum(publisher.num_dropped for publisher in self._publishers)
        return f"{rate:.1f} frames/s published, {lost} messages lost by publishers so far"
