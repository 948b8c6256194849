"""One client of `tests.rtsp_server`: its RTSP requests, and what it is sent. Runs in the server's event loop."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
import socket
import struct
import time
from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote, urlsplit

from tests.rtp_packets import media_lines, read_clip
from tests.rtsp_faults import Camera, End, Login
from tests.rtsp_player import Player, Track

REASONS = {
    200: "OK",
    301: "Moved Permanently",
    302: "Found",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    453: "Not Enough Bandwidth",
    454: "Session Not Found",
    455: "Method Not Valid in This State",
    461: "Unsupported Transport",
    501: "Not Implemented",
    503: "Service Unavailable",
}
METHODS = "OPTIONS, DESCRIBE, SETUP, PLAY, PAUSE, GET_PARAMETER, SET_PARAMETER, TEARDOWN"
REALM = "camera"
_DRIP_S = 0.05


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a client did, or that was done to it."""

    at_s: float  # monotonic clock
    mount: str  # "" before a request named one
    client: int  # counts the mount's connections
    what: str


class Mount:
    """A camera's name, what it is at present, and how often it was connected to."""

    def __init__(self, name: str, cameras: tuple[Camera, ...], events: deque[Event]) -> None:
        self.name = name
        self.cameras = cameras
        self.num_clients = 0
        self._first_client = 0  # of these cameras
        self._events = events

    def change(self, cameras: tuple[Camera, ...]) -> None:
        self.cameras, self._first_client = cameras, self.num_clients

    def camera(self, client: int) -> Camera:
        return self.cameras[min(max(0, client - self._first_client), len(self.cameras) - 1)]

    def note(self, client: int, what: str) -> None:
        self._events.append(Event(time.monotonic(), self.name, client, what))


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    url: str
    headers: Mapping[str, str]  # by names in lower case

    @property
    def path(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.url).path.split("/") if part]


class Session(asyncio.Protocol):
    """Answer a client's requests."""

    def __init__(
        self,
        mounts: Mapping[str, Mount],
        sessions: set[Session],
        udp: tuple[socket.socket, socket.socket],
        events: deque[Event],
    ) -> None:
        self._mounts = mounts
        self._sessions = sessions
        self._udp = udp
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._mount: Mount | None = None
        self._client = 0
        self._id = secrets.token_hex(8)
        self._nonce, self._nonce_uses = "", 0
        self._tracks: dict[int, Track] = {}  # by their numbers in the SDP
        self._player: Player | None = None
        self._last_request_s = self._loop.time()
        self._trickle = bytearray()
        self._is_half_open = False
        self.transport = cast(asyncio.Transport, None)

    @property
    def name(self) -> str:
        return self._mount.name if self._mount else ""

    @property
    def is_playing(self) -> bool:
        return self._player is not None

    @property
    def camera(self) -> Camera:
        assert self._mount is not None
        return self._mount.camera(self._client)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._sessions.add(self)
        self._events.append(Event(time.monotonic(), "", 0, "connect"))

    def connection_lost(self, _error: Exception | None) -> None:
        self._sessions.discard(self)
        self._stop_playing()
        self.note("end")

    def note(self, what: str) -> None:
        if self._mount:
            self._mount.note(self._client, what)

    def data_received(self, data: bytes) -> None:
        if self._is_half_open:
            self.end("rst")
            return
        self._received += data
        while self._received:
            if self._received[0] == 0x24:  # RTCP of the client
                end = 4 + int.from_bytes(self._received[2:4], "big")
                if len(self._received) < max(4, end):
                    return
            else:
                head = self._received.find(b"\r\n\r\n")
                if head < 0:
                    return
                request = _parsed(bytes(self._received[:head]))
                end = head + 4 + int(request.headers.get("content-length", 0))
                if len(self._received) < end:
                    return
                self._handle(request)
            del self._received[:end]

    def end(self, end: End) -> None:
        """End the connection."""
        player, name = self._player, end
        self._stop_playing()
        if name == "half_open":
            self._is_half_open = True
            return
        if name == "bye" and player:
            player.say_bye()
        if name == "rst":
            connection = self.transport.get_extra_info("socket")  # None where TLS has lost it and not said so yet
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def write(self, data: bytes | bytearray, bytes_per_s: float | None = None) -> None:
        """Send through TCP, at once or as a trickle."""
        if bytes_per_s and not self._trickle:
            self._loop.call_soon(self._drip, bytes_per_s)
        if bytes_per_s or self._trickle:
            self._trickle += data
        else:
            self.transport.write(data)

    @property
    def num_waiting_bytes(self) -> int:
        return len(self._trickle) + self.transport.get_write_buffer_size()

    def _drip(self, bytes_per_s: float) -> None:
        if self.transport.is_closing() or self._is_half_open:
            return
        share = max(1, round(bytes_per_s * _DRIP_S))
        self.transport.write(bytes(self._trickle[:share]))
        del self._trickle[:share]
        if self._trickle:
            self._loop.call_later(max(_DRIP_S, 1 / bytes_per_s), self._drip, bytes_per_s)

    def _handle(self, request: Request) -> None:
        self._last_request_s = self._loop.time()
        if self._mount is None:
            mount = self._mounts.get(request.path[0]) if request.path else None
            if mount is None:
                self._answer(request, 404 if request.path else 200)
                return
            self._mount, self._client = mount, mount.num_clients
            mount.num_clients += 1
            self.note("connect")
        self.note(request.method)
        answers = self.camera.answers
        if answers.silent & {request.method, "*"}:
            return
        raw = answers.raw.get(request.method, answers.raw.get("*"))
        if raw is not None:
            self._send_raw(raw, request)
            return
        status = answers.status.get(request.method, answers.status.get("*"))
        if status is not None:
            self._answer(request, status)
        elif self._is_let_in(request):
            self._serve(request)

    def _send_raw(self, raw: bytes, request: Request) -> None:
        if raw:
            cseq = request.headers.get("cseq", "0").encode()
            self.write(raw.replace(b"{CSEQ}", cseq), self.camera.answers.bytes_per_s)
        else:
            self.end("fin")

    def _serve(self, request: Request) -> None:
        match request.method:
            case "OPTIONS":
                self._answer(request, 200, {"Public": METHODS})
            case "DESCRIBE":
                self._describe(request)
            case "SETUP":
                self._set_up(request)
            case "PLAY":
                self._play(request)
            case "PAUSE":
                self._stop_playing()
                self._answer(request, 200, {"Session": self._id})
            case "GET_PARAMETER" | "SET_PARAMETER":
                self._answer(request, 200, {"Session": self._id})
            case "TEARDOWN":
                self._stop_playing()
                self._answer(request, 200, {"Session": self._id})
                self.transport.close()
            case _:
                self._answer(request, 501)

    def _answer(
        self, request: Request, status: int, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        if status != 200:
            self.note(str(status))
        lines = [f"RTSP/1.0 {status} {REASONS.get(status, 'Refused')}", f"CSeq: {request.headers.get('cseq', '0')}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        rate = self.camera.answers.bytes_per_s if self._mount else None
        self.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body, rate)

    def _is_let_in(self, request: Request) -> bool:
        """Check user and password; OPTIONS is free."""
        login = self.camera.login
        if login is None or request.method == "OPTIONS":
            return True
        given = request.headers.get("authorization", "")
        if login.scheme == "basic":
            if given == f"Basic {b64encode(f'{login.user}:{login.password}'.encode()).decode()}":
                return True
            self._answer(request, 401, {"WWW-Authenticate": f'Basic realm="{REALM}"'})
            return False
        is_stale = False
        if given.startswith("Digest ") and self._nonce:
            fields = dict(re.findall(r'(\w+)="?((?<==")[^"]*|[^",\s]+)', given))
            is_right = _digest(login, fields.get("nonce", ""), request.method, fields.get("uri", "")) == fields.get(
                "response"
            )
            is_fresh = fields.get("nonce") == self._nonce and (
                login.nonce_lasts is None or self._nonce_uses < login.nonce_lasts
            )
            self._nonce_uses += 1
            if is_right and is_fresh and fields.get("username") == login.user:
                return True
            is_stale = is_right
        self._nonce, self._nonce_uses = secrets.token_hex(16), 0
        stale = ", stale=true" if is_stale else ""
        self._answer(request, 401, {"WWW-Authenticate": f'Digest realm="{REALM}", nonce="{self._nonce}"{stale}'})
        return False

    def _describe(self, request: Request) -> None:
        answers = self.camera.answers
        if answers.redirect:
            self._answer(request, answers.redirect_status, {"Location": answers.redirect})
            return
        sdp = self._sdp()
        sdp = answers.sdp(sdp) if answers.sdp else sdp
        base = request.url.rstrip("/") + "/"
        self._answer(request, 200, {"Content-Base": base, "Content-Type": "application/sdp"}, sdp)

    def _sdp(self) -> bytes:
        """Describe the camera (RFC 4566)."""
        camera = self.camera
        clip = read_clip(camera.clip)
        fps = camera.bitstream.claimed_fps or clip.fps * camera.bitstream.speed
        in_sdp = camera.bitstream.parameter_sets != "band"
        lines = ["v=0", "o=- 1 1 IN IP4 127.0.0.1", f"s={self.name}", "c=IN IP4 0.0.0.0", "t=0 0", "a=control:*"]
        lines += [f"m=video 0 RTP/AVP {clip.payload_type}", *media_lines(clip, with_parameter_sets=in_sdp)]
        lines += [f"a=framerate:{fps:.3f}", "a=control:track0"]
        for number, kind in enumerate(camera.answers.tracks, start=1):
            if kind == "audio":
                lines += ["m=audio 0 RTP/AVP 0", "a=rtpmap:0 PCMU/8000"]
            else:
                lines += ["m=application 0 RTP/AVP 107", "a=rtpmap:107 vnd.onvif.metadata/90000"]
            lines.append(f"a=control:track{number}")
        return "\r\n".join([*lines, ""]).encode()

    def _set_up(self, request: Request) -> None:
        transport = request.headers.get("transport", "")
        last = request.path[-1]
        number = int(last.removeprefix("track")) if re.fullmatch(r"track\d+", last) else 0
        kinds = ("video", *self.camera.answers.tracks)
        if number >= len(kinds):
            self._answer(request, 404)
            return
        source = random.getrandbits(32)
        if found := re.search(r"interleaved=(\d+)-(\d+)", transport):
            rtp, rtcp = (min(255, int(channel)) for channel in found.groups())
            self._tracks[number] = Track(kinds[number], source, channels=(rtp, rtcp))
            agreed = f"RTP/AVP/TCP;unicast;interleaved={rtp}-{rtcp};ssrc={source:08X}"
        elif (found := re.search(r"client_port=(\d+)-(\d+)", transport)) and not self.camera.answers.udp_refused:
            host = self.transport.get_extra_info("peername")[0]
            rtp, rtcp = (udp.getsockname()[1] for udp in self._udp)
            self._tracks[number] = Track(kinds[number], source, ports=(host, int(found[1]), int(found[2])))
            agreed = f"RTP/AVP;unicast;client_port={found[1]}-{found[2]};server_port={rtp}-{rtcp};ssrc={source:08X}"
        else:
            self._answer(request, 461)
            return
        answers = self.camera.answers
        timeout = f";timeout={max(1, round(answers.session_timeout_s))}" if answers.announce_timeout else ""
        self._answer(request, 200, {"Transport": agreed, "Session": self._id + timeout})

    def _play(self, request: Request) -> None:
        if 0 not in self._tracks:
            self._answer(request, 455)
            return
        headers = {"Session": self._id, "Range": "npt=0.000-"}
        player = self._player or Player(self, self._tracks, self._udp)
        if self.camera.answers.rtp_info:
            url = f"{request.url.rstrip('/')}/track0"
            headers["RTP-Info"] = f"url={url};seq={player.sequence};rtptime={player.first_timestamp}"
        self._answer(request, 200, headers)
        if self._player is None:
            self._player = player
            self.note("play")
            player.start()
            self._watch_keep_alive()

    def _watch_keep_alive(self) -> None:
        """Drop a client that has asked nothing for too long."""
        if not self._player or self.transport.is_closing():
            return
        left_s = self._last_request_s + self.camera.answers.session_timeout_s - self._loop.time()
        if left_s <= 0:
            self.note("session timeout")
            self.end("fin")
        else:
            self._loop.call_later(min(left_s + 0.01, 1.0), self._watch_keep_alive)

    def _stop_playing(self) -> None:
        if self._player:
            self._player.stop()
            self._player = None


def _parsed(head: bytes) -> Request:
    first, *lines = head.decode("utf-8", "replace").split("\r\n")
    method, url = (*first.split(" "), "", "")[:2]
    pairs = (line.partition(":") for line in lines)
    return Request(method, url, {name.strip().lower(): value.strip() for name, _, value in pairs})


def _digest(login: Login, nonce: str, method: str, uri: str) -> str:
    """Compute what RFC 2069 asks for, as most cameras do."""

    def md5(text: str) -> str:
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()

    return md5(f"{md5(f'{login.user}:{REALM}:{login.password}')}:{nonce}:{md5(f'{method}:{uri}')}")
