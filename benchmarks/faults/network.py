"""Network and session: rows 1 to 19."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.faults.bench import CLIP, FPS, GOP, TIMEOUT_S, Bench
from benchmarks.faults.row import Absent, Missed, Outcome, Row, expect
from benchmarks.faults.victim import Victim
from streamd.wire import StatusMessage
from tests.redis_cases import make_certificates
from tests.rtsp_faults import Answers, Bitstream, Camera, Delivery, Login
from tests.rtsp_server import CameraServer, black_hole

SLOW_S = 22.5  # three quarters of the back-off's ceiling: no try comes sooner where another would do harm
LOSSY_S = 6.0
WITHIN_S = 35.0  # a recovery that may have to wait for the ceiling
PASSWORD = "pass-9f3a61c2"
ODD_PASSWORD = "a@b:c/d%e#f-ü"


def refused(bench: Bench) -> Outcome:
    """The camera's port is closed while its connection is reset; then it is open again."""
    with CameraServer({"cam": Camera(bench.clip)}) as server, bench.stream(server.url("cam")) as victim:
        victim.delivers()
        server.refuse()
        failed_at = time.time()
        server.hang_up()
        status = victim.enters("unreachable", since=failed_at)
        expect(status.retry_in_s is not None and status.retry_in_s <= 0.5, f"the first retry is in {status.retry_in_s}")
        victim.enters("unreachable", saying="refused", since=failed_at)
        server.accept()
        return Outcome(victim.recovers(time.time(), WITHIN_S))


def black_holed(bench: Bench) -> Outcome:
    """Each SYN is dropped, by a listener whose queue is full; then a camera listens on the same port."""
    with ExitStack() as hole:
        port = hole.enter_context(black_hole())
        with bench.stream(f"rtsp://127.0.0.1:{port}/cam") as victim:
            began = time.time()
            victim.enters("unreachable")
            took_s = time.time() - began
            expect(took_s < TIMEOUT_S + 1.5, f"it took {took_s:.1f} s to give up, with {TIMEOUT_S:g} s to open")
            hole.close()
            with CameraServer({"cam": Camera(bench.clip)}, port=port):
                return Outcome(victim.recovers(time.time(), WITHIN_S), f"gave up after {took_s:.1f} s")


def moved_name(bench: Bench) -> Outcome:
    """The name is in nobody's hosts file; then it is there, with the address of a camera; then with another's."""
    if not bench.is_isolated:
        raise Absent("needs root, for a hosts file of the daemon's own")
    known = bench.hosts.read_text()
    with ExitStack() as stack:
        first = stack.enter_context(CameraServer({"cam": Camera(bench.clip)}))
        second = stack.enter_context(CameraServer({"cam": Camera(bench.clip)}, host="127.0.0.2", port=first.port))
        victim = stack.enter_context(bench.stream(f"rtsp://gate.test:{first.port}/cam"))
        stack.callback(bench.hosts.write_text, known)
        victim.enters("unreachable")
        bench.hosts.write_text(f"{known}127.0.0.1 gate.test\n")
        recovered_s = victim.recovers(time.time(), WITHIN_S)
        bench.hosts.write_text(f"{known}127.0.0.2 gate.test\n")
        first.refuse()
        first.hang_up()
        again_s = victim.recovers(time.time(), WITHIN_S)
        expect(second.num_playing("cam") == 1, "the second address was not asked")
    return Outcome(max(recovered_s, again_s))


def wrong_password(bench: Bench) -> Outcome:
    """The camera wants another password (digest); then it takes the one that is configured."""
    right = Camera(bench.clip, login=Login("viewer", PASSWORD))
    url = bench.camera(right)
    bench.camera(replace(right, login=Login("viewer", "another")))
    with bench.stream(url) as victim:
        status = victim.enters("unauthorized")
        _is_slow(status)
        for where, text in (("log", victim.log()), ("metrics", bench.metrics_text()), ("status", repr(status))):
            expect(PASSWORD not in text, f"the password is in the {where}")
        bench.camera(right)
        return Outcome(
            victim.recovers(time.time(), WITHIN_S), f"retry after {status.retry_in_s:.0f} s; the password is nowhere"
        )


def stale_nonce(bench: Bench) -> Outcome:
    """Digest nonces are good for two requests each; a keep-alive is due every second or two."""
    login = Login("viewer", PASSWORD, nonce_lasts=2)
    with bench.stream(bench.camera(Camera(bench.clip, login=login, answers=Answers(session_timeout_s=4)))) as victim:
        _runs_through(victim, 10.0)
    return Outcome(note="one connection, no visible effect")


def odd_password(bench: Bench) -> Outcome:
    """The password is a@b:c/d%e#f-ü, percent-encoded in the URL."""
    with bench.stream(bench.camera(Camera(bench.clip, login=Login("viewer", ODD_PASSWORD)))) as victim:
        victim.delivers(FPS)
        expect(ODD_PASSWORD not in victim.log(), "the password is in the log")
    return Outcome(note="connects")


def no_such_path(bench: Bench) -> Outcome:
    """DESCRIBE is answered with 404; then the path is there."""
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(status={"DESCRIBE": 404})))) as victim:
        status = victim.enters("not_found")
        _is_slow(status)
        bench.camera(Camera(bench.clip))
        return Outcome(victim.recovers(time.time(), WITHIN_S), f"retry after {status.retry_in_s:.0f} s")


def not_enough_bandwidth(bench: Bench) -> Outcome:
    """SETUP is answered with 453; then there is bandwidth."""
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(status={"SETUP": 453})))) as victim:
        victim.enters("rejected")
        bench.camera(Camera(bench.clip))
        return Outcome(victim.recovers(time.time(), WITHIN_S))


def never_answers(bench: Bench) -> Outcome:
    """TCP accepts and no request is answered; then the camera answers."""
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(silent=frozenset("*"))))) as victim:
        victim.enters("unreachable")
        bench.camera(Camera(bench.clip))
        return Outcome(victim.recovers(time.time(), WITHIN_S))


def no_rtp(bench: Bench) -> Outcome:
    """PLAY succeeds and no packet comes; then they come."""
    with bench.stream(bench.camera(Camera(bench.clip, delivery=Delivery(stop_after=0)))) as victim:
        victim.enters("stalled")
        bench.camera(Camera(bench.clip))
        return Outcome(victim.recovers(time.time(), WITHIN_S))


def pulled_cable(bench: Bench) -> Outcome:
    """RTP and RTCP stop in mid-stream, the connection stays; then the camera is there again."""
    with bench.stream(bench.camera(Camera(bench.clip))) as victim:
        victim.delivers(FPS)
        bench.camera(Camera(bench.clip, delivery=Delivery(stop_after=0)))
        stopped_at = time.time()
        victim.enters("stalled", since=stopped_at)
        after_s = time.time() - stopped_at
        expect(after_s < TIMEOUT_S + 1.5, f"it was noticed after {after_s:.1f} s, with {TIMEOUT_S:g} s to stall")
        bench.camera(Camera(bench.clip))
        return Outcome(victim.recovers(time.time(), WITHIN_S), f"noticed after {after_s:.1f} s")


def rebooted_peer(bench: Bench) -> Outcome:
    """The camera forgets the connection without FIN; what the daemon then sends is answered by RST."""
    once = Camera(bench.clip, delivery=Delivery(end_after=2 * GOP, end="half_open"))
    with bench.stream(bench.camera(once, Camera(bench.clip))) as victim:
        victim.delivers(GOP)
        return Outcome(victim.recovers(victim.fails(), WITHIN_S))


def torn_down(bench: Bench) -> Outcome:
    """The session ends in the middle of a GOP, and the next one begins in the middle of another."""
    once = Camera(bench.clip, delivery=Delivery(end_after=2 * GOP + GOP // 2, end="bye"))
    late = Camera(bench.clip, bitstream=Bitstream(start_at=GOP // 2))
    with bench.stream(bench.camera(once, late)) as victim:
        victim.delivers(GOP)
        failed_at = victim.fails()
        recovered_s = victim.recovers(failed_at, WITHIN_S)
        first_pts = victim.results(failed_at)[0].message
        lead_s = (GOP - GOP // 2) / FPS
        expect(first_pts.pts >= lead_s - 0.05, f"a picture at {first_pts.pts:.2f} s was published: no key frame yet")
        victim.enters("waiting_keyframe", since=failed_at)
    return Outcome(recovered_s, "nothing is published before the next key frame")


def keep_alive(bench: Bench) -> Outcome:
    """The server drops a session after 4 s without a request, and says so."""
    with bench.stream(bench.camera(Camera(bench.clip, answers=Answers(session_timeout_s=4)))) as victim:
        _runs_through(victim, 12.0)
    return Outcome(note="one connection over three times the time-out")


def bad_udp(bench: Bench) -> Outcome:
    """UDP with 1, 5 and 20 % loss, each with 1 % out of order, 1 % twice and 200 ms jitter; then without."""
    notes, longest_s = [], 0.0
    for loss in (0.01, 0.05, 0.2):
        delivery = Delivery(loss=loss, reorder=0.01, duplicate=0.01, jitter_s=0.2, seed=1)
        with bench.stream(bench.camera(Camera(bench.clip, delivery=delivery)), transport="udp") as victim:
            time.sleep(LOSSY_S)
            num_corrupt = int(bench.metric("streamd_stream_frames_dropped_total", stream=victim.name, reason="corrupt"))
            num_sent = round(LOSSY_S * FPS)
            num_clean = len(victim.results())
            expect(num_clean < num_sent, f"at {loss:.0%} loss every picture was published")
            notes.append(f"{loss:.0%}: {num_clean} of about {num_sent} published, {num_corrupt} dropped as damaged")
            bench.camera(Camera(bench.clip))
            longest_s = max(longest_s, victim.recovers(time.time(), WITHIN_S))
    return Outcome(longest_s, "; ".join(notes))


def blocked_udp(bench: Bench) -> Outcome:
    """SETUP and PLAY by UDP succeed, and no packet arrives."""
    url = bench.camera(Camera(bench.clip, delivery=Delivery(udp_blocked=True)))
    with bench.stream(url, transport="udp") as victim:
        return Outcome(victim.recovers(victim.added_at, WITHIN_S), "falls back to TCP")


def trickle(bench: Bench) -> Outcome:
    """Pictures of 768x576 come with 10 kB/s; then at full speed."""
    with bench.stream(bench.camera(Camera(CLIP, delivery=Delivery(bytes_per_s=10_000)))) as victim:
        victim.enters("stalled", within_s=30.0)
        bench.camera(Camera(CLIP))
        return Outcome(victim.recovers(time.time(), WITHIN_S))


def redirects_and_certificates(bench: Bench) -> Outcome:
    """DESCRIBE is answered with 302; then a camera's RTSPS certificate is signed by nobody whom the daemon knows."""
    with CameraServer({"cam": Camera(bench.clip)}) as other:
        url = bench.camera(Camera(bench.clip, answers=Answers(redirect=other.url("cam"))))
        with bench.stream(url) as victim:
            victim.delivers()
            expect(other.num_playing("cam") == 1, "the redirect was not followed")
    made = make_certificates(_folder(bench, "certificates"))
    with CameraServer({"cam": Camera(bench.clip)}, tls=(made.certificate, made.key)) as secure:
        with bench.stream(secure.url("cam", tls=True)) as victim:
            victim.enters("tls_error")
        with bench.stream(secure.url("cam", tls=True), tls_verify=False) as victim:
            victim.delivers()
    return Outcome(note="followed; tls_error; connects where told to trust it")


def many_refuse(bench: Bench) -> Outcome:
    """Eight cameras of one recorder are refused at once; then it is back."""
    names = [f"victim{index}" for index in range(8)]
    with CameraServer({"cam": Camera(bench.clip)}) as server, ExitStack() as streams:
        victims = [streams.enter_context(bench.stream(server.url("cam"), name)) for name in names]
        for victim in victims:
            victim.delivers(1)
        bench.rest()
        server.refuse()
        refused_at = time.time()
        server.hang_up()
        for victim in victims:
            victim.enters("unreachable", since=refused_at)
        time.sleep(4.0)
        delays_s = [one.retry_in_s for victim in victims for one in victim.statuses(refused_at) if one.retry_in_s]
        apart = len({round(delay_s, 2) for delay_s in delays_s}) / len(delays_s)
        expect(apart > 0.5, f"only {apart:.0%} of the retries are apart: {sorted(delays_s)}")
        server.accept()
        back_at = time.time()
        recovered_s = max(victim.recovers(back_at, WITHIN_S) for victim in victims)
    return Outcome(recovered_s, f"{len(delays_s)} retries, {min(delays_s):.2f} to {max(delays_s):.2f} s apart")


def _is_slow(status: StatusMessage) -> None:
    """Hold that the next try is far away, so that no camera locks its account. Raises Missed."""
    wait_s = status.retry_in_s
    expect(wait_s is not None and wait_s >= SLOW_S, f"it tries again in {wait_s} s")


def _runs_through(victim: Victim, seconds: float) -> None:
    """Hold that a stream runs for so long in one connection. Raises Missed."""
    victim.delivers(1)
    time.sleep(seconds)
    states = {status.state for status in victim.statuses()} - {"connecting", "waiting_keyframe", "running"}
    epochs = {heard.message.epoch for heard in victim.results()}
    if states or len(epochs) > 1:
        raise Missed(f"{victim.name} connected {len(epochs)} times and was {', '.join(states) or 'never in a fault'}")
    victim.delivers(1)


def _folder(bench: Bench, name: str) -> Path:
    folder = bench.folder / name
    folder.mkdir(exist_ok=True)
    return folder


ROWS = (
    Row(1, "connection refused", refused, in_ci=True, in_soak=True),
    Row(2, "SYN black hole", black_holed, in_ci=True, in_soak=True),
    Row(3, "name does not resolve; then resolves to another address", moved_name, in_soak=True),
    Row(4, "401, wrong password", wrong_password),
    Row(5, "digest nonce goes stale", stale_nonce),
    Row(6, "password with @ : / % # and non-ASCII letters", odd_password, in_ci=True, in_soak=True),
    Row(7, "404 path", no_such_path),
    Row(8, "453 not enough bandwidth", not_enough_bandwidth, in_ci=True, in_soak=True),
    Row(9, "TCP accepts and never answers", never_answers, in_ci=True, in_soak=True),
    Row(10, "PLAY succeeds, no RTP comes", no_rtp, in_soak=True),
    Row(11, "RTP stops with no FIN", pulled_cable, in_ci=True, in_soak=True),
    Row(12, "peer reboots, half-open connection", rebooted_peer, in_soak=True),
    Row(13, "TEARDOWN in the middle of a GOP", torn_down, in_ci=True, in_soak=True),
    Row(14, "session closed without keep-alive", keep_alive),
    Row(15, "UDP loss, reorder, duplicates, jitter", bad_udp),
    Row(16, "UDP blocked", blocked_udp, in_soak=True),
    Row(17, "10 kB/s trickle", trickle, in_soak=True, stand_in="large"),
    Row(18, "redirect; RTSPS with a bad certificate", redirects_and_certificates),
    Row(19, "several cameras refuse at the same time", many_refuse, in_soak=True),
)
