"""The cameras that misbehave: what they send when all is well, and what goes wrong, as a plain client sees it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import av
import av.error
import numpy as np
import pytest
from av.container import InputContainer
from av.video.stream import VideoStream

from tests.certificates import self_signed
from tests.clips import write_clip, write_mjpeg
from tests.rtsp_faults import Answers, Bitstream, Camera, Delivery, RtpClock
from tests.rtsp_server import Cameras, CameraServer, black_hole

SIZE = (320, 240)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "h264": write_clip(folder / "h264.mp4", 20, size=SIZE, fps=50),
        "b_frames": write_clip(folder / "b_frames.mp4", 20, size=SIZE, fps=50, gop=10, b_frames=2),
        "hevc": write_clip(folder / "hevc.mp4", 20, size=SIZE, fps=50, codec="libx265"),
        "mjpeg": write_mjpeg(folder / "mjpeg.mkv", 20, size=SIZE, fps=50),
    }


@contextmanager
def connect(url: str, transport: str = "tcp", timeout_s: float = 3.0) -> Iterator[InputContainer]:
    options = {"rtsp_transport": transport, "probesize": "32", "allowed_media_types": "video"}
    with av.open(url, options=options, timeout=timeout_s) as container:
        yield container


@contextmanager
def watching(cameras: Cameras, transport: str = "tcp", timeout_s: float = 3.0) -> Iterator[InputContainer]:
    with CameraServer({"gate": cameras}) as server, connect(server.url("gate"), transport, timeout_s) as container:
        yield container


def planes(path: Path, count: int) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray() for frame in islice(file.decode(video=0), count)]


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("kind", ["h264", "b_frames", "hevc", "mjpeg"])
def test_a_client_gets_the_pictures_of_the_clip_in_real_time(clips: dict[str, Path], kind: str, transport: str) -> None:
    with watching(Camera(clips[kind]), transport) as camera:
        began_s = time.monotonic()
        received = [frame.to_ndarray() for frame in islice(camera.decode(video=0), 18)]
        took_s = time.monotonic() - began_s
    for index, (got, wanted) in enumerate(zip(received, planes(clips[kind], 18), strict=True)):
        assert np.array_equal(got, wanted), f"frame {index} is not the clip's"
    assert took_s > 0.25, "eighteen pictures at 50 a second were not sent in time, but at once"


def read(container: InputContainer, count: int) -> list[av.Packet[VideoStream]]:
    """Read access units; the first has no time in FFmpeg."""
    return [packet for packet in islice(container.demux(video=0), count) if packet.size]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (Answers(status={"DESCRIBE": 404}), av.error.HTTPNotFoundError),
        (Answers(status={"SETUP": 453}), av.error.HTTPOtherClientError),
        (Answers(status={"*": 500}), av.error.HTTPServerError),
        (Answers(udp_refused=True), av.error.OSError),
        (Answers(raw={"DESCRIBE": b"\xff\x00"}), av.error.InvalidDataError),
        (Answers(sdp=lambda right: b""), av.error.InvalidDataError),
        (Answers(silent=frozenset({"*"})), av.error.InvalidDataError),
    ],
)
def test_an_answer_is_refused_replaced_or_withheld(
    clips: dict[str, Path], answers: Answers, error: type[Exception]
) -> None:
    with pytest.raises(error), watching(Camera(clips["h264"], answers=answers), "udp", timeout_s=0.5):
        pass


def test_each_connection_has_its_camera_and_a_change_reaches_open_ones(clips: dict[str, Path]) -> None:
    cameras = [Camera(clips["h264"], delivery=Delivery(end_after=5)), Camera(clips["hevc"])]
    with CameraServer({"gate": cameras}) as server:
        with connect(server.url("gate")) as first:
            assert first.streams.video[0].codec_context.name == "h264"
            assert 4 <= len(list(first.demux(video=0))) <= 6, "it ends after five pictures"
        with connect(server.url("gate")) as second:
            assert second.streams.video[0].codec_context.name == "hevc"
            read(second, 3)
            assert server.num_playing() == 1
            server.set("gate", Camera(clips["hevc"], delivery=Delivery(stop_after=0)))
            with pytest.raises(av.error.ExitError):
                read(second, 1000)
        server.refuse()
        with pytest.raises(av.error.ConnectionRefusedError), connect(server.url("gate")):
            pass
        server.accept()
        server.set("gate", Camera(clips["h264"]))
        with connect(server.url("gate")) as third:
            read(third, 3)
            server.hang_up("gate", "rst")
            with suppress(av.error.ConnectionResetError):  # or, for FFmpeg, the end
                assert len(read(third, 1000)) < 100
        assert server.num_playing() == 0
        assert len(server.events("gate", "play")) == 3


def test_a_half_open_connection_is_silent_until_the_client_speaks(clips: dict[str, Path]) -> None:
    camera = Camera(clips["h264"], delivery=Delivery(end_after=3, end="half_open"))
    with CameraServer({"gate": camera}) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(3)
        for request in ("SETUP", "PLAY"):
            transport = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1"
            client.sendall(f"{request} {server.url('gate')} RTSP/1.0\r\nCSeq: 1\r\n{transport}\r\n\r\n".encode())
            assert client.recv(100)
        with pytest.raises(TimeoutError):
            while True:
                assert client.recv(1 << 16), "a peer that lost its memory sends no FIN"
        client.sendall(b"OPTIONS * RTSP/1.0\r\nCSeq: 2\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            client.recv(100)


def test_a_client_whose_tls_is_lost_can_still_be_hung_up_on(clips: dict[str, Path], tmp_path: Path) -> None:
    """Between TLS losing the connection and the session hearing of it there is no socket to be reset any more."""
    with CameraServer({"gate": Camera(clips["h264"])}, tls=self_signed(tmp_path)) as server:
        trusting = ssl._create_unverified_context()
        with socket.create_connection((server.host, server.tls_port)) as plain, trusting.wrap_socket(plain):

            async def lose_and_hang_up() -> None:
                (session,) = server._sessions
                session.transport.abort()
                while session.transport.get_extra_info("socket") is not None:
                    await asyncio.sleep(0)
                assert session in server._sessions, "the session has not heard of it"
                session.end("rst")

            asyncio.run_coroutine_threadsafe(lose_and_hang_up(), server._loop).result(10)


def test_the_thread_ends_where_hanging_up_fails(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server = CameraServer({"gate": Camera(clips["h264"])})

    def fail() -> None:
        server._stop_listening()
        raise RuntimeError("no")

    monkeypatch.setattr(server, "_close", fail)
    with pytest.raises(RuntimeError), server:
        pass
    assert not server._thread.is_alive()


def test_a_black_hole_does_not_even_connect() -> None:
    with black_hole() as port, socket.socket() as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.connect(("127.0.0.1", port))


def test_a_client_that_does_not_keep_its_session_alive_is_dropped(clips: dict[str, Path]) -> None:
    camera = Camera(clips["h264"], answers=Answers(session_timeout_s=0.5, announce_timeout=False))
    with CameraServer({"gate": camera}) as server, connect(server.url("gate")) as container:
        assert 15 <= len(read(container, 100)) <= 60, "half a second of fifty pictures a second"
        assert server.events("gate", "session timeout")


def times_of(clip: Path, clock: RtpClock, count: int = 12) -> list[int]:
    with watching(Camera(clip, clock=clock)) as container:
        return [packet.pts for packet in read(container, count) if packet.pts is not None]


def test_time_stamps_are_the_clip_s_or_as_told(clips: dict[str, Path]) -> None:
    tick = 90_000 // 50
    right = times_of(clips["h264"], RtpClock())
    assert set(np.diff(right)) == {tick}
    assert set(np.diff(times_of(clips["h264"], RtpClock(first_timestamp=2**32 - 5 * tick)))) == {tick}
    assert max(np.diff(times_of(clips["h264"], RtpClock(jumps=((5, 3600.0),), reports=False)))) == 3600 * 90_000 + tick
    assert 0 in np.diff(times_of(clips["h264"], RtpClock(duplicate_every=4)))
    assert min(np.diff(times_of(clips["h264"], RtpClock(backward_every=4)))) == tick - 45_000
    restarted = times_of(clips["h264"], RtpClock(first_timestamp=10**6, restart_at=5, reports=False))
    assert min(np.diff(restarted)) < -(10**6) + 90_000


def test_sender_reports_tell_the_camera_s_own_time(clips: dict[str, Path]) -> None:
    for clock, expected in ((RtpClock(), time.time()), (RtpClock(wall_clock_at=100.0), 100.0)):
        with watching(Camera(clips["h264"], clock=clock)) as container:
            last = read(container, 10)[-1]
        (microseconds,) = struct.unpack_from("<q", bytes(last.get_sidedata("prft")))
        assert abs(microseconds / 1e6 - expected) < 5
    with watching(Camera(clips["h264"], clock=RtpClock(reports=False))) as container:
        assert not any(packet.has_sidedata("prft") for packet in read(container, 10))


def test_pictures_are_damaged_and_changed_as_told(clips: dict[str, Path], tmp_path: Path) -> None:
    other = write_clip(tmp_path / "other.mp4", 20, size=(160, 128), fps=50)
    truth = planes(clips["h264"], 20)
    changed = Bitstream(then=other, then_after=5)
    with watching(Camera(clips["h264"], bitstream=changed)) as container:
        assert [frame.width for frame in islice(container.decode(video=0), 10)] == [320] * 5 + [160] * 5
    for faults in (Bitstream(corrupt_every=4, seed=3), Bitstream(truncate_every=4)):
        with watching(Camera(clips["h264"], bitstream=faults)) as container:
            shown = [frame.to_ndarray() for frame in islice(container.decode(video=0), 8)]
        assert any(all(not np.array_equal(one, clean) for clean in truth) for one in shown), "nothing was damaged"
    with watching(Camera(clips["h264"], bitstream=Bitstream(no_keyframe_s=0.3))) as container:
        units = read(container, 30)
        first = next(index for index, unit in enumerate(units) if unit.is_keyframe)
    assert 8 <= first <= 20, "the first key frame may come after fifteen pictures"


def test_packets_are_lost_by_a_seed(clips: dict[str, Path]) -> None:
    def num_bytes(seed: int) -> int:
        with watching(Camera(clips["h264"], delivery=Delivery(loss=0.3, seed=seed, end_after=40))) as container:
            return sum(packet.size for packet in container.demux(video=0))

    assert num_bytes(1) == num_bytes(1) != num_bytes(2)
