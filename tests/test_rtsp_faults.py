"""Cameras and networks that misbehave: each fault has its state, and the stream comes back by itself."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest

from streamd.announce import status_message
from streamd.backoff import Backoff
from streamd.messages import Frame
from streamd.redact import RedactingFormatter
from tests.certificates import self_signed
from tests.clips import write_clip, write_mjpeg
from tests.rtsp import encode_clip
from tests.rtsp_faults import Answers, Bitstream, Camera, Delivery, End, Login
from tests.rtsp_server import CameraServer, black_hole
from tests.stream_watcher import Watcher

HUGE = b"RTSP/1.0 200 OK\r\nCSeq: {CSEQ}\r\nContent-Length: 2000000000\r\n\r\n"
Scheme = Literal["digest", "basic"]
PASSWORD = "p@ss:w/ö%rd#1"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give two seconds of H.264, 50 frames/s, a key frame every 25."""
    return write_clip(tmp_path_factory.mktemp("clips") / "h264.mp4", 100, size=(160, 120), fps=50, gop=25)


@pytest.fixture(scope="module")
def moving(demo_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a street of 25 frames/s in which no two pictures are alike, and whose pictures are many packets each."""
    out = tmp_path_factory.mktemp("clips") / "moving.mp4"
    return encode_clip(demo_clip, out, fps=25, seconds=6, size=(384, 288), gop=10, options={"crf": "18"})


@pytest.fixture
def served(clip: Path) -> Iterator[Callable[..., CameraServer]]:
    """Serve cameras as `gate`, until the test ends."""
    servers: list[CameraServer] = []

    def serve(*cameras: Camera, tls: tuple[Path, Path] | None = None) -> CameraServer:
        servers.append(CameraServer({"gate": cameras}, tls=tls))
        return servers[-1].__enter__()

    yield serve
    for server in servers:
        server.__exit__(None, None, None)


def digest(frame: Frame) -> bytes:
    return b"".join(np.ascontiguousarray(plane.numpy()).tobytes() for plane in frame.picture.planes)


def pictures_of(path: Path) -> set[bytes]:
    with av.open(str(path)) as file:
        return {picture.to_ndarray().tobytes() for picture in file.decode(video=0)}


# Refusals: the camera answers at once, and the state says what.


@pytest.mark.parametrize(
    ("answers", "state", "reason"),
    [
        (Answers(status={"DESCRIBE": 404}), "not_found", "the camera has no such path (404); check the end of the URL"),
        (Answers(status={"SETUP": 453}), "rejected", "refuses SETUP: 453 not enough bandwidth, or too many viewers"),
        (Answers(status={"PLAY": 503}), "rejected", "the camera refuses PLAY: 503 busy or starting"),
        (Answers(status={"OPTIONS": 500}), "rejected", "the camera refuses OPTIONS: 500"),
        (Answers(sdp=lambda right: b"v=0\r\nnonsense\r\n" * 20), "protocol_error", "names no video that can be set up"),
        (Answers(sdp=lambda right: b""), "protocol_error", "answered with something that is not RTSP"),
        (Answers(sdp=lambda right: b"\xff\x00" * (5 << 20)), "protocol_error", "names no video that can be set up"),
        (
            Answers(sdp=lambda right: right.replace(b"H264", b"X999")),
            "unsupported",
            "a codec that FFmpeg does not know",
        ),
        (Answers(raw={"DESCRIBE": HUGE}), "protocol_error", "answered with something that is not RTSP"),
        (Answers(raw={"DESCRIBE": b""}), "unreachable", "closed the connection before it sent anything"),
        (Answers(silent=frozenset({"*"})), "unreachable", "no answer within 1 s"),
        (Answers(silent=frozenset({"PLAY"})), "unreachable", "no answer within 1 s"),
        (Answers(bytes_per_s=50), "unreachable", "no answer within 1 s"),
    ],
)
def test_a_refusal_or_a_wrong_answer_has_a_state_and_is_tried_again(
    served: Callable[..., CameraServer], clip: Path, answers: Answers, state: str, reason: str
) -> None:
    server = served(Camera(clip, answers=answers), Camera(clip))
    with Watcher(server.url("gate")) as stream:
        failed = stream.wait_for(state)
        assert reason in failed.reason and failed.retry_in_s is not None
        assert failed.error == status_message(failed).error == state
        assert stream.wait_for("connecting", 2).error == state, "while it tries again, the status says what was wrong"
        assert stream.wait_for("running").error == ""
        assert stream.supervisor.reading.num_failures == {state: 1}


def test_a_refused_connection_is_unreachable_until_the_port_is_back(
    served: Callable[..., CameraServer], clip: Path
) -> None:
    server = served(Camera(clip))
    server.refuse()
    with Watcher(server.url("gate")) as stream:
        assert "refused" in stream.wait_for("unreachable", 2).reason
        server.accept()
        stream.wait_for("running")


def test_a_host_that_answers_no_syn_is_given_up_after_the_time_out() -> None:
    with black_hole() as port, Watcher(f"rtsp://127.0.0.1:{port}/gate", open_timeout_s=0.4) as stream:
        assert stream.wait_for("unreachable", 2).reason == "no answer within 0.4 s"


# Login.


@pytest.mark.parametrize("scheme", ["digest", "basic"])
def test_a_wrong_password_waits_for_the_ceiling_and_is_shown_nowhere(
    served: Callable[..., CameraServer],
    clip: Path,
    caplog: pytest.LogCaptureFixture,
    scheme: Literal["digest", "basic"],
) -> None:
    server = served(Camera(clip, login=Login("viewer", "the right one", scheme=scheme)))
    url = server.url("gate").replace("the%20right%20one", "hunter-22")
    caplog.set_level(logging.DEBUG)
    with Watcher(url, backoff=Backoff(base_s=0.05, ceiling_s=600)) as stream:
        refused = stream.wait_for("unauthorized")
        assert refused.retry_in_s is not None and refused.retry_in_s >= 450, (
            "each try brings the camera nearer to locking the account"
        )
        assert len(server.events("gate", "DESCRIBE")) <= 2, "one without a password, one with it"
        lines = [RedactingFormatter().format(record) for record in caplog.records]
        assert any("unauthorized" in line for line in lines)
        assert "hunter-22" not in f"{lines} {stream.statuses} {stream.supervisor.reading} {status_message(refused)}"


def test_a_nonce_that_goes_stale_at_each_request_is_not_noticed(
    served: Callable[..., CameraServer], clip: Path
) -> None:
    login = Login("viewer", PASSWORD, nonce_lasts=1)
    server = served(Camera(clip, login=login, answers=Answers(session_timeout_s=1)))
    with Watcher(server.url("gate")) as stream:
        stream.wait_for_frames(100)  # two seconds: the keep-alive, too, needs a fresh nonce
        assert len(server.events("gate", "401")) >= 3
        assert [*stream.states] == ["connecting", "waiting_keyframe", "running"]


@pytest.mark.parametrize("written", ["encoded", "as it is"])
def test_a_password_of_awkward_characters_connects(
    served: Callable[..., CameraServer], clip: Path, written: str
) -> None:
    password = PASSWORD if written == "encoded" else "p:w/ö%?#1"  # with an @, nobody can tell where it ends
    server = served(Camera(clip, login=Login("us@er" if written == "encoded" else "user", password)))
    url = server.url("gate") if written == "encoded" else f"rtsp://user:{password}@127.0.0.1:{server.port}/gate"
    with Watcher(url) as stream:
        stream.wait_for("running")


# Silence.


@pytest.mark.parametrize(
    "delivery",
    [Delivery(stop_after=0), Delivery(stop_after=20), Delivery(end_after=20, end="half_open")],
    ids=["no RTP at all", "a pulled cable", "a reboot of the camera"],
)
def test_silence_is_a_stall_and_the_stream_is_opened_again(
    served: Callable[..., CameraServer], clip: Path, delivery: Delivery
) -> None:
    server = served(Camera(clip, delivery=delivery), Camera(clip))
    with Watcher(server.url("gate")) as stream:
        assert "nothing came for 1." in stream.wait_for("stalled").reason
        before = len(stream.frames)
        stream.wait_for_frames(30)
        assert stream.frames[before].keyframe and stream.supervisor.reading.num_failures == {"stalled": 1}


def test_a_trickle_is_a_stall_although_a_picture_comes_now_and_then(
    served: Callable[..., CameraServer], moving: Path
) -> None:
    server = served(Camera(moving, delivery=Delivery(bytes_per_s=10_000)), Camera(moving))
    with Watcher(server.url("gate"), stall_timeout_s=10, read_timeout_s=2) as stream:
        stalled = stream.wait_for("stalled")
        assert "of video came in" in stalled.reason or "trickle" in stalled.reason
        stream.wait_for_frames(20)


@pytest.mark.parametrize("end", ["fin", "rst", "bye"])
def test_an_end_in_the_middle_of_a_group_of_pictures_shows_no_grey_frame(
    served: Callable[..., CameraServer], moving: Path, end: End
) -> None:
    truth = pictures_of(moving)
    server = served(
        Camera(moving, delivery=Delivery(end_after=14, end=end)), Camera(moving, bitstream=Bitstream(start_at=5))
    )
    with Watcher(server.url("gate")) as stream:
        stream.wait_for("unreachable")
        stream.wait_for("running", 2)
        stream.wait_for_frames(10)
        assert [digest(frame) in truth for frame in stream.frames] == [True] * len(stream.frames)


def test_a_session_is_kept_alive(served: Callable[..., CameraServer], clip: Path) -> None:
    server = served(Camera(clip, answers=Answers(session_timeout_s=1)))
    with Watcher(server.url("gate")) as stream:
        stream.wait_for_frames(150)
        assert stream.states == ["connecting", "waiting_keyframe", "running"]
    assert not server.events("gate", "session timeout")


# The network.


@pytest.mark.parametrize(
    "delivery",
    [
        Delivery(loss=0.01, seed=1),
        Delivery(loss=0.05, seed=2),
        Delivery(loss=0.2, seed=3),
        Delivery(reorder=0.05, seed=4),
        Delivery(duplicate=0.05, seed=5),
        Delivery(jitter_s=0.2, seed=6),
        Delivery(loss=0.02, reorder=0.02, duplicate=0.02, jitter_s=0.05, seed=7),
    ],
    ids=["1 %", "5 %", "20 %", "reordered", "repeated", "jitter", "all"],
)
def test_no_damaged_frame_passes_for_a_clean_one(
    served: Callable[..., CameraServer],
    moving: Path,
    delivery: Delivery,
) -> None:
    check_that_damage_is_marked(served, moving, delivery)


def check_that_damage_is_marked(served: Callable[..., CameraServer], path: Path, delivery: Delivery) -> list[Frame]:
    truth = pictures_of(path)
    server = served(Camera(path, delivery=delivery, bitstream=Bitstream(speed=2)))
    with Watcher(server.url("gate"), transport="udp", corrupt_frames="publish", stall_timeout_s=10) as stream:
        frames = stream.wait_for_frames(120)
    wrong = [frame.seq for frame in frames if not frame.corrupt and digest(frame) not in truth]
    assert not wrong, f"{len(wrong)} of {len(frames)} frames are damaged, and not marked"
    num_marked = sum(frame.corrupt for frame in frames)
    if delivery.loss:
        assert num_marked, "the losses were not seen at all"
    return frames


def test_nor_does_one_of_a_camera_that_refreshes_its_picture_piece_by_piece(
    served: Callable[..., CameraServer], demo_clip: Path, tmp_path: Path
) -> None:
    """Such a stream has no key frames, but points from which all of the picture is new some frames later."""
    options = {"crf": "20", "x264-params": "intra-refresh=1:keyint=12"}
    path = encode_clip(demo_clip, tmp_path / "refresh.mp4", fps=25, seconds=4, size=(384, 288), options=options)
    frames = check_that_damage_is_marked(served, path, Delivery(loss=0.01, seed=9))
    first = next(index for index, frame in enumerate(frames) if frame.corrupt)
    assert any(not frame.corrupt for frame in frames[first:]), "it never recovers"


def test_nor_does_one_of_h265(served: Callable[..., CameraServer], moving: Path, tmp_path: Path) -> None:
    options = {"crf": "22", "x265-params": "log-level=none:bframes=0:frame-threads=1:pools=none:keyint=10"}
    path = encode_clip(moving, tmp_path / "hevc.mp4", fps=25, seconds=2, codec="libx265", options=options)
    check_that_damage_is_marked(served, path, Delivery(loss=0.03, reorder=0.02, duplicate=0.02, seed=8))


@pytest.mark.parametrize("how", ["refused", "blocked"])
def test_udp_that_does_not_get_through_falls_back_to_tcp_and_is_not_tried_again(
    served: Callable[..., CameraServer], clip: Path, how: str
) -> None:
    camera = Camera(
        clip, answers=Answers(udp_refused=how == "refused"), delivery=Delivery(udp_blocked=how == "blocked")
    )
    server = served(camera)
    with Watcher(server.url("gate"), transport="udp") as stream:
        stream.wait_for_frames(5)
        assert stream.supervisor.reading.num_failures == ({"stalled": 1} if how == "blocked" else {})
        server.hang_up("gate")
        stream.wait_for("running", 2)
        assert sum(stream.supervisor.reading.num_failures.values()) == (2 if how == "blocked" else 1), "UDP once"


def test_many_streams_that_are_refused_at_once_come_back_spread_over_time() -> None:
    """Each round of retries of a hundred streams fills the whole of its range, as no shared timer would."""
    streams = [Backoff(rng=random.Random(seed)) for seed in range(100)]
    for limit_s in (0.5, 1, 2, 4, 8, 16, 30, 30):
        delays_s = sorted(backoff.next_delay_s() for backoff in streams)
        tenths = {int(delay_s / limit_s * 10) for delay_s in delays_s}
        assert tenths == set(range(10)), f"of {limit_s} s only the tenths {tenths} are used"
        assert max(delays_s) <= limit_s


def test_a_name_is_looked_up_again_at_each_try(clip: Path, tmp_path: Path) -> None:
    """The hosts file, in a mount namespace, first lacks the name, then has one address for it, then another."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here (run as root)")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    with (
        CameraServer({"gate": Camera(clip)}) as first,
        CameraServer({"gate": Camera(clip)}, host="127.0.0.2", port=first.port) as second,
    ):
        arguments = [str(hosts), str(first.port)]
        mount = 'mount --bind "$1" /etc/hosts && exec "$0" -c "$3" "$1" "$2"'
        command = ["unshare", "--mount", "sh", "-c", mount, sys.executable, *arguments, OPEN_THREE_TIMES]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert said.stdout.split() == ["unreachable", "opened", "opened"], said
        assert len(first.events("gate", "play")) == len(second.events("gate", "play")) == 1


OPEN_THREE_TIMES = """
import sys
from streamd.errors import SourceError
from streamd.sources import SourceOptions, Timeline, open_source
hosts, port = sys.argv[1:]
for address in ("", "127.0.0.2", "127.0.0.1"):
    with open(hosts, "a") as file:
        file.truncate(0)
        file.write(f"127.0.0.1 localhost\\n{address} camera.example\\n" if address else "127.0.0.1 localhost\\n")
    try:
        open_source(SourceOptions(f"rtsp://camera.example:{port}/gate"), Timeline()).close()
        print("opened")
    except SourceError as err:
        print(err.state)
"""


def test_streams_of_a_camera_that_refuses_do_not_come_back_together(
    served: Callable[..., CameraServer], clip: Path
) -> None:
    server = served(Camera(clip, answers=Answers(status={"DESCRIBE": 503})))
    watchers = [Watcher(server.url("gate"), backoff=Backoff(base_s=2, ceiling_s=2)) for _ in range(8)]
    for watcher in watchers:
        watcher.__enter__()
    delays_s = [watcher.wait_for("rejected").retry_in_s for watcher in watchers]
    for watcher in watchers:
        watcher.__exit__(None, None, None)
    assert len(set(delays_s)) == 8


# Redirects and TLS.


@pytest.mark.parametrize("status", [301, 302])
def test_a_redirect_is_followed_with_the_login(served: Callable[..., CameraServer], clip: Path, status: int) -> None:
    server = served(Camera(clip))
    server.set("real", Camera(clip, login=Login("viewer", PASSWORD)))
    target = f"rtsp://127.0.0.1:{server.port}/real"
    server.set(
        "gate", Camera(clip, login=Login("viewer", PASSWORD), answers=Answers(redirect=target, redirect_status=status))
    )
    with Watcher(server.url("gate")) as stream:
        stream.wait_for("running")
    assert server.events("real", "play")


def test_a_camera_that_redirects_to_itself_is_given_up(served: Callable[..., CameraServer], clip: Path) -> None:
    server = served(Camera(clip))
    server.set("gate", Camera(clip, answers=Answers(redirect=server.url("gate"))))
    with Watcher(server.url("gate"), open_timeout_s=0.5) as stream:
        assert stream.wait_for("unreachable").reason == "no answer within 0.5 s"


@pytest.mark.parametrize(
    ("host", "settings", "state", "reason"),
    [
        ("127.0.0.1", {}, "tls_error", "its certificate is not trusted; see ca_file"),
        ("127.0.0.1", {"ca_file": True}, "running", ""),
        ("camera.example", {"ca_file": True}, "tls_error", "its certificate is for another name; see tls_verify"),
        ("camera.example", {"tls_verify": False}, "running", ""),
    ],
    ids=["self-signed", "trusted by ca_file", "for another host", "not verified"],
)
def test_a_certificate_is_verified_unless_told_to_trust_it(
    served: Callable[..., CameraServer],
    clip: Path,
    tmp_path: Path,
    host: str,
    settings: dict[str, Any],
    state: str,
    reason: str,
) -> None:
    certificate, key = self_signed(tmp_path, host=host)
    server = served(Camera(clip), tls=(certificate, key))
    if "ca_file" in settings:
        settings = {"ca_file": str(certificate)}
    with Watcher(server.url("gate", tls=True), **settings) as stream:
        assert stream.wait_for(state).reason == reason


# What the bitstream and its description may hold.


@pytest.mark.parametrize("place", ["sdp", "band"])
def test_parameter_sets_are_found_in_the_description_and_in_the_stream(
    served: Callable[..., CameraServer], moving: Path, place: Literal["sdp", "band"]
) -> None:
    truth = pictures_of(moving)
    server = served(Camera(moving, bitstream=Bitstream(parameter_sets=place)))
    with Watcher(server.url("gate")) as stream:
        assert {digest(frame) in truth for frame in stream.wait_for_frames(15)} == {True}


def test_sound_and_metadata_beside_the_video_are_not_even_asked_for(
    served: Callable[..., CameraServer], clip: Path
) -> None:
    server = served(Camera(clip, answers=Answers(tracks=("audio", "metadata"))))
    with Watcher(server.url("gate")) as stream:
        stream.wait_for_frames(20)
        assert stream.states[-1] == "running"
    assert len(server.events("gate", "SETUP")) == 1


def test_another_codec_after_a_reconnect_goes_on(
    served: Callable[..., CameraServer], clip: Path, tmp_path: Path
) -> None:
    hevc = write_clip(tmp_path / "hevc.mp4", 50, size=(192, 144), fps=50, codec="libx265")
    pictures = write_mjpeg(tmp_path / "mjpeg.mkv", 50, size=(128, 96), fps=50)
    soon = Delivery(end_after=20)
    server = served(Camera(clip, delivery=soon), Camera(hevc, delivery=soon), Camera(pictures))
    with Watcher(server.url("gate")) as stream:
        stream.wait_for("running", 3)
        stream.wait_for_frames(5)
        sizes = [(frame.width, frame.height) for frame in stream.frames]
    assert list(dict.fromkeys(sizes)) == [(160, 120), (192, 144), (128, 96)]


@pytest.mark.parametrize(
    "sdp",
    [
        lambda right: right + b"a=x:" + b"y" * 10_000_000 + b"\r\n",
        lambda right: right + b"m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:track0\r\n" * 140_000,
        lambda right: b"m=video 0 RTP/AVP 96\r\n" * 400_000,
    ],
    ids=["a long line", "many tracks", "many tracks of nothing"],
)
def test_ten_megabytes_of_description_end_within_the_time_out_and_leave_nothing_behind(
    served: Callable[..., CameraServer], clip: Path, sdp: Callable[[bytes], bytes]
) -> None:
    server = served(Camera(clip, answers=Answers(sdp=sdp)), Camera(clip))
    before_kib = resident_kib()
    with Watcher(server.url("gate"), open_timeout_s=5) as stream:
        stream.wait_for_frames(10)  # of this connection or the next, which has a usual description
    assert resident_kib() - before_kib < 100 << 10, "ten megabytes are there twice, here and in the server"


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_flood_of_supplemental_messages_is_read_past(served: Callable[..., CameraServer], clip: Path) -> None:
    server = served(Camera(clip, bitstream=Bitstream(sei_per_picture=50, sei_bytes=5000)))  # 12 MB/s
    with Watcher(server.url("gate"), stall_timeout_s=10) as stream:
        stream.wait_for_frames(50)
