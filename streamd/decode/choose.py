"""Which decoder a stream gets, and what the decoders of one device share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import av
import torch

from streamd.decode import dali, nvdec
from streamd.decode.dali import DaliDecoder, GopMode
from streamd.decode.dali_service import DaliRunner, DaliService, Kind
from streamd.decode.decoder import Decoder
from streamd.decode.frames import Framer
from streamd.decode.nvdec import NvdecDecoder
from streamd.decode.probe import has_dali, probe_nvdec
from streamd.decode.software import SoftwareDecoder
from streamd.errors import ConfigError

Wanted = Literal["auto", "dali", "nvdec", "software"]
Name = Literal["dali", "nvdec", "software"]

_SHORTEST_GOP_S = 0.5  # cameras have no shorter groups, so that a smaller latency need not try


@dataclass(frozen=True, slots=True)
class Wish:
    """What a stream's configuration says about its decoder."""

    decoder: Wanted = "auto"
    is_file: bool = False
    max_latency_s: float = 0.2
    keyframes_only: bool = False  # nothing else will be given to the decoder


@dataclass(frozen=True, slots=True)
class Site:
    """What a device decodes by itself: nothing, on a CPU."""

    nvdec: frozenset[str] = frozenset()  # codecs
    dali: frozenset[str] = frozenset()
    missing: str = "no GPU"  # why there is no NVDEC, where there is none


@dataclass(frozen=True, slots=True)
class Choice:
    """A decoder and, for the status topic, why it was chosen."""

    name: Name
    reason: str
    make: Callable[[str, av.VideoStream, int], Decoder]  # (stream name, its video stream, first seq)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Decoders:
    """Choose and make the decoders of one device's streams. Safe to use from any thread.

    Close it after its decoders: it owns the threads that they share.
    """

    def __init__(self, device: torch.device, site: Site | None = None) -> None:
        self._device = device
        self._site = site or examine(device)
        self._lock = threading.Lock()
        self._services: dict[Kind, DaliService] = {}

    def check(self, wanted: Wanted) -> None:
        """Raise ConfigError where the wanted decoder cannot work on this device."""
        if wanted == "nvdec" and not self._site.nvdec:
            raise ConfigError(f"decoder 'nvdec' cannot work on {self._device}: {self._site.missing}; use auto")
        if wanted == "dali" and not self._site.dali:
            why = self._site.missing or "nvidia-dali-cuda130 is not installed"
            raise ConfigError(f"decoder 'dali' cannot work on {self._device}: {why}; use auto")

    def choose(self, wish: Wish, codec: str) -> Choice:
        """Pick the decoder of a connection, whose `codec` has FFmpeg's name."""
        name, reason = decide(wish, codec, self._site)

        def make(stream: str, video: av.VideoStream, first_seq: int) -> Decoder:
            framer = Framer(stream, video, first_seq)
            if name == "dali":
                return self._make_dali(wish, reason, framer, video)
            if name == "nvdec":
                return NvdecDecoder(framer, video, self._device, reason)
            return SoftwareDecoder(stream, video, reason=reason, framer=framer)

        return Choice(name, reason, make)

    def close(self) -> None:
        """End the shared threads."""
        with self._lock:
            services, self._services = self._services, {}
        for service in services.values():
            service.close()

    def _make_dali(self, wish: Wish, reason: str, framer: Framer, video: av.VideoStream) -> Decoder:
        mode = GopMode(
            is_live=not wish.is_file,
            max_gop_s=math.inf if wish.is_file else wish.max_latency_s,
            keyframes_only=wish.keyframes_only,
        )
        service = self._service("images" if video.codec_context.name == "mjpeg" else "videos")
        return DaliDecoder(framer, video, service, mode, partial(self._make_heir, video), reason)

    def _make_heir(self, video: av.VideoStream, framer: Framer, reason: str) -> Decoder:
        """Make what takes over where DALI gives a stream up."""
        if video.codec_context.name in self._site.nvdec & nvdec.CODECS:
            return NvdecDecoder(framer, video, self._device, reason)
        return SoftwareDecoder(framer.stream, video, reason=reason, framer=framer)

    def _service(self, kind: Kind) -> DaliService:
        with self._lock:
            if kind not in self._services:
                runner = DaliRunner(kind, self._device)
                self._services[kind] = DaliService(f"dali {kind} {self._device}", runner)
            return self._services[kind]


def examine(device: torch.device) -> Site:
    """Find out what a device decodes; a machine without driver or DALI is told, not an error."""
    if device.type != "cuda":
        return Site()
    found = probe_nvdec(device.index or 0)
    missing = "" if found.codecs else f"NVDEC: {found.missing or 'the GPU has none'}"
    # JPEG is decoded by units of its own, or by CUDA.
    by_dali = dali.CODECS & (found.codecs | {"mjpeg"}) if has_dali() else frozenset[str]()
    return Site(found.codecs, by_dali, missing)


def decide(wish: Wish, codec: str, site: Site) -> tuple[Name, str]:
    """Return the decoder's name and the reason for it."""
    by_nvdec = codec in site.nvdec & nvdec.CODECS
    by_dali = codec in site.dali
    match wish.decoder:
        case "software":
            return "software", "asked for"
        case "nvdec":
            return ("nvdec", "asked for") if by_nvdec else ("software", f"NVDEC does not decode {codec}")
        case "dali":
            return ("dali", "asked for") if by_dali else ("software", f"DALI does not decode {codec}")
    if by_dali:
        if codec == "mjpeg":
            return "dali", "MJPEG, batched with that of other streams"
        if wish.is_file:
            return "dali", "a file, which can be decoded in whole GOPs"
        if wish.keyframes_only:
            return "dali", "key frames only"
        if wish.max_latency_s >= _SHORTEST_GOP_S:
            return "dali", f"a latency of {wish.max_latency_s:g} s leaves time for whole GOPs"
    if by_nvdec:
        return "nvdec", "a camera whose latency leaves no time for whole GOPs" if site.dali else "DALI is not installed"
    return "software", site.missing or f"the GPU does not decode {codec}"
