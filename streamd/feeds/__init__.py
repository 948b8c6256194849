"""The ways into a subscriber: ZeroMQ, Redis pub/sub and Redis Streams, each in a module that imports its library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from streamd.wire import Kind


class Received(NamedTuple):
    """One payload as it came, with the stream and kind that its topic, channel or entry says."""

    stream: str
    kind: Kind
    payload: bytes
    entry_id: str | None = None  # of a Redis Stream


class Feed(Protocol):
    """Where a subscriber's payloads come from; for one thread."""

    def receive(self, timeout_s: float) -> Received | None:
        """Return the next payload, or None when none came in time."""

    def close(self) -> None:
        """Disconnect."""


def from_name(name: str, separator: str, payload: bytes, kinds: Sequence[Kind]) -> Received | None:
    """Read `streamd<separator>stream<separator>kind`; None where it is not of the kinds that are asked for."""
    stream, _, kind = name.removeprefix(f"streamd{separator}").rpartition(separator)
    wanted = next((known for known in kinds if known == kind), None)
    return None if wanted is None else Received(stream, wanted, payload)
