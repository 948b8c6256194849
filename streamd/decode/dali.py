"""Decode whole groups of pictures, or single JPEGs, with DALI, together with those of other streams."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache

import av
import torch

from streamd.decode.dali_service import DaliService, Decoded
from streamd.decode.decoder import Decoder
from streamd.decode.frames import Framer
from streamd.decode.gop import Gop, GopError, GopSplitter
from streamd.decode.remux import Chunk, Remuxer
from streamd.decode.software import SoftwareDecoder
from streamd.messages import Frame, Packet

logger = logging.getLogger(__name__)

CODECS = frozenset({"h264", "hevc", "vp9", "mjpeg"})
_MAX_FAILURES = 3  # groups in a row, before another decoder takes over
_DEADLINE_S = 10.0  # for one group; a batch of the largest takes about a second
_MAX_CHUNK_BYTES = 1 << 30  # of decoded RGB: 172 frames of 1080p


@dataclass(frozen=True, slots=True)
class GopMode:
    """How a stream's groups are gathered, and how their frames leave."""

    is_live: bool = False  # frames leave one for each packet that comes: as the camera took them, a group later
    max_gop_s: float = math.inf  # a longer group would break the stream's latency
    keyframes_only: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A group on its way."""

    gop: Gop
    chunk: Chunk | None = None
    decoded: Future[Decoded] | None = None  # None: it was damaged, and the software can tell which frames that reached

    @property
    def is_done(self) -> bool:
        return self.decoded is None or self.decoded.done()


class DaliDecoder:
    """Decode one stream's groups of pictures; its frames are RGB.

    A group that DALI cannot decode is decoded in software; after several in a row an heir takes the stream over.
    """

    def __init__(
        self,
        framer: Framer,
        video: av.VideoStream,
        service: DaliService,
        mode: GopMode,
        make_heir: Callable[[Framer, str], Decoder],
        reason: str = "asked for",
    ) -> None:
        """`make_heir` gets the reason why DALI was given up."""
        codec = video.codec_context.name
        self._reason = reason
        self._framer = framer
        self._video = video
        self._service = service
        self._mode = mode
        self._make_heir = make_heir
        self._heir: Decoder | None = None
        self._splitter = GopSplitter(
            codec, video.codec_context.extradata, max_s=mode.max_gop_s, keyframes_only=mode.keyframes_only
        )
        self._remuxer = Remuxer(video)
        # A camera's single pictures are waited for at once. Files keep the service busy, and a live group is decoded
        # while the next one arrives.
        single = codec == "mjpeg" or mode.keyframes_only
        self._max_pending = (0 if mode.is_live else 8) if single else 2
        self._pending: deque[_Pending] = deque()
        self._ready: deque[Frame] = deque()
        self._len_gop = 1
        self._num_failures = 0
        self._given_up = ""

    @property
    def description(self) -> str:
        return self._heir.description if self._heir else f"dali: {self._reason}"

    def decode(self, packet: Packet) -> Iterator[Frame]:
        if self._heir is not None:
            yield from self._heir.decode(packet)
            return
        for gop in self._splitter.feed(packet):
            self._submit(gop)
        while self._pending and (self._pending[0].is_done or len(self._pending) > self._max_pending):
            self._collect()
        # Groups come in bursts, and a mailbox keeps but the newest frame: so a camera's leave at its own pace, and
        # faster where more wait than a group has.
        num_due = max(1, len(self._ready) - self._len_gop) if self._mode.is_live else len(self._ready)
        for _ in range(min(num_due, len(self._ready))):
            yield self._ready.popleft()
        if reason := self._given_up or self._splitter.excess:
            yield from self._bequeath(reason)

    def flush(self) -> Iterator[Frame]:
        for gop in self._splitter.flush():
            self._submit(gop)
        yield from self._drain()
        if self._heir is not None:
            yield from self._heir.flush()

    def close(self) -> None:
        """Give up what is on its way."""
        for pending in self._pending:
            if pending.decoded is not None:
                pending.decoded.cancel()
        self._remuxer.close()
        if self._heir is not None:
            self._heir.close()

    def _submit(self, gop: Gop) -> None:
        self._len_gop = len(gop.packets)
        if any(packet.corrupt for packet in gop.packets):
            self._pending.append(_Pending(gop))
            return
        try:
            chunk = self._remuxer.chunk(gop)
            if chunk.num_bytes > _MAX_CHUNK_BYTES:
                raise GopError(f"a GOP of {chunk.num_bytes >> 20} MiB decoded is too large")
            self._pending.append(_Pending(gop, chunk, self._service.submit(chunk.data, chunk.num_bytes)))
        except GopError as err:
            refused = Future[Decoded]()
            refused.set_exception(err)
            self._pending.append(_Pending(gop, None, refused))

    def _collect(self) -> None:
        """Wait for the oldest group, and make its frames."""
        pending = self._pending.popleft()
        if pending.decoded is None:
            self._ready.extend(self._in_software(pending.gop))
            return
        try:
            self._ready.extend(self._frames(pending.chunk, pending.decoded))
            self._num_failures = 0
        except GopError as err:
            self._note_failure(str(err))
            self._ready.extend(self._in_software(pending.gop))

    def _note_failure(self, reason: str) -> None:
        self._num_failures += 1
        if self._num_failures >= _MAX_FAILURES:
            self._given_up = self._given_up or f"DALI failed {self._num_failures} times in a row: {reason}"

    def _frames(self, chunk: Chunk | None, future: Future[Decoded]) -> list[Frame]:
        """Make the frames of a decoded chunk. Raises GopError."""
        try:
            decoded = future.result(_DEADLINE_S)
        except TimeoutError as err:
            self._given_up = f"DALI gave no answer within {_DEADLINE_S:g} s"
            raise GopError(self._given_up) from err
        assert chunk is not None, "a group without a chunk has only an error"
        rgb = decoded.frames
        if len(rgb) != len(chunk.packets):
            raise GopError(f"DALI made {len(rgb)} frames of {len(chunk.packets)} packets")
        planes = list(rgb)
        if self._video.codec_context.name != "mjpeg" and chunk.look.matrix == "bt709":
            try:
                planes = [as_bt709(plane) for plane in rgb]
            except torch.OutOfMemoryError as err:
                raise GopError("no memory is left on the GPU") from err
        ready = None
        if rgb.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.default_stream(rgb.device))
        return [
            self._framer.frame_of(packet, replace(chunk.look, planes=(plane,), ready=ready), decoded.ms_per_frame)
            for packet, plane in zip(chunk.packets, planes, strict=True)
        ]

    def _in_software(self, gop: Gop) -> Iterator[Frame]:
        software = SoftwareDecoder(self._framer.stream, self._video, framer=self._framer)
        for packet in gop.packets:
            yield from software.decode(packet)
        yield from software.flush()
        software.reset()

    def _bequeath(self, reason: str) -> Iterator[Frame]:
        """Let another decoder go on, from the group that was begun."""
        begun = self._splitter.take_open()
        yield from self._drain()
        self._heir = self._make_heir(self._framer, reason)
        logger.warning("%s: %s; goes on with %s", self._framer.stream, reason, self._heir.description.split(":")[0])
        for packet in begun:
            yield from self._heir.decode(packet)

    def _drain(self) -> Iterator[Frame]:
        while self._pending:
            self._collect()
        while self._ready:
            yield self._ready.popleft()


def as_bt709(rgb: torch.Tensor) -> torch.Tensor:
    """Convert RGB [H, W, 3] uint8 that was made with BT.601's matrix to what BT.709's makes of the same Y'CbCr.

    DALI 2.4 knows only BT.601, for limited and for full range (its color_space.cu). The ranges cancel out.
    """
    changed = rgb.reshape(-1, 3).float() @ _from_bt601(rgb.device)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(rgb.shape)


@cache
def _from_bt601(device: torch.device) -> torch.Tensor:
    """Return [3, 3] for row vectors: to Y'CbCr by BT.601, and back by BT.709."""
    matrix = torch.linalg.inv(_to_rgb(0.299, 0.114)).T @ _to_rgb(0.2126, 0.0722).T
    return matrix.to(device, torch.float32)


def _to_rgb(red: float, blue: float) -> torch.Tensor:
    """Return R'G'B' [3, 3] of Y'CbCr with the weights of red and blue in luma (ITU-R BT.709-6, 3.2 and 3.3)."""
    green = 1 - red - blue
    cb, cr = 2 * (1 - blue), 2 * (1 - red)
    return torch.tensor(
        [[1, 0, cr], [1, -cb * blue / green, -cr * red / green], [1, cb, 0]],
        dtype=torch.float64,
    )
