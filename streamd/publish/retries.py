"""When to send again what Redis did not take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from streamd.backoff import Backoff


class Retries:
    """When each stream may be tried again, and when the store may, where it is away as a whole."""

    def __init__(self, backoff: Callable[[], Backoff], clock: Callable[[], float]) -> None:
        self._make_backoff = backoff
        self._clock = clock
        self._store = backoff()
        self._store_at = float("-inf")
        self._streams: dict[str, tuple[Backoff, float]] = {}  # those that were refused

    @property
    def is_waiting(self) -> bool:
        """Whether a stream that was refused waits for its next try."""
        return bool(self._streams)

    def failed(self, stream: str, is_away: bool) -> None:
        if is_away:
            self._store_at = self._clock() + self._store.next_delay_s()
            return
        backoff, _ = self._streams.get(stream) or (self._make_backoff(), 0.0)
        self._streams[stream] = backoff, self._clock() + backoff.next_delay_s()

    def succeeded(self, stream: str) -> None:
        self._store.reset()
        self._streams.pop(stream, None)

    def due(self, waiting: Iterable[str]) -> list[str]:
        now = self._clock()
        return [stream for stream in waiting if now >= self._at(stream)]

    def wait_s(self, waiting: Iterable[str]) -> float | None:
        """Return how long until one of these is due, None where there are none."""
        first = min((self._at(stream) for stream in waiting), default=None)
        return None if first is None else max(0.0, first - self._clock())

    def _at(self, stream: str) -> float:
        _, at = self._streams.get(stream, (None, float("-inf")))
        return max(self._store_at, at)
