"""Turn results and states into numbered, encoded messages for the publishers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from streamd import wire
from streamd.messages import Result, Status
from streamd.models.spec import ModelSpec
from streamd.publish import Outgoing


class Announcer:
    """Encode each message once and hand it to every outlet.

    Each stream's results come from one thread at a time, so its numbers need no lock.
    """

    def __init__(self, format: wire.Format, outlets: Sequence[Callable[[Outgoing], None]]) -> None:
        """An outlet must not block."""
        self._format = format
        self._outlets = outlets
        self._specs: Mapping[str, ModelSpec] = {}
        self._next_seq: dict[str, int] = {}
        self.num_objects = 0

    def know(self, specs: Mapping[str, ModelSpec]) -> None:
        """Learn the models, by their names in the configuration, before the first result."""
        self._specs = specs

    @property
    def num_results(self) -> int:
        return sum(self._next_seq.values())

    def message(self, result: Result) -> wire.DetectionsMessage:
        """Number a result and describe it for the wire."""
        stream = result.frame.stream
        spec = self._specs[result.model]
        seq = self._next_seq.get(stream, 0)
        self._next_seq[stream] = seq + 1
        self.num_objects += len(result.detections)
        return wire.detections_message(result, seq, spec.labels, spec.weights_sha256)

    def result(self, result: Result) -> None:
        """Publish a result."""
        self._send(Outgoing(result.frame.stream, "detections", wire.encode(self.message(result), self._format)))

    def status(self, status: Status) -> None:
        """Publish a stream's state."""
        self._send(Outgoing(status.stream, "status", wire.encode(wire.status_message(status), self._format)))

    def _send(self, outgoing: Outgoing) -> None:
        for outlet in self._outlets:
            outlet(outgoing)
