"""From a stream's URL to its frames: an open source with the decoder that was chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from streamd.config import StreamConfig
from streamd.decode import Decoder, Decoders, Wish
from streamd.messages import Frame
from streamd.redact import register_url
from streamd.sources import Source, SourceOptions, Timeline, Transport, open_source


class Connection:
    """An open source with its decoder, as a supervisor drives it."""

    def __init__(self, source: Source, decoder: Decoder, *, keyframes_only: bool = False) -> None:
        self._source = source
        self._decoder = decoder
        self._keyframes_only = keyframes_only
        self.num_packets = 0

    @property
    def decoder(self) -> str:
        """Which decoder is at work, and why; another one may take over."""
        return self._decoder.description

    def frames(self) -> Iterator[Frame | None]:
        """Yield each decoded frame, and None for a packet that completed none; begins at a key frame."""
        waiting = True
        for packet in self._source.packets():
            self.num_packets += 1
            waiting = not packet.keyframe and (waiting or self._keyframes_only)
            decoded = None
            if not waiting:
                for decoded in self._decoder.decode(packet):
                    yield decoded
            if decoded is None:
                yield None
        yield from self._decoder.flush()

    def close(self) -> None:
        self._decoder.close()
        self._source.close()


def connector(
    stream: str, config: StreamConfig, decoders: Decoders, timeline: Timeline | None = None
) -> Callable[[int], Connection]:
    """Make the function that connects a stream; its timeline lasts over all of its connections.

    Raises ConfigError where the wanted decoder cannot work here.
    """
    timeline = timeline or Timeline()
    register_url(config.url.get_secret_value())
    decoders.check(config.decoder)
    wish = Wish(config.decoder, config.is_file, config.max_latency_ms / 1e3, config.frames == "key")
    options = SourceOptions(
        url=config.url.get_secret_value(),
        transport=config.transport,
        open_timeout_s=config.open_timeout_s,
        read_timeout_s=config.read_timeout_s,
        tls_verify=config.tls_verify,
        ca_file=config.ca_file,
    )
    transport = Transport(stream, options)

    def connect(first_seq: int) -> Connection:
        source = open_source(options, timeline, transport)
        try:
            choice = decoders.choose(wish, source.video.codec_context.name)
            decoder = choice.make(stream, source.video, first_seq)
            return Connection(source, decoder, keyframes_only=wish.keyframes_only)
        except BaseException:
            source.close()
            raise

    return connect


class Connectors:
    """What the connections of all streams have in common. Used by one thread at a time."""

    def __init__(self) -> None:
        self._decoders: dict[torch.device, Decoders] = {}
        self._timelines: dict[str, Timeline] = {}  # by name, so that epochs go on where a stream comes back

    def decoders(self, device: torch.device) -> Decoders:
        """Return what decodes for this device, which is examined at the first time."""
        if device not in self._decoders:
            self._decoders[device] = Decoders(device)
        return self._decoders[device]

    def connector(self, stream: str, config: StreamConfig, device: torch.device) -> Callable[[int], Connection]:
        """Make the function that connects a new stream, or one anew. Raises ConfigError as `connector` does."""
        # One of its own, which counts on: a camera that hung when it was removed may still have the one before.
        before = self._timelines.get(stream)
        timeline = self._timelines[stream] = Timeline(before.epoch if before else -1)
        return connector(stream, config, self.decoders(device), timeline)

    def close(self) -> None:
        for decoders in self._decoders.values():
            decoders.close()
