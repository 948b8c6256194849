"""What every decoder does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from streamd.messages import Frame, Packet


class Decoder(Protocol):
    """Packets in, frames out, in order of presentation. Used by one thread."""

    @property
    def description(self) -> str:
        """Say for the status topic which decoder is at work and why; it changes where another one takes over."""
        ...

    def decode(self, packet: Packet) -> Iterator[Frame]:
        """Yield the frames that this packet completes; never raises for damaged data, but marks it."""
        ...

    def flush(self) -> Iterator[Frame]:
        """Yield what is still held back, at the end of a file."""
        ...

    def close(self) -> None:
        """Give up the decoder's memory."""
        ...
