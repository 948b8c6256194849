"""Cameras that misbehave on purpose, served over RTSP from a thread of the test.

    with CameraServer({"gate": Camera(clip), "yard": Camera(clip, login=Login("viewer", "p@ss"))}) as server:
        server.url("gate")                          # rtsp://127.0.0.1:PORT/gate, with a login where there is one
        server.set("gate", Camera(clip, delivery=Delivery(stop_after=0)))   # for open clients too: a pulled cable

`clip` is any file with H.264, H.265 or MJPEG that PyAV reads; nothing is encoded again, and it is played in real time
without end. What can go wrong stands in `tests.rtsp_faults`: `Camera` holds `Login`, `Answers`, `Delivery`, `Bitstream`
and `RtpClock`. Some faults as one writes them:

    Camera(clip, answers=Answers(status={"DESCRIBE": 453}))         refuse a method; 404, 500 likewise
    Camera(clip, answers=Answers(silent=frozenset({"*"})))          accept, and never answer
    Camera(clip, answers=Answers(raw={"DESCRIBE": b"RTSP/1.0 ..."}))  any bytes; {CSEQ} is replaced; b"" hangs up
    Camera(clip, answers=Answers(sdp=lambda right: right * 100))    any description
    Camera(clip, login=Login("u", "p", nonce_lasts=2))              the digest's nonce goes stale
    Camera(clip, delivery=Delivery(stop_after=30))                  RTP stops after 30 pictures, without FIN; 0: no RTP
    Camera(clip, delivery=Delivery(end_after=30, end="rst"))        fin, rst, bye, half_open
    Camera(clip, delivery=Delivery(loss=0.05, reorder=0.01, duplicate=0.01, jitter_s=0.2, seed=1))
    Camera(clip, bitstream=Bitstream(corrupt_every=10))             damaged slices; `then=other` changes the clip
    Camera(clip, clock=RtpClock(first_timestamp=2**32 - 90_000))    time stamps wrap after a second

A mount may be a list of cameras: the first connection gets the first one, the second the second, and so on; the last
stays. So H.264 that becomes H.265 on reconnect is `[Camera(h264, delivery=Delivery(end_after=50)), Camera(h265)]`.

On the server: `set`, `hang_up` (end open connections as `End` says), `refuse` and `accept` (the port is closed, and is
back), `events` (what happened when), `num_playing`. `tls=(cert, key)` adds RTSPS: `url("gate", tls=True)`.
`black_hole()` is a port where not even SYN is answered. One thread serves a hundred clients; as a process of its own:

    python -m tests.rtsp_server gate=clip.mp4 yard=other.mp4 --port 0

prints one line, {"port": 41235}, when it listens, and ends when its stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

from tests.rtsp_faults import Camera, End
from tests.rtsp_session import Event, Mount, Session

DEADLINE_S = 10.0
Cameras = Camera | Sequence[Camera]
T = TypeVar("T")


class CameraServer:
    """Serve cameras by their names; all methods are for the test's thread."""

    def __init__(
        self,
        cameras: Mapping[str, Cameras],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """`tls` is a certificate and its key, in PEM; RTSPS then has a port of its own."""
        self.host = host
        self.port = port  # taken at the start, and kept
        self.tls_port = 0
        self._tls = tls
        self._events: deque[Event] = deque(maxlen=100_000)
        self._mounts = {name: Mount(name, _several(cameras), self._events) for name, cameras in cameras.items()}
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self._sessions: set[Session] = set()
        self._udp = _udp_pair(host)
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)

    def __enter__(self) -> CameraServer:
        self._thread.start()
        try:
            self.accept()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._call(self._close)
        finally:
            self._end()

    def url(self, name: str, *, tls: bool = False) -> str:
        """Give the address of a camera, with user and password, percent-encoded, where there are some."""
        login = self._mounts[name].cameras[-1].login
        who = f"{quote(login.user, safe='')}:{quote(login.password, safe='')}@" if login else ""
        scheme, port = ("rtsps", self.tls_port) if tls else ("rtsp", self.port)
        return f"{scheme}://{who}{self.host}:{port}/{name}"

    def set(self, name: str, cameras: Cameras) -> None:
        """Change a camera, or add one. Open clients have the (first) new one from their next picture on."""

        def change() -> None:
            if name in self._mounts:
                self._mounts[name].change(_several(cameras))
            else:
                self._mounts[name] = Mount(name, _several(cameras), self._events)

        self._call(change)

    def hang_up(self, name: str | None = None, end: End = "rst") -> None:
        """End the open connections of one camera, or of all."""

        def hang_up() -> None:
            for session in list(self._sessions):
                if name is None or session.name == name:
                    session.end(end)

        self._call(hang_up)

    def refuse(self) -> None:
        """Close the port; open connections stay, see `hang_up`."""
        self._call(self._stop_listening)

    def accept(self) -> None:
        """Open the port, the same one as before."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(DEADLINE_S)

    def events(self, name: str | None = None, what: str | None = None) -> list[Event]:
        """Tell what happened: connect, each method, each refusal's code, play, end; the last 100,000."""
        return [
            event
            for event in self._events.copy()
            if (name is None or event.mount == name) and (what is None or event.what == what)
        ]

    def num_playing(self, name: str | None = None) -> int:
        return self._call(
            lambda: sum(session.is_playing for session in self._sessions if name is None or session.name == name)
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _call(self, function: Callable[[], T]) -> T:
        """Run in the server's thread."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(DEADLINE_S)

    async def _listen(self) -> None:
        if self._servers:
            return
        plain = await self._loop.create_server(self._session, self.host, self.port, reuse_address=True, backlog=512)
        self._servers.append(plain)
        self.port = plain.sockets[0].getsockname()[1]
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
            secure = await self._loop.create_server(self._session, self.host, self.tls_port, ssl=context)
            self._servers.append(secure)
            self.tls_port = secure.sockets[0].getsockname()[1]

    def _session(self) -> Session:
        return Session(self._mounts, self._sessions, self._udp, self._events)

    def _stop_listening(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    def _close(self) -> None:
        self._stop_listening()
        for session in list(self._sessions):
            session.end("rst")

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        for udp in self._udp:
            udp.close()


def _several(cameras: Cameras) -> tuple[Camera, ...]:
    return (cameras,) if isinstance(cameras, Camera) else tuple(cameras)


def _udp_pair(host: str) -> tuple[socket.socket, socket.socket]:
    """Bind RTP's port and RTCP's, which is the next one."""
    for _ in range(100):
        rtp, rtcp = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        rtp.bind((host, 0))
        port = rtp.getsockname()[1]
        with suppress(OSError, OverflowError):
            rtcp.bind((host, port + 1))
            rtp.setblocking(False)
            rtcp.setblocking(False)
            rtp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            return rtp, rtcp
        rtp.close()
        rtcp.close()
    raise RuntimeError("no two ports beside each other are free")


@contextmanager
def black_hole(host: str = "127.0.0.1") -> Iterator[int]:
    """Give a port where connecting never ends: Linux drops each SYN while the queue of a listener is full."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        waiting: list[socket.socket] = []
        try:
            for _ in range(4):
                client = socket.socket()
                waiting.append(client)
                client.setblocking(False)
                client.connect_ex((host, port))
            yield port
        finally:
            for client in waiting:
                client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve clips as well-behaved cameras, until stdin ends.")
    parser.add_argument("cameras", nargs="+", metavar="NAME=CLIP")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    mounts = dict(one.split("=", 1) for one in asked.cameras)
    cameras = {name: Camera(Path(clip)) for name, clip in mounts.items()}
    with CameraServer(cameras, host=asked.host, port=asked.port) as server:
        print(json.dumps({"port": server.port}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
