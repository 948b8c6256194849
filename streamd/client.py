"""Subscribe to what a daemon publishes.

    from streamd.client import subscribe

    for message in subscribe("tcp://127.0.0.1:5555", stream="gate"):
        print(message.seq, [found.label for found in message.objects])

Imports neither torch nor av, and zmq or redis only when its URL asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, cast, overload

from streamd import wire
from streamd.curve import ClientKeys
from streamd.errors import SubscribeError
from streamd.feeds import Feed
from streamd.redact import redact
from streamd.wire import DetectionsMessage, Kind, Message, StatusMessage

M = TypeVar("M", bound=Message, covariant=True)


class GapCounter:
    """Count by stream the detections messages that were published and did not arrive here, by the jumps of seq."""

    def __init__(self) -> None:
        self.num_missed: dict[str, int] = {}
        self._last_seqs: dict[str, int] = {}

    def add(self, message: DetectionsMessage) -> None:
        """Take note of a message; one of lower seq is from a daemon that started anew, not a gap."""
        last = self._last_seqs.get(message.stream, message.seq - 1)
        self._last_seqs[message.stream] = message.seq
        missed = max(0, message.seq - last - 1)
        self.num_missed[message.stream] = self.num_missed.get(message.stream, 0) + missed


class Subscription(Iterator[M]):
    """Typed messages from one daemon, for one thread. Leave its `with` block, or `close` it, to disconnect."""

    def __init__(self, feed: Feed, where: str, timeout_s: float | None) -> None:
        self._feed = feed
        self._where = where
        self._timeout_s = timeout_s
        self._gaps = GapCounter()
        self._last_ids: dict[str, str] = {}

    @property
    def num_missed(self) -> Mapping[str, int]:
        """By stream: detections messages that were published and did not arrive here, by the jumps of seq."""
        return self._gaps.num_missed

    @property
    def last_ids(self) -> Mapping[str, str]:
        """By stream: the Redis Stream's id of the last message, to go on from with `since`."""
        return self._last_ids

    def receive(self, timeout_s: float) -> M | None:
        """Return the next message, or None when none came within `timeout_s`.

        Raises WireError on a payload that is no message and SubscribeError when Redis refuses; the next call goes on.
        """
        received = self._feed.receive(timeout_s)
        if received is None:
            return None
        if received.entry_id is not None:
            self._last_ids[received.stream] = received.entry_id
        message = wire.decode(received.payload, received.kind)
        if isinstance(message, DetectionsMessage):
            self._gaps.add(message)
        return cast(M, message)

    def close(self) -> None:
        self._feed.close()

    def __next__(self) -> M:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            remaining_s = 1.0 if deadline is None else deadline - time.monotonic()
            message = self.receive(max(0.0, min(remaining_s, 1.0)))
            if message is not None:
                return message
            if deadline is not None and time.monotonic() >= deadline:
                raise SubscribeError(
                    f"no message from {self._where} for {self._timeout_s:g} s; "
                    "is the daemon running, does it publish there, and is the stream's name right?"
                )

    def __enter__(self) -> Subscription[M]:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@overload
def subscribe(
    url: str,
    stream: str | None = None,
    kinds: tuple[Literal["detections"]] = ("detections",),
    timeout_s: float | None = None,
    since: str | None = None,
    keys: ClientKeys | None = None,
) -> Subscription[DetectionsMessage]: ...
@overload
def subscribe(
    url: str,
    stream: str | None,
    kinds: tuple[Literal["status"]],
    timeout_s: float | None = None,
    since: str | None = None,
    keys: ClientKeys | None = None,
) -> Subscription[StatusMessage]: ...
@overload
def subscribe(
    url: str,
    stream: str | None = None,
    *,
    kinds: Sequence[Kind],
    timeout_s: float | None = None,
    since: str | None = None,
    keys: ClientKeys | None = None,
) -> Subscription[Message]: ...
def subscribe(
    url: str,
    stream: str | None = None,
    kinds: Sequence[Kind] = ("detections",),
    timeout_s: float | None = None,
    since: str | None = None,
    keys: ClientKeys | None = None,
) -> Subscription[Any]:
    """Subscribe to one stream, or to all, of the daemon that publishes on `url`.

    `url` is tcp://HOST:PORT or ipc://PATH for ZeroMQ, redis://, rediss:// or unix:// for Redis, redis+sentinel:// and
    redis+cluster:// as docs/delivery.md says. With `since`, "0" or the id of an entry, the Redis Streams are read from
    there on instead of pub/sub, so that nothing is missed that Redis still keeps. A lost connection is made again.
    `timeout_s` bounds the wait for each message of the iteration. `keys` are for a ZeroMQ daemon that wants some:
    `ClientKeys.read("server.public", "dashboard.secret")`.

    Raises SubscribeError: a wrong URL, a Redis that is not there at the start or refuses the password, a time-out. A
    ZeroMQ daemon that refuses the keys shows in the first wait for a message.
    """
    unknown = [kind for kind in kinds if kind not in wire.KINDS]
    if unknown or not kinds:
        raise SubscribeError(f"cannot subscribe to kinds {list(kinds)}: choose from {', '.join(wire.KINDS)}")
    return Subscription(_open_feed(url, stream, kinds, since, keys), redact(url), timeout_s)


def _open_feed(url: str, stream: str | None, kinds: Sequence[Kind], since: str | None, keys: ClientKeys | None) -> Feed:
    scheme = url.partition("://")[0].lower()
    if keys is not None and scheme not in ("tcp", "ipc"):
        raise SubscribeError(
            f"cannot subscribe to {redact(url)} with these keys: they are for tcp:// and ipc:// (ZeroMQ)"
        )
    if scheme.partition("+")[0] in ("redis", "rediss", "unix"):
        from streamd.feeds.redis_server import open_channels, open_streams

        return open_channels(url, stream, kinds) if since is None else open_streams(url, stream, kinds, since)
    if scheme not in ("tcp", "ipc"):
        forms = "tcp://HOST:PORT or ipc://PATH (ZeroMQ), redis://HOST:PORT, rediss:// or unix:// (Redis)"
        raise SubscribeError(f"cannot subscribe to {redact(url)}: the URL must be {forms}")
    if since is not None:
        raise SubscribeError(f"cannot read {url} since {since!r}: ZeroMQ keeps nothing; use a Redis URL")
    from streamd.feeds.zeromq import ZeroMqFeed

    return ZeroMqFeed(url, stream, kinds, keys)
