"""The publishers of a daemon: made, started, exchanged and ended here alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from streamd.changes import Names
from streamd.config import PublishConfig
from streamd.errors import PublishError
from streamd.publish import Carrier, Outgoing, Publisher
from streamd.publish.redis_streams import RedisSink, RedisStore
from streamd.publish.spool import Spool
from streamd.publish.stored import StoredPublisher
from streamd.publish.zeromq import ServerKeys, ZeroMqSink

_FLUSH_S = 2.0  # for what a publisher that is exchanged still has to send


class Publishers:
    """One publisher for each sink that the configuration has, by the name of its section."""

    def __init__(self, config: PublishConfig, on_crash: Callable[[Exception], None]) -> None:
        """Make them; none is started."""
        self._on_crash = on_crash
        self._by_name = make_publishers(config, on_crash)

    @property
    def all(self) -> list[Carrier]:
        return list(self._by_name.values())

    @property
    def stored(self) -> list[StoredPublisher]:
        """Those with a spool."""
        return [publisher for publisher in self.all if isinstance(publisher, StoredPublisher)]

    @property
    def outlets(self) -> list[Callable[[Outgoing], None]]:
        """What takes each message."""
        return [publisher.put for publisher in self.all]

    def start(self) -> None:
        """Open all sinks. Raises PublishError."""
        for publisher in self.all:
            publisher.start()

    def stop(self, deadline_s: float) -> None:
        """Send what is queued, for at most `deadline_s` together, and close the sinks."""
        _stop(self.all, deadline_s)

    def prepare(self, config: PublishConfig, changes: Names) -> Mapping[str, Carrier]:
        """Start the new ones beside those at work. Raises PublishError, and then nothing has changed."""
        made = make_publishers(config, self._on_crash)
        fresh = {name: made[name] for name in _with_spool(*changes.added, *changes.changed) if name in made}
        started: list[Carrier] = []
        try:
            for publisher in fresh.values():
                publisher.start()
                started.append(publisher)
        except PublishError:
            _stop(started, 0.0)
            raise
        return fresh

    def exchange(self, fresh: Mapping[str, Carrier], changes: Names, config: PublishConfig) -> list[Carrier]:
        """Put the new ones in the place of the old; return the old ones, for `retire`. Who stays follows `config`."""
        names = _with_spool(*changes.removed, *changes.changed)
        leaving = [self._by_name[name] for name in names if name in self._by_name]
        kept = {name: publisher for name, publisher in self._by_name.items() if publisher not in leaving}
        for publisher in kept.values():
            publisher.resize(config.queue_size)
            if isinstance(publisher, Publisher) and isinstance(publisher.sink, ZeroMqSink):
                _admit(publisher.sink, config)
        self._by_name = {**kept, **fresh}
        return leaving

    def retire(self, publishers: list[Carrier]) -> None:
        """End publishers that get no more messages."""
        _stop(publishers, _FLUSH_S)


def make_publishers(config: PublishConfig, on_crash: Callable[[Exception], None]) -> dict[str, Carrier]:
    """Build a publisher for each sink of the configuration; none is started."""
    publishers: dict[str, Carrier] = {}
    if config.zeromq:
        keys = config.zeromq.curve
        server_keys = ServerKeys(keys.secret_key.get_secret_value(), keys.client_keys) if keys else None
        sink = ZeroMqSink(config.zeromq.bind, config.zeromq.high_water_mark, server_keys)
        publishers["zeromq"] = Publisher(sink, config.queue_size, on_crash=on_crash)
    if config.redis:
        redis, url = config.redis, config.redis.url.get_secret_value()
        redis_sink = RedisSink(url, redis.pubsub, redis.streams, redis.max_len, redis.client_options)
        live = publishers["redis"] = Publisher(redis_sink, config.queue_size, on_crash=on_crash)
        if redis.streams:
            publishers["spool"] = StoredPublisher(
                RedisStore(url, redis.max_len, redis.client_options),
                Spool(config.spool.file, config.spool.max_entries, config.spool.max_mb << 20),
                config.queue_size,
                on_disk_failure=lambda outgoing: live.put(replace(outgoing, stored=False)),
                on_crash=on_crash,
            )
    return publishers


def _admit(sink: ZeroMqSink, config: PublishConfig) -> None:
    if config.zeromq and config.zeromq.curve:
        sink.allow(config.zeromq.curve.client_keys)


def _with_spool(*names: str) -> list[str]:
    """Add the spool where Redis is, since it sends there."""
    return [*names, *(["spool"] if "redis" in names else [])]


def _stop(publishers: list[Carrier], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    for publisher in publishers:
        publisher.stop(max(0.0, deadline - time.monotonic()))
