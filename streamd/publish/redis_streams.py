"""Publish on Redis: pub/sub for who listens now, a Redis Stream for who comes later."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import redis
from redis.cluster import RedisCluster

from streamd.errors import PublishError
from streamd.publish import Outgoing
from streamd.publish.spool import Entry
from streamd.redact import redact
from streamd.redis_connection import REDIS_ERRORS, Client, check_url, explain, make_client
from streamd.wire import channel, stream_key

REPLY_TIMEOUT_S = 2.0
_NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
_QUOTED_COMMAND = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)


class _Connection:
    """A client made on its first use, since a Cluster's asks its server at once; for one thread."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self._url = url
        self._options = options
        self._client: Client | None = None

    @property
    def name(self) -> str:
        return f"redis {redact(self._url)}"

    def check(self) -> None:
        """Raise PublishError where the URL is wrong."""
        try:
            check_url(self._url)
        except ValueError as err:
            raise self.error(err) from err

    def client(self) -> Client:
        """Return the client; raise what redis-py raises."""
        if self._client is None:
            self._client = make_client(self._url, REPLY_TIMEOUT_S, self._options)
        return self._client

    def ping(self) -> None:
        try:
            self.client().ping()
        except REDIS_ERRORS as err:
            raise self.error(err) from err

    def error(self, err: Exception) -> PublishError:
        return PublishError(f"cannot publish on {redact(self._url)}: {explain(err)}")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None


class RedisSink:
    """Send each batch in one round trip: PUBLISH streamd:<stream>:<kind>, and XADD streamd:<stream>.

    Each Redis Stream keeps about `max_len` messages (XADD's MAXLEN ~). Messages that are marked `stored` are only
    published: their XADD is the spool's. Nothing is sent on `open`: a Redis that starts after the daemon is found by
    the publisher's next try. A batch that Redis takes in part counts as failed, so pub/sub may repeat messages.
    """

    def __init__(
        self,
        url: str,
        pubsub: bool = True,
        streams: bool = True,
        max_len: int = 1000,
        options: Mapping[str, str] = _NO_OPTIONS,
    ) -> None:
        self._connection = _Connection(url, options)
        self._pubsub = pubsub
        self._streams = streams
        self._max_len = max_len

    @property
    def name(self) -> str:
        return self._connection.name

    def open(self) -> None:
        if not (self._pubsub or self._streams):
            raise PublishError(f"{self.name}: neither pub/sub nor streams is switched on; switch on one of them")
        self._connection.check()

    def ping(self) -> None:
        self._connection.ping()

    def send(self, messages: Sequence[Outgoing]) -> None:
        try:
            replies = self._execute(self._connection.client(), messages)
        except REDIS_ERRORS as err:
            raise self._connection.error(err) from err
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            raise self._connection.error(refused) from refused

    def close(self) -> None:
        self._connection.close()

    def _execute(self, client: Client, messages: Sequence[Outgoing]) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for message in messages:
            if self._streams and not message.stored:
                fields: dict[Any, Any] = {"kind": message.kind, "payload": message.payload}
                pipeline.xadd(stream_key(message.stream), fields, maxlen=self._max_len, approximate=True)
            if not self._pubsub:
                continue
            if isinstance(client, RedisCluster):  # redis-py has no PUBLISH in a Cluster's pipeline
                client.publish(channel(message.stream, message.kind), message.payload)
            else:
                pipeline.publish(channel(message.stream, message.kind), message.payload)
        # Raised by redis-py, the error would quote the payload.
        return pipeline.execute(raise_on_error=False) if len(pipeline) else []


class RedisStore:
    """Append a stream's entries in one transaction: Redis has all of them, or none.

    Were some refused and later ones taken, sending again would put them behind, out of order and like repeats.
    Trimming is a command of its own: Redis writes XADD's MAXLEN ~ into its append-only file as the exact length of the
    moment, and a file that a crash has cut inside a transaction is replayed with more entries than there were then, so
    that it would lose the oldest (seen with Redis 7.0.15).
    """

    def __init__(self, url: str, max_len: int = 1000, options: Mapping[str, str] = _NO_OPTIONS) -> None:
        self._connection = _Connection(url, options)
        self._max_len = max_len

    @property
    def name(self) -> str:
        return self._connection.name

    def open(self) -> None:
        self._connection.check()

    def ping(self) -> None:
        self._connection.ping()

    def store(self, entries: Sequence[Entry]) -> None:
        try:
            pipeline = self._connection.client().pipeline(transaction=True)
            for entry in entries:
                fields: dict[Any, Any] = {"kind": entry.kind, "id": entry.id, "payload": entry.payload}
                pipeline.xadd(stream_key(entry.stream), fields)
            pipeline.xtrim(stream_key(entries[0].stream), maxlen=self._max_len, approximate=True)
            replies = pipeline.execute(raise_on_error=False)
        except REDIS_ERRORS as err:
            raise self._connection.error(_without_payload(err)) from None
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None or len(replies) != len(entries) + 1:
            raise self._connection.error(_without_payload(refused or redis.RedisError("Redis confirms only a part")))

    def close(self) -> None:
        self._connection.close()


def _without_payload(err: Exception) -> Exception:
    """Take away the command that redis-py quotes, with its payload, in the errors of a transaction."""
    err.args = (_QUOTED_COMMAND.sub("", str(err)),)
    return err
