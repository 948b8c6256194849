"""The camera that other tests trust: what it sends is the clip, in time, with the wall clock, and it fails as told."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.video.stream import VideoStream

from tests.conftest import StartRtsp
from tests.rtsp import encode_clip

DEADLINE_S = 10.0


@contextmanager
def connect(url: str, transport: str = "tcp", timeout_s: float = DEADLINE_S) -> Iterator[InputContainer]:
    # A small probe opens at once; the size of the picture stands in the stream itself.
    with av.open(url, options={"rtsp_transport": transport, "probesize": "32"}, timeout=timeout_s) as container:
        yield container


def capture_time(packet: av.Packet[VideoStream]) -> float:
    """Give the Unix time that FFmpeg worked out from the RTCP sender reports, in seconds."""
    (microseconds,) = struct.unpack_from("<q", bytes(packet.get_sidedata("prft")))
    return float(microseconds) / 1e6


def read_packets(container: InputContainer, count: int) -> list[av.Packet[VideoStream]]:
    return list(islice(container.demux(video=0), count))


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_client_gets_the_pictures_of_the_clip_from_its_first_key_frame(
    rtsp_server: StartRtsp, demo_clip: Path, transport: str
) -> None:
    server = rtsp_server({"gate": demo_clip})
    with connect(server.url("gate"), transport) as camera, av.open(str(demo_clip)) as file:
        received = [frame.to_ndarray(format="gray") for frame in islice(camera.decode(video=0), 12)]
        expected = [frame.to_ndarray(format="gray") for frame in islice(file.decode(video=0), 12)]
    for index, (got, wanted) in enumerate(zip(received, expected, strict=True)):
        assert np.array_equal(got, wanted), f"frame {index} is not the clip's"


def test_pictures_come_in_real_time_and_go_on_when_the_clip_begins_again(
    rtsp_server: StartRtsp, shared: Path, tmp_path: Path
) -> None:
    clip = encode_clip(shared / "videos" / "vtest.avi", tmp_path / "short.mp4", fps=25, seconds=0.6, size=(320, 240))
    server = rtsp_server({"gate": clip}, log_sent=tmp_path / "sent.jsonl")
    with connect(server.url("gate")) as camera:
        packets = read_packets(camera, 50)
    # The first packet of a session has no time in FFmpeg.
    pts = [packet.pts for packet in packets[1:]]
    assert np.array_equal(np.diff(np.array(pts)), [3600] * 48), "the times must go on by 1/25 s on RTP's 90 kHz clock"
    sent = server.sent()
    assert {record["index"] for record in sent} == set(range(15))
    ahead_s = [record["sent_at"] - sent[0]["sent_at"] - record["count"] / 25 for record in sent]
    assert min(ahead_s) > -0.05, "a picture was sent before its time"


def test_key_frames_carry_their_parameter_sets_so_that_a_late_client_can_decode(
    rtsp_server: StartRtsp, demo_clip: Path
) -> None:
    server = rtsp_server({"gate": demo_clip}, shared=True)
    with connect(server.url("gate")) as early:
        read_packets(early, 5)
        with connect(server.url("gate")) as late:
            frame = next(late.decode(video=0))
    assert (frame.width, frame.height) == (768, 576)
    assert frame.key_frame


def test_sender_reports_tell_when_each_picture_was_sent(
    rtsp_server: StartRtsp, demo_clip: Path, tmp_path: Path
) -> None:
    server = rtsp_server({"gate": demo_clip}, log_sent=tmp_path / "sent.jsonl")
    with connect(server.url("gate")) as camera:
        packets = read_packets(camera, 20)
        start_time_us = camera.start_time_realtime
    sent_at = [record["sent_at"] for record in server.sent()]
    assert start_time_us is not None and abs(start_time_us / 1e6 - sent_at[0]) < 0.1
    timed = [(packet, sent) for packet, sent in zip(packets, sent_at, strict=False) if packet.has_sidedata("prft")]
    assert len(timed) >= 15
    # FFmpeg gives a picture the time of its own RTP packets, but for the first: where the first report came after that
    # picture, its packet is handed out with the time of the next.
    errors_s = [capture_time(packet) - sent for packet, sent in timed[1:]]
    assert max(map(abs, errors_s)) < 0.05, f"capture times are off by {errors_s}"


@pytest.mark.parametrize("digest", [False, True], ids=["basic", "digest"])
def test_a_wrong_password_is_refused_and_the_right_one_is_not(
    rtsp_server: StartRtsp, demo_clip: Path, digest: bool
) -> None:
    server = rtsp_server({"gate": demo_clip}, user="viewer", password="secret", digest=digest)
    with connect(server.url("gate")) as camera:
        assert read_packets(camera, 2)
    for url in (server.url("gate").replace("secret", "guess"), server.url("gate").replace("viewer:secret@", "")):
        with pytest.raises(av.error.HTTPUnauthorizedError), connect(url):
            pass


def test_a_name_that_is_not_served_is_not_found(rtsp_server: StartRtsp, demo_clip: Path) -> None:
    server = rtsp_server({"gate": demo_clip})
    with pytest.raises(av.error.HTTPNotFoundError), connect(server.url("door")):
        pass


def test_a_frozen_camera_sends_nothing_and_goes_on_after_the_thaw(
    rtsp_server: StartRtsp, demo_clip: Path, tmp_path: Path
) -> None:
    server = rtsp_server({"gate": demo_clip, "yard": demo_clip}, log_sent=tmp_path / "sent.jsonl")
    with connect(server.url("gate")) as gate, connect(server.url("yard")) as yard:
        assert read_packets(gate, 3)
        server.freeze("gate")
        frozen_at = time.time()
        read_packets(yard, 15)  # the other camera goes on meanwhile
        server.thaw("gate")
        thawed_at = time.time()
        decoded = list(islice(gate.decode(video=0), 10))
    sent = [record for record in server.sent() if record["mount"] == "/gate"]
    assert not [record for record in sent if frozen_at < record["sent_at"] < thawed_at]
    assert [record["index"] for record in sent] == list(range(len(sent))), "no picture may be left out"
    assert not any(frame.is_corrupt for frame in decoded)


def test_a_killed_camera_comes_back_on_the_same_port(rtsp_server: StartRtsp, demo_clip: Path) -> None:
    server = rtsp_server({"gate": demo_clip})
    url = server.url("gate")
    with connect(url) as camera:
        read_packets(camera, 2)
        server.kill()
        with suppress(av.error.FFmpegError):  # FFmpeg takes a lost connection for the end, or for an error
            for _ in camera.demux(video=0):
                pass
    with pytest.raises(av.error.ConnectionRefusedError), connect(url):
        pass
    server.start()
    with connect(url) as camera:
        assert read_packets(camera, 2)
