"""Publish on Redis: pub/sub for who listens now, a Redis Stream for who comes later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from streamd.errors import PublishError
from streamd.publish import Outgoing
from streamd.redact import redact
from streamd.redis_connection import explain, make_client
from streamd.wire import channel, stream_key

REPLY_TIMEOUT_S = 2.0


class RedisSink:
    """Send each batch in one round trip: PUBLISH streamd:<stream>:<kind>, and XADD streamd:<stream>.

    Each Redis Stream keeps about `max_len` messages (XADD's MAXLEN ~). Nothing is sent on `open`: a Redis that starts
    after the daemon is found by the publisher's next try. A batch that Redis takes in part counts as failed, so pub/sub
    may repeat messages.
    """

    def __init__(self, url: str, pubsub: bool = True, streams: bool = True, max_len: int = 1000) -> None:
        self._url = url
        self._pubsub = pubsub
        self._streams = streams
        self._max_len = max_len
        self._client: redis.Redis | None = None

    @property
    def name(self) -> str:
        return f"redis {redact(self._url)}"

    def open(self) -> None:
        if not (self._pubsub or self._streams):
            raise PublishError(f"{self.name}: neither pub/sub nor streams is switched on; switch on one of them")
        try:
            self._client = make_client(self._url, REPLY_TIMEOUT_S)
        except ValueError as err:
            raise PublishError(f"cannot publish on {redact(self._url)}: {err}") from err

    def ping(self) -> None:
        assert self._client is not None, "open() comes first"
        try:
            self._client.ping()
        except redis.RedisError as err:
            raise PublishError(self._explain(err)) from err

    def send(self, messages: Sequence[Outgoing]) -> None:
        assert self._client is not None, "open() comes first"
        pipeline = self._client.pipeline(transaction=False)
        for message in messages:
            if self._pubsub:
                pipeline.publish(channel(message.stream, message.kind), message.payload)
            if self._streams:
                fields: dict[Any, Any] = {"kind": message.kind, "payload": message.payload}
                pipeline.xadd(stream_key(message.stream), fields, maxlen=self._max_len, approximate=True)
        try:
            replies = pipeline.execute(raise_on_error=False)  # raised by redis-py, the error would quote the payload
        except redis.RedisError as err:
            raise PublishError(self._explain(err)) from err
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            raise PublishError(self._explain(refused)) from refused

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    def _explain(self, err: Exception) -> str:
        return f"cannot publish on {redact(self._url)}: {explain(err)}"
