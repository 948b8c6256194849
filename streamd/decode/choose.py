"""The decoders' protocol, and which one a stream gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import av

from streamd.decode.software import SoftwareDecoder
from streamd.errors import ConfigError
from streamd.messages import Frame, Packet

Wanted = Literal["auto", "dali", "nvdec", "software"]


class Decoder(Protocol):
    """Packets in, frames out, in order of presentation. Used by one thread."""

    def decode(self, packet: Packet) -> Iterator[Frame]:
        """Yield the frames that this packet completes; never raises for damaged data, but marks it."""
        ...

    def flush(self) -> Iterator[Frame]:
        """Yield what is still held back, at the end of a file."""
        ...

    def close(self) -> None:
        """Give up the decoder's memory."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A decoder and, for the status topic, why it was chosen."""

    name: str
    reason: str
    make: Callable[[str, av.VideoStream, int], Decoder]  # (stream name, its video stream, first seq)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_decoder(wanted: Wanted) -> Choice:
    """Pick the decoder of a stream. Raises ConfigError where the wanted one cannot work on this machine."""
    if wanted == "software":
        return Choice("software", "asked for", SoftwareDecoder)
    if wanted == "auto":
        return Choice("software", "auto: this version decodes on the CPU only", SoftwareDecoder)
    raise ConfigError(f"decoder '{wanted}' needs a GPU, and this version decodes on the CPU only; use auto or software")
