"""What other programs say: subscribers, publishers, cameras, whoever asks over a socket."""

from __future__ import annotations

import atexit
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path

import msgspec
import zmq

from streamd import wire
from streamd.client import subscribe
from streamd.config_file import parse, with_stream
from streamd.control import ControlServer
from streamd.control_messages import AddRequest, Answer, AnswerError, Request, decode_answer, encode
from streamd.errors import SourceError, SubscribeError, WireError
from streamd.metrics.endpoint import Endpoint
from streamd.metrics.server import Page, PageServer
from streamd.sources import SourceOptions, Timeline, open_source
from streamd.sources.access_units import AccessUnits
from tests.fuzz.target import Target, folder
from tests.wire_samples import make_message, outgoing_status

WITHIN_S = 20.0
MAX_PACKETS = 64


def wire_payload(content: bytes) -> None:
    """Decode a payload as both kinds, and all that is in it."""
    for kind in wire.KINDS:
        with suppress(WireError):
            message = wire.decode(content, kind)
            if isinstance(message, wire.DetectionsMessage):
                _use(message)


def _use(message: wire.DetectionsMessage) -> None:
    masks = [found.mask for found in message.objects] + [segment.mask for segment in message.segments or ()]
    charts = [found.densepose for found in message.objects]
    attempts: list[Callable[[], object]] = [one.decode for one in (*masks, *charts) if one is not None]
    attempts += [message.segment_map, message.to_supervision, lambda: message.captured_at_s]
    for attempt in attempts:
        with suppress(WireError):
            attempt()


def run_lengths(content: bytes) -> None:
    """Decode a mask; the first bytes are its size."""
    sides = content[:8].ljust(8, b"\0")
    size = int.from_bytes(sides[:4], "little", signed=True), int.from_bytes(sides[4:], "little", signed=True)
    with suppress(WireError):
        mask = wire.Mask(size=size, counts=content[8:].decode("latin1")).decode()
        assert mask.shape == size


class ControlPeer:
    """A control server whose daemon adds every stream that it is asked for."""

    def __init__(self) -> None:
        self.path = folder() / "control.sock"
        self.crashes: list[Exception] = []
        models = "models: {people: {path: yolox_s}}\nstreams: {gate: {url: 'rtsp://127.0.0.1/a'}}\n"
        self._config = parse(models, Path("streamd.yaml"))
        self._server = ControlServer(self.path, self._handle, self.crashes.append)
        self._server.start()
        threading.Thread(target=self._stop_at_the_end, daemon=True).start()

    def _stop_at_the_end(self) -> None:
        """Let the process end: it waits for the server's thread, and only then calls what `atexit` knows."""
        threading.main_thread().join()
        self._server.stop()

    def _handle(self, request: Request) -> Answer:
        if isinstance(request, AddRequest):
            with_stream(self._config, request.name, request.settings)
        return Answer(done="asked")


_control = cache(ControlPeer)


def control_request(content: bytes) -> None:
    peer = _control()
    for line in _said_to(str(peer.path), content).splitlines():
        decode_answer(line)  # the daemon says nothing else
    assert not peer.crashes, peer.crashes


def control_answer(content: bytes) -> None:
    with suppress(AnswerError):
        decode_answer(content)


@cache
def _pages() -> PageServer:
    server = PageServer(Endpoint("127.0.0.1", 0), {"/metrics": lambda: Page(HTTPStatus.OK, b"up 1\n")})
    server.start()
    atexit.register(server.close)
    return server


def http_request(content: bytes) -> None:
    endpoint = _pages().endpoint
    _said_to((endpoint.host, endpoint.port), content)
    answer = _said_to((endpoint.host, endpoint.port), b"GET /metrics HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"up 1\n"), "the server has ended"


def _said_to(address: str | tuple[str, int], content: bytes) -> bytes:
    """Send bytes and the end of all bytes; return what comes back, which must end in time."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(WITHIN_S)
        client.connect(address)
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):
            while more := client.recv(65536):
                answer += more
        return answer


class ZeroMqPeer:
    """A publisher that sends what it likes, and the client that reads it."""

    def __init__(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publisher = context.socket(zmq.XPUB)
        self._publisher.setsockopt(zmq.LINGER, 0)
        url = f"ipc://{folder()}/zmq"
        self._publisher.bind(url)
        self._subscription = subscribe(url, kinds=("detections", "status"))
        assert self._publisher.poll(int(WITHIN_S * 1000)), "the client does not subscribe"
        self._publisher.recv_multipart()
        atexit.register(self._close)

    def _close(self) -> None:
        self._subscription.close()
        self._publisher.close()

    def publish(self, frames: Sequence[bytes]) -> None:
        sound = [b"streamd/end/status", STATUS]
        for one in (frames, sound):
            self._publisher.send_multipart(one)
        while True:
            with suppress(WireError):
                message = self._subscription.receive(WITHIN_S)
                assert message is not None, "the client has stopped reading"
                if isinstance(message, wire.StatusMessage):
                    return


_zeromq = cache(ZeroMqPeer)


def zeromq_message(content: bytes) -> None:
    topic, _, rest = content.partition(b"\n")
    _zeromq().publish([b"streamd/" + topic, *rest.split(b"\n--\n")])


class Listener:
    """Take connections one by one, and let `serve` say to each what it likes."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="fuzz peer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            connection.settimeout(WITHIN_S)
            with connection, suppress(OSError):
                self._serve(connection)


class RedisPeer:
    """A server that answers what is read from it with the bytes of the moment."""

    def __init__(self) -> None:
        self.content = b""
        self.port = Listener(self._serve).port

    def _serve(self, connection: socket.socket) -> None:
        while request := connection.recv(65536):
            words = request.upper()
            if b"XREAD" in words or b"SUBSCRIBE" in words:
                connection.sendall(self.content)
                return
            commands = sum(words.count(name) for name in (b"\r\nPING\r\n", b"\r\nCLIENT\r\n", b"\r\nSELECT\r\n"))
            hello = b"%1\r\n$5\r\nproto\r\n:3\r\n" * words.count(b"\r\nHELLO\r\n")
            connection.sendall(hello + b"+OK\r\n" * commands)


_redis = cache(RedisPeer)


def redis_reply(content: bytes) -> None:
    """Let the reply to a subscription, or to XREAD, be the bytes."""
    peer = _redis()
    peer.content = content[1:]
    since = "0" if content[:1] > b"\x7f" else None
    with suppress(SubscribeError, WireError), ExitStack() as stack:
        url = f"redis://127.0.0.1:{peer.port}"
        subscription = subscribe(url, "gate", kinds=("detections", "status"), since=since)
        stack.callback(subscription.close)
        for _ in range(3):
            subscription.receive(0.02)


class Camera:
    """An RTSP server: the sound parts of its answers are made here, the rest is given."""

    SDP = (
        b"v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
        b"a=fmtp:96 packetization-mode=1;sprop-parameter-sets=Z0LAHtkDxWhAAAADAEAAAAwDxYuS,aMuMsg==\r\na=control:v\r\n"
    )

    def __init__(self) -> None:
        self.sdp = self.answer = self.media = b""
        self.port = Listener(self._serve).port

    def _serve(self, connection: socket.socket) -> None:
        reader = connection.makefile("rb")
        while True:
            lines = []
            while (line := reader.readline(65536)) not in (b"\r\n", b""):
                lines.append(line)
            if not lines:
                return
            number = next((line for line in lines if line.lower().startswith(b"cseq")), b"CSeq: 1\r\n")
            method = lines[0].split(b" ")[0]
            head = b"RTSP/1.0 200 OK\r\n" + number + b"Session: 1\r\n"
            if method == b"DESCRIBE":
                length = b"Content-Type: application/sdp\r\nContent-Length: %d\r\n\r\n" % len(self.sdp)
                connection.sendall(self.answer.replace(b"CSEQ\r\n", number) or head + length + self.sdp)
            elif method == b"SETUP":
                transport = b"Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n"
                connection.sendall(head + transport)
            elif method == b"PLAY":
                connection.sendall(head + b"\r\n" + self.media)
                return
            else:
                connection.sendall(head + b"Public: DESCRIBE, SETUP, PLAY\r\n\r\n")


_camera = cache(Camera)


def _watch(camera: Camera) -> None:
    options = SourceOptions(f"rtsp://127.0.0.1:{camera.port}/a", open_timeout_s=0.4, read_timeout_s=0.4)
    with suppress(SourceError), ExitStack() as stack:
        source = open_source(options, Timeline())
        stack.callback(source.close)
        for _, packet in zip(range(MAX_PACKETS), source.packets(), strict=False):
            with suppress(OSError, ValueError):  # what decoders report as damage; see decode/software.py
                source.video.codec_context.decode(packet.data)


def rtsp_sdp(content: bytes) -> None:
    camera = _camera()
    camera.sdp, camera.answer, camera.media = content, b"", MEDIA
    _watch(camera)


def rtsp_answer(content: bytes) -> None:
    camera = _camera()
    camera.sdp, camera.answer, camera.media = camera.SDP, content, MEDIA
    _watch(camera)


def rtsp_media(content: bytes) -> None:
    camera = _camera()
    camera.sdp, camera.answer, camera.media = camera.SDP, b"", content
    _watch(camera)


def access_units(content: bytes) -> None:
    """Join pieces, which are cut at a word; the last byte of each is its time."""
    for codec in ("h264", "hevc"):
        units = AccessUnits(codec)
        pieces = content.split(b"CUT")
        out = [unit for piece in pieces for unit in units.feed(piece, piece[-1] if piece else None)]
        assert sum(len(unit.data) for unit in out) <= len(content)


def _rtp(payload: bytes, number: int, time: int) -> bytes:
    packet = b"\x80\xe0" + number.to_bytes(2) + time.to_bytes(4) + bytes(4) + payload
    return b"$\0" + len(packet).to_bytes(2) + packet


MEDIA = b"".join(_rtp(bytes([0x65, 0x88, number]) + bytes(40), number, number * 3600) for number in range(8))
ANSWER = b"RTSP/1.0 200 OK\r\nCSEQ\r\nContent-Type: application/sdp\r\nContent-Length: %d\r\n\r\n%s"
FORMATS: tuple[wire.Format, ...] = ("json", "msgpack")
STATUS = outgoing_status().payload
DETECTIONS = [wire.encode(make_message(), form) for form in FORMATS]
RESP_STREAM = (
    b"*1\r\n*2\r\n$12\r\nstreamd:gate\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*4\r\n$2\r\nid\r\n$3\r\na-1\r\n"
    b"$4\r\nkind\r\n$6\r\nstatus\r\n"
)
RESP_CHANNEL = b"".join(
    b"*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:%d\r\n" % (len(name), name, number)
    for number, name in ((1, b"streamd:gate:detections"), (2, b"streamd:gate:status"))
)
REQUEST = encode(AddRequest(name="yard", settings={"url": "rtsp://127.0.0.1/b", "fps": 5}))

TARGETS = {
    "wire": Target(wire_payload, lambda: [*DETECTIONS, STATUS], (b"1e999", b"[[[[", b"\xcf", b"-1")),
    "run_lengths": Target(run_lengths, lambda: [b"\3\0\0\0\4\0\0\0" + b"35N"], (b"oooo", b"\xff\xff\xff\x7f")),
    "control_request": Target(control_request, lambda: [REQUEST, b'{"command": "status"}\n'], (b"[[", b"\n", b"1e999")),
    "control_answer": Target(control_answer, lambda: [msgspec.json.encode(Answer(done="x"))], (b"[[", b"1e999")),
    "http_request": Target(
        http_request, lambda: [b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"], (b"\r\n", b"HTTP/0.9", b"POST", b"%")
    ),
    "zeromq": Target(zeromq_message, lambda: [b"gate/detections\n" + one for one in DETECTIONS], (b"\n--\n", b"/")),
    "redis": Target(
        redis_reply,
        lambda: [b"\0" + RESP_CHANNEL, b"\xff" + RESP_STREAM],
        (
            b"\r\n",
            b"*-1",
            b"$-1",
            b"*2147483647\r\n",
            b"$999999999\r\n",
            b"%1\r\n",
            b"-ERR x\r\n",
            b">3\r\n",
            b":1\r\n",
        ),
    ),
    "rtsp_sdp": Target(
        rtsp_sdp,
        lambda: [Camera.SDP, Camera.SDP.replace(b"H264", b"H265"), Camera.SDP.replace(b"96 H264", b"26 JPEG")],
        (
            b"a=fmtp:96 ",
            b"m=video ",
            b"a=control:",
            b"a=range:npt=",
            b"a=rtpmap:",
            b"MP4V-ES",
            b"VP9",
            b"AV1",
            b"99999",
        ),
    ),
    "rtsp_answer": Target(
        rtsp_answer,
        lambda: [
            ANSWER % (len(Camera.SDP), Camera.SDP),
            b"RTSP/1.0 401 No\r\nCSEQ\r\nWWW-Authenticate: Digest a\r\n\r\n",
        ],
        (b"Content-Length: 2000000000\r\n", b"RTSP/1.0 302 Moved\r\nLocation: ", b"Content-Base: ", b"Session: "),
    ),
    "rtsp_media": Target(rtsp_media, lambda: [MEDIA], (b"$\0", b"$\1", b"\x7c\x85", b"\x78", b"\xff\xff")),
    "access_units": Target(
        access_units, lambda: [b"CUT".join([b"\0\0\0\1\x65ab", b"xyz", b"\0\0\0\1\x41cd"])], (b"CUT",)
    ),
}
