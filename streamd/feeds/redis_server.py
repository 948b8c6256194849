"""Read Redis, by pub/sub or from Redis Streams, over lost connections."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import redis
from redis.client import PubSub
from redis.cluster import RedisCluster

from streamd.backoff import Backoff
from streamd.errors import SubscribeError
from streamd.feeds import Received, from_name
from streamd.feeds.repeats import Repeats
from streamd.redact import redact
from streamd.redis_connection import REDIS_ERRORS, Client, explain, make_client
from streamd.wire import Kind, channel, stream_key

REPLY_TIMEOUT_S = 5.0
MAX_BLOCK_S = 2.0  # of one XREAD, well under the reply time-out; also how often new streams are looked for
MAX_ENTRIES = 100  # a stream and XREAD
CLUSTER_POLL_S = 0.05

# What redis-py and the readers here raise for a reply of another shape than Redis gives.
_STRANGE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError)

_ENTRY_ID = re.compile(r"\d+(-\d+)?")


class Reader(Protocol):
    """One way to read; raises what redis-py raises."""

    def read(self, timeout_s: float) -> Received | None: ...

    def forget_connection(self) -> None:
        """Connect anew at the next read."""


class RedisFeed:
    """A reader whose lost connection is made again, with back-off."""

    def __init__(self, where: str, client: Client, reader: Reader) -> None:
        self._where = where
        self._client = client
        self._reader = reader
        self._backoff = Backoff(ceiling_s=5.0)
        self._closed = threading.Event()

    def receive(self, timeout_s: float) -> Received | None:
        deadline = time.monotonic() + timeout_s
        try:
            received = self._reader.read(timeout_s)
        except redis.AuthenticationError as err:
            raise _error(self._where, err) from err
        except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterDownError):
            self._reader.forget_connection()
            self._closed.wait(min(self._backoff.next_delay_s(), max(0.0, deadline - time.monotonic())))
            return None
        except REDIS_ERRORS as err:
            raise _error(self._where, err) from err
        except _STRANGE as err:
            self._reader.forget_connection()
            raise _strange(self._where, err) from err
        self._backoff.reset()
        return received

    def close(self) -> None:
        self._closed.set()
        self._reader.forget_connection()
        self._client.close()


def open_channels(url: str, stream: str | None, kinds: Sequence[Kind]) -> RedisFeed:
    """Subscribe by pub/sub; when this returns, Redis has confirmed. Raises SubscribeError."""
    client = _connect(url)
    reader = ChannelReader(client, stream, kinds)
    try:
        reader.subscribe()
    except REDIS_ERRORS as err:
        client.close()
        raise _error(redact(url), err) from err
    except _STRANGE as err:
        client.close()
        raise _strange(redact(url), err) from err
    return RedisFeed(redact(url), client, reader)


def open_streams(url: str, stream: str | None, kinds: Sequence[Kind], since: str) -> RedisFeed:
    """Read Redis Streams from the entry after `since` on. Raises SubscribeError."""
    if not _ENTRY_ID.fullmatch(since):
        advice = 'give "0" for all that Redis keeps, or the id of an entry, like 1767225600000-0'
        raise SubscribeError(f"cannot read {redact(url)} since {since!r}: {advice}")
    client = _connect(url)
    return RedisFeed(redact(url), client, StreamReader(client, stream, kinds, since))


class ChannelReader:
    """Pub/sub: what is published while nobody is connected is lost."""

    def __init__(self, client: Client, stream: str | None, kinds: Sequence[Kind]) -> None:
        self._client = client
        self._stream = stream
        self._kinds = kinds
        self._pubsub: PubSub | None = None
        self._pending: deque[Received] = deque()  # what came between the confirmations

    def read(self, timeout_s: float) -> Received | None:
        if self._pubsub is None:
            self.subscribe()
        deadline = time.monotonic() + timeout_s
        while not self._pending:
            self._read_reply(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break
        return self._pending.popleft() if self._pending else None

    def subscribe(self) -> None:
        self._pubsub = self._client.pubsub()
        names = [channel(self._stream or "*", kind) for kind in self._kinds]
        (self._pubsub.subscribe if self._stream else self._pubsub.psubscribe)(*names)
        num_confirmed = 0
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while num_confirmed < len(names):
            if time.monotonic() > deadline:
                raise redis.TimeoutError("no confirmation of the subscription")
            num_confirmed += self._read_reply(0.5) in ("subscribe", "psubscribe")

    def forget_connection(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
        self._pubsub = None

    def _read_reply(self, timeout_s: float) -> str | None:
        """Put a message aside; return the type of the reply, None for none in time."""
        assert self._pubsub is not None, "subscribe() comes first"
        reply: dict[str, Any] | None = self._pubsub.get_message(timeout=timeout_s)
        if reply is None:
            return None
        if reply["type"] in ("message", "pmessage"):
            received = from_name(reply["channel"].decode(errors="replace"), ":", reply["data"], self._kinds)
            if received is not None:
                self._pending.append(received)
        return str(reply["type"])


class StreamReader:
    """Redis Streams: each read goes on where the last one ended, so an outage loses nothing that Redis keeps.

    What "at least once" has written twice is read once.
    """

    def __init__(self, client: Client, stream: str | None, kinds: Sequence[Kind], since: str) -> None:
        self._client = client
        self._kinds = kinds
        self._pending: deque[Received] = deque()
        self._positions = {} if stream is None else {stream_key(stream): since}  # key -> id of the last entry
        self._looks_for_streams = stream is None
        self._since = since  # of the streams that the next look finds
        self._next_look = float("-inf")
        self._nothing_yet = threading.Event()  # never set: a wait for the first stream, or in a Cluster for an entry
        self._repeats = Repeats()

    def read(self, timeout_s: float) -> Received | None:
        if not self._pending:
            if self._looks_for_streams and time.monotonic() >= self._next_look:
                self._look_for_streams()
            self._read_entries(min(timeout_s, MAX_BLOCK_S))
        return self._pending.popleft() if self._pending else None

    def forget_connection(self) -> None:
        if isinstance(self._client, RedisCluster):
            self._client.disconnect_connection_pools()
        else:
            self._client.connection_pool.disconnect()

    def _look_for_streams(self) -> None:
        for key in self._client.scan_iter(match=stream_key("*"), count=1000, _type="stream"):
            self._positions.setdefault(key.decode(errors="replace"), self._since)
        self._since = "0"  # what appears from now on is new from its first entry
        self._next_look = time.monotonic() + MAX_BLOCK_S

    def _read_entries(self, timeout_s: float) -> None:
        if not self._positions:
            self._nothing_yet.wait(timeout_s)
            return
        for key, entries in self._read_one_by_one(timeout_s) if self._is_cluster else self._read_at_once(timeout_s):
            name = key.decode(errors="replace")
            for entry_id, fields in entries:
                self._positions[name] = entry_id.decode()
                if not self._repeats.has(name, fields.get(b"id", b"").decode(errors="replace")):
                    self._put_aside(name, entry_id.decode(), fields)

    @property
    def _is_cluster(self) -> bool:
        return isinstance(self._client, RedisCluster)

    def _read_at_once(self, timeout_s: float) -> list[Any]:
        block_ms = round(timeout_s * 1000) or None  # 0 would block for ever
        positions: dict[Any, Any] = dict(self._positions)
        reply: Any = self._client.xread(positions, count=MAX_ENTRIES, block=block_ms)
        return reply or []

    def _read_one_by_one(self, timeout_s: float) -> list[Any]:
        """Read in a Cluster, where one XREAD cannot ask several nodes nor wait for them."""
        deadline = time.monotonic() + timeout_s
        while True:
            found: list[Any] = []
            for key, position in self._positions.items():
                reply: Any = self._client.xread({key: position}, count=MAX_ENTRIES)
                found += reply or []
            remaining_s = deadline - time.monotonic()
            if found or remaining_s <= 0:
                return found
            self._nothing_yet.wait(min(CLUSTER_POLL_S, remaining_s))

    def _put_aside(self, key: str, entry_id: str, fields: dict[bytes, bytes]) -> None:
        kind = fields.get(b"kind", b"").decode(errors="replace")
        received = from_name(f"{key}:{kind}", ":", fields.get(b"payload", b""), self._kinds)
        if received is not None:
            self._pending.append(received._replace(entry_id=entry_id))


def _connect(url: str) -> Client:
    """Return a client that has reached its server: a mistake of the user shows at once."""
    try:
        client = make_client(url, REPLY_TIMEOUT_S)
    except ValueError as err:
        raise SubscribeError(f"cannot subscribe to {redact(url)}: {err}") from err
    except REDIS_ERRORS as err:
        raise _error(redact(url), err) from err
    try:
        client.ping()
    except REDIS_ERRORS as err:
        client.close()
        raise _error(redact(url), err) from err
    except _STRANGE as err:
        client.close()
        raise _strange(redact(url), err) from err
    return client


def _error(where: str, err: Exception) -> SubscribeError:
    return SubscribeError(f"cannot subscribe to {where}: {explain(err)}")


def _strange(where: str, err: Exception) -> SubscribeError:
    return SubscribeError(f"cannot read {where}: what answers there is no Redis ({err or type(err).__name__})")
