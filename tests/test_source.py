"""Files, devices and cameras, real ones: what can be opened is read to its end, and what cannot says why in a state."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import av
import pytest

from streamd.errors import SourceError
from streamd.messages import Packet
from streamd.sources import Source, SourceOptions, Timeline, open_source
from tests.clips import write_clip, write_sound
from tests.conftest import StartRtsp
from tests.redis_server import free_port

PASSWORD = "hunter22"
WITHIN_S = 10.0


def connect(
    url: str | Path, timeline: Timeline | None = None, *, transport: str = "tcp", timeout_s: float = 5.0
) -> Source:
    options = SourceOptions(str(url), transport, open_timeout_s=timeout_s, read_timeout_s=timeout_s)
    return open_source(options, timeline or Timeline())


def failure(url: str | Path, *, timeout_s: float = 5.0) -> SourceError:
    """Open what cannot be opened; return the error, which never shows the password."""
    with pytest.raises(SourceError) as caught:
        connect(url, timeout_s=timeout_s).close()
    assert PASSWORD not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the library's text repeats the URL"
    return caught.value


def read_to_failure(source: Source) -> tuple[list[Packet], SourceError]:
    packets: list[Packet] = []
    with closing(source), pytest.raises(SourceError) as caught:
        packets.extend(source.packets())
    return packets, caught.value


def write_header(clip: Path, out: Path) -> None:
    """Write a video of no frames."""
    options = {"movflags": "empty_moov"} if out.suffix == ".mp4" else {}
    with av.open(str(clip)) as full, av.open(str(out), "w", options=options) as output:
        output.add_stream_from_template(full.streams.video[0])
        output.start_encoding()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", num_frames=20)


def test_a_file_is_read_to_its_end(clip: Path) -> None:
    with closing(connect(clip)) as source:
        packets = list(source.packets())
    assert len(packets) == 20
    assert [packet.keyframe for packet in packets] == [index % 5 == 0 for index in range(20)]
    assert {(packet.stamp.epoch, packet.stamp.clock) for packet in packets} == {(0, "arrival")}
    assert abs(packets[0].stamp.captured_at - time.time()) < 60


def test_a_file_url_and_a_name_with_spaces_and_colons_are_files(clip: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a: b %20 ü.mp4"
    odd.write_bytes(clip.read_bytes())
    for url in (odd, f"file://{odd}"):
        with closing(connect(url)) as source:
            assert len(list(source.packets())) == 20


def test_each_connection_is_an_epoch(clip: Path) -> None:
    timeline = Timeline()
    epochs = []
    for _ in range(3):
        with closing(connect(clip, timeline)) as source:
            epochs.append(next(source.packets()).stamp.epoch)
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg"])
def test_a_picture_is_a_video_of_one_frame(tmp_path: Path, name: str) -> None:
    codec, pixel_format = ("png", "rgb24") if name.endswith("png") else ("mjpeg", "yuvj420p")
    path = write_clip(tmp_path / name, 1, codec=codec, pixel_format=pixel_format, container="image2")
    with closing(connect(path)) as source:
        (packet,) = source.packets()
    assert packet.keyframe


def test_a_video_beside_sound_gives_its_video_alone(clip: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.mkv"
    sound = write_sound(tmp_path / "sound.wav")
    with av.open(str(clip)) as video, av.open(str(sound)) as audio, av.open(str(both), "w") as output:
        copies = [output.add_stream_from_template(source.streams[0]) for source in (audio, video)]
        for source, copy in zip((audio, video), copies, strict=True):
            for packet in source.demux(source.streams[0]):
                if packet.dts is not None:
                    packet.stream = copy
                    output.mux(packet)
    with closing(connect(both)) as opened:
        assert len(list(opened.packets())) == 20


def test_a_file_that_is_no_video_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("models:\n  people: {path: yolox_s}\n" * 50)
    (tmp_path / "text.txt").write_text("a list of things\n" * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(7, 256)) * 40)
    write_sound(tmp_path / "sound.wav")
    expected = {
        "text.mp4": "not a video or picture that FFmpeg can read",
        "text.txt": "a text file, not a video or picture",
        "empty.mp4": "not a video or picture that FFmpeg can read",
        "noise.mp4": "not a video or picture that FFmpeg can read",
        "sound.wav": "opened, but it holds no video stream",
    }
    for name, message in expected.items():
        err = failure(tmp_path / name)
        assert (name, str(err), err.state, err.permanent) == (name, message, "failed", True)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for url in (tmp_path / "nothing.mp4", f"file://{tmp_path}/nothing.mp4"):
        err = failure(url)
        assert (err.state, err.permanent) == ("not_found", True)


def test_a_folder_is_no_video(tmp_path: Path) -> None:
    err = failure(tmp_path)
    assert (err.state, err.permanent, str(err)) == ("failed", True, "cannot be opened: Is a directory")


def test_a_file_that_may_not_be_read_says_so() -> None:
    err = failure("/proc/1/mem")  # root too is refused there, with another reason
    assert (err.state, err.permanent) == ("failed", True)


def test_a_device_that_is_not_there_is_not_found() -> None:
    err = failure("v4l2:///dev/video-of-nobody")
    assert (err.state, str(err), err.permanent) == ("not_found", "there is no such file or device", True)


def test_a_device_that_is_no_camera_has_failed() -> None:
    assert failure("v4l2:///dev/null").state == "failed"


@pytest.mark.parametrize("name", ["header.mp4", "header.avi"])
def test_a_video_without_frames_is_opened_and_ends(clip: Path, tmp_path: Path, name: str) -> None:
    write_header(clip, tmp_path / name)
    with closing(connect(tmp_path / name)) as source:
        assert list(source.packets()) == []


def test_a_file_that_ends_before_its_first_frame_says_so(clip: Path, tmp_path: Path) -> None:
    write_header(clip, tmp_path / "header.mkv")
    err = failure(tmp_path / "header.mkv")
    assert (str(err), err.state, err.permanent) == ("the file ends before its first frame", "failed", True)


def test_a_truncated_file_gives_what_it_holds(clip: Path, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.ts", 20).read_bytes()
    (tmp_path / "cut.ts").write_bytes(whole[: len(whole) * 2 // 3])
    with closing(connect(tmp_path / "cut.ts")) as source:
        assert 5 < len(list(source.packets())) < 20
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:1000])
    assert failure(tmp_path / "cut.mp4").state == "failed"


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_port_where_nobody_listens_is_unreachable(scheme: str) -> None:
    err = failure(f"{scheme}://viewer:{PASSWORD}@127.0.0.1:{free_port()}/gate")
    assert (err.state, err.permanent) == ("unreachable", False)
    assert str(err) == "the connection was refused; is the camera's port right?"


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_name_that_does_not_resolve_is_unreachable(scheme: str) -> None:
    err = failure(f"{scheme}://viewer:{PASSWORD}@camera.invalid/gate")
    assert (err.state, err.permanent) == ("unreachable", False)


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "http", "https"])
def test_a_server_that_accepts_and_never_answers_times_out(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        err = failure(f"{scheme}://viewer:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/gate", timeout_s=0.4)
        took_s = time.monotonic() - started
    assert (err.state, str(err), err.permanent) == ("unreachable", "no answer within 0.4 s", False)
    assert took_s < 4


class WebCamera(BaseHTTPRequestHandler):
    """Answer /401 with that status; serve files of `folder`, an endless MJPEG, and one that stops sending."""

    folder: Path

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name.isdecimal():
            self.send_error(int(name))
        elif name in ("mjpeg", "freezes"):
            self._send_mjpeg(endless=name == "mjpeg")
        else:
            self._send_file(self.folder / name)

    def _send_file(self, path: Path) -> None:
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:])

    def _send_mjpeg(self, *, endless: bool) -> None:
        picture = (self.folder / "picture.jpg").read_bytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        num_sent = 0
        while not self.server.stopping.wait(0.005):  # type: ignore[attr-defined]
            if endless or num_sent < 20:
                self.wfile.write(head.encode() + picture + b"\r\n")
                num_sent += 1

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has seen enough
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web_camera(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve over HTTP; give the URL with a user and the password, without a path."""
    folder = tmp_path_factory.mktemp("web")
    write_clip(folder / "clip.mp4", 20)
    write_clip(folder / "live.m3u8", 50, container="hls", options={"preset": "ultrafast"})
    write_clip(folder / "picture.jpg", 1, codec="mjpeg", pixel_format="yuvj420p", container="image2")
    (folder / "page.html").write_text("<html><body>Log in</body></html>" * 100)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (WebCamera,), {"folder": folder}))
    server.stopping = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://viewer:{PASSWORD}@127.0.0.1:{server.server_port}"
    server.stopping.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "state", "permanent"),
    [
        (401, "unauthorized", True),
        (403, "unauthorized", True),
        (404, "not_found", True),
        (400, "rejected", False),
        (500, "rejected", False),
        (503, "rejected", False),
    ],
)
def test_a_refusal_over_http_is_its_state(web_camera: str, status: int, state: str, permanent: bool) -> None:
    err = failure(f"{web_camera}/{status}")
    assert (err.state, err.permanent) == (state, permanent)
    assert str(status) in str(err) or status in (400, 500, 503)


def test_a_web_page_is_not_video(web_camera: str) -> None:
    err = failure(f"{web_camera}/page.html")
    assert (err.state, str(err)) == ("protocol_error", "answered with something that is not video")


def test_a_clip_over_http_is_read_and_then_the_camera_is_gone(web_camera: str) -> None:
    packets, err = read_to_failure(connect(f"{web_camera}/clip.mp4"))
    assert (len(packets), err.state) == (20, "unreachable")


def test_hls_is_read(web_camera: str) -> None:
    packets, err = read_to_failure(connect(f"{web_camera}/live.m3u8"))
    assert (len(packets), err.state) == (50, "unreachable")


def test_motion_jpeg_over_http_comes_picture_by_picture(web_camera: str) -> None:
    with closing(connect(f"{web_camera}/mjpeg")) as source:
        packets = list(islice(source.packets(), 50))
    assert all(packet.keyframe for packet in packets)
    arrived_s = [packet.stamp.arrived_ns / 1e9 for packet in packets]
    assert arrived_s == sorted(arrived_s) and arrived_s[-1] - arrived_s[0] > 0.05


def test_a_camera_that_stops_sending_is_stalled(web_camera: str) -> None:
    packets, err = read_to_failure(connect(f"{web_camera}/freezes", timeout_s=0.5))
    assert len(packets) >= 15
    assert err.state == "stalled" and "connected, but nothing came for 0." in str(err)


def test_a_server_that_hangs_up_at_once_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):  # the end of the test
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        err = failure(f"http://viewer:{PASSWORD}@127.0.0.1:{server.getsockname()[1]}/gate")
    assert (err.state, err.permanent) == ("unreachable", False)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_an_rtsp_camera_sends_pictures_with_its_capture_time(
    rtsp_server: StartRtsp, demo_clip: Path, transport: str
) -> None:
    server = rtsp_server({"gate": demo_clip})
    with closing(connect(server.url("gate"), transport=transport)) as source:
        packets = list(islice(source.packets(), 25))
    assert packets[0].keyframe
    last = packets[-1].stamp
    assert (last.clock, last.epoch) == ("sender", 0)
    assert abs(last.captured_at - time.time()) < 2


@pytest.mark.parametrize("digest", [False, True])
def test_a_wrong_password_is_unauthorized(rtsp_server: StartRtsp, demo_clip: Path, digest: bool) -> None:
    server = rtsp_server({"gate": demo_clip}, user="viewer", password="right", digest=digest)
    err = failure(server.url("gate").replace("right", PASSWORD))
    assert (err.state, err.permanent) == ("unauthorized", True)
    with closing(connect(server.url("gate"))) as source:
        assert next(source.packets()).keyframe


def test_a_wrong_path_is_not_found(rtsp_server: StartRtsp, demo_clip: Path) -> None:
    server = rtsp_server({"gate": demo_clip})
    err = failure(server.url("yard"))
    assert (err.state, err.permanent) == ("not_found", True)
    assert "404" in str(err)


def test_a_frozen_rtsp_camera_is_stalled_and_one_that_dies_is_unreachable(
    rtsp_server: StartRtsp, demo_clip: Path
) -> None:
    server = rtsp_server({"gate": demo_clip})
    with closing(connect(server.url("gate"), timeout_s=1.0)) as source:
        packets = source.packets()
        next(packets)
        server.freeze("gate")
        with pytest.raises(SourceError) as frozen:
            list(packets)
    assert frozen.value.state == "stalled"
    server.thaw("gate")
    with closing(connect(server.url("gate"), timeout_s=WITHIN_S)) as source:
        packets = source.packets()
        next(packets)
        server.kill()
        with pytest.raises(SourceError) as dead:
            list(packets)
    assert dead.value.state == "unreachable"


def test_the_options_do_not_show_the_url() -> None:
    assert PASSWORD not in repr(SourceOptions(f"rtsp://viewer:{PASSWORD}@camera/1"))
