"""Publishers and the host: rows 48 to 54."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit

import redis
import yaml
import zmq

from benchmarks.faults.bench import CLIP, FPS, STORED, WITNESSES, Bench, Victim
from benchmarks.faults.hang import find_thread, hung
from benchmarks.faults.listener import Listener
from benchmarks.faults.row import Absent, Missed, Outcome, Row, expect
from benchmarks.faults.second import moved, second_config, second_daemon
from streamd import wire
from streamd.control_messages import ReloadRequest
from streamd.curve import ClientKeys
from streamd.errors import ConfigError
from tests.redis_server import RedisServer
from tests.rtsp_faults import Bitstream, Camera

OUTAGE_S = 3.0
BACK_WITHIN_S = 20.0
STOP_S = 20.0
SILENT_S, READ_S = 12.0, 4.0  # of a subscriber that reads nothing, and then much
FEW = 8  # descriptors: each number below it is taken from the start on
FULL_WITHIN_S = 45.0  # until SQLite needs a page more than its files have
WATCHDOG_WITHIN_S = 60.0  # the daemon calls a batch of more than 30 s a hang, and looks every 5 s
SPOOL_METRIC = "streamd_spool_entries"


def redis_fails(bench: Bench) -> Outcome:
    """Redis is killed, then slow, READONLY, out of memory, and wants a password, for 3 s each."""
    first = _newest_id(bench)
    longest_s = 0.0
    for fault in (_killed, _slow, _readonly, _out_of_memory, _locked):
        with fault(bench):
            waiting_at = time.time()
            time.sleep(OUTAGE_S)
            for witness in WITNESSES:
                Victim(bench, witness).delivers(1, since=waiting_at, within_s=1.0)
            expect(bench.metric(SPOOL_METRIC) > FPS, f"{fault.__name__}: nothing waits in the spool")
        back_s = time.monotonic()
        _wait(lambda: bench.metric(SPOOL_METRIC) <= FPS, BACK_WITHIN_S, f"{fault.__name__}: the spool does not drain")
        longest_s = max(longest_s, time.monotonic() - back_s)
    missing = _missing(bench, first)
    expect(not missing, f"{missing} accepted entries did not arrive, or not in order")
    return Outcome(longest_s, "every accepted entry arrived in order")


def redis_fails_briefly(bench: Bench) -> Outcome:
    """Redis is killed for 3 s; a stored stream waits."""
    first = _newest_id(bench)
    with _killed(bench):
        time.sleep(OUTAGE_S)
        expect(bench.metric(SPOOL_METRIC) > FPS, "nothing waits in the spool")
    back_s = time.monotonic()
    _wait(lambda: bench.metric(SPOOL_METRIC) <= FPS, BACK_WITHIN_S, "the spool does not drain")
    missing = _missing(bench, first)
    expect(not missing, f"{missing} accepted entries did not arrive, or not in order")
    return Outcome(time.monotonic() - back_s, "every accepted entry arrived in order")


def subscribers(bench: Bench) -> Outcome:
    """A subscriber that reads nothing for 12 s; one that comes late; one with a wrong key."""
    config = second_config(bench, {f"cam{index}": {"url": str(CLIP), "loop": True} for index in range(3)})
    config["models"]["tiny"] |= {"score_threshold": 0.0, "max_detections": 400}  # large messages fill the buffers
    config["publish"]["zeromq"]["high_water_mark"] = 1
    server, client, stranger = (zmq.curve_keypair() for _ in range(3))
    keys = {"secret_key": server[1].decode(), "clients": {"known": client[0].decode()}}
    config["publish"]["zeromq"]["curve"] = keys
    address = config["publish"]["zeromq"]["bind"]
    known = ClientKeys(server[0].decode(), client[1].decode())
    with second_daemon(bench, config), _subscriber(address, known) as slow:
        with _subscriber(address, ClientKeys(server[0].decode(), stranger[1].decode())) as refused:
            expect(slow.poll(20_000), "a subscriber with the right key gets nothing")
            time.sleep(SILENT_S)
            expect(not refused.poll(100), "a subscriber with a wrong key gets messages")
        seqs = []
        deadline = time.monotonic() + READ_S
        while time.monotonic() < deadline and slow.poll(1000):
            topic, payload = slow.recv_multipart()
            if topic == b"streamd/cam0/detections":
                seqs.append(wire.decode(payload, "detections").seq)
        with _subscriber(address, known) as late:
            expect(late.poll(5000), "a late subscriber gets nothing")
    missed = seqs[-1] - seqs[0] + 1 - len(seqs)
    expect(missed > 0, f"no gap in {len(seqs)} messages: the buffers held all of it, so that nothing was shown")
    return Outcome(note=f"{missed} of {missed + len(seqs)} messages lost, visible in seq; the wrong key got nothing")


def full_disk(bench: Bench) -> Outcome:
    """The spool's file system is filled to the last byte while Redis is away, until an entry cannot be stored."""
    if not bench.is_isolated:
        raise Absent("needs root, for a small file system of the daemon's own")
    lost_before = bench.metric("streamd_publisher_lost_total")
    offset = bench.log_size()
    ballast = bench.small_disk / "ballast"
    busy = Camera(bench.clip, bitstream=Bitstream(speed=4.0))
    with bench.stream(bench.camera(busy), delivery="stored") as victim:  # fills SQLite's files faster
        victim.delivers(1)
        bench.redis.kill()
        try:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            began = time.time()
            _wait(
                lambda: bench.metric("streamd_publisher_lost_total") > lost_before,
                FULL_WITHIN_S,
                "what is not accepted is not counted",
            )
            time.sleep(3.0)
            for witness in WITNESSES:
                Victim(bench, witness).delivers(1, since=began, within_s=1.0)
            complaints = bench.log_since(offset).count(" entries not stored: ")
        finally:
            ballast.unlink()
            bench.redis.start()
        back_at = time.monotonic()
        accepted = bench.metric("streamd_spool_accepted_total")
        _wait(lambda: bench.metric("streamd_spool_accepted_total") > accepted, BACK_WITHIN_S, "the spool takes nothing")
        lost = bench.metric("streamd_publisher_lost_total") - lost_before
    expect(complaints == 1, f"the log complains {complaints} times")
    return Outcome(time.monotonic() - back_at, f"{lost:.0f} not accepted, and counted; one line in the log")


def bad_reload(bench: Bench) -> Outcome:
    """The file has an unknown key in one stream and a new stream; then it is right again."""
    config_path, right = bench.daemon.config_path, bench.daemon.config_path.read_text()
    wrong = yaml.safe_load(right)
    wrong["streams"][WITNESSES[1]]["fsp"] = 5
    wrong["streams"]["fresh"] = {"url": bench.camera(Camera(bench.clip))}
    config_path.write_text(yaml.safe_dump(wrong))
    line = next(number for number, text in enumerate(config_path.read_text().splitlines(), 1) if "fsp" in text)
    try:
        bench.ask(ReloadRequest())
    except ConfigError as err:
        told = str(err)
    else:
        raise Missed("the reload was accepted")
    finally:
        config_path.write_text(right)
    expect("fsp" in told and f"line {line}" in told, f"the refusal does not name key and line: {told}")
    expect("fresh" not in bench.metrics_text(), "a part of the refused file is at work")
    bench.ask(ReloadRequest())
    return Outcome(note="refused whole; key and line are named")


def signals(bench: Bench) -> Outcome:
    """200 SIGHUPs; then a second daemon with a spool is killed (SIGKILL), started again, and ended (SIGTERM)."""
    offset = bench.log_size()
    for _ in range(200):
        os.kill(bench.daemon.pid, signal.SIGHUP)
    bench.ask(ReloadRequest())
    reloads = bench.log_since(offset).count("reloaded: ")
    expect(1 <= reloads <= 10, f"{reloads} reloads for 200 signals")

    with redis_away(bench) as (url, start_redis):
        streams = {"kept": {"url": str(CLIP), "loop": True, "delivery": "stored"}}
        config = second_config(bench, streams, url)
        with second_daemon(bench, config) as daemon:
            with Listener(config["publish"]["zeromq"]["bind"]) as listener:
                listener.wait_for(lambda message: message.stream == "kept", time.time(), 30.0)
                time.sleep(2.0)
            daemon.stop(signal.SIGKILL)
        accepted = _spooled(Path(config["publish"]["spool"]["path"]))
        expect(accepted > FPS, f"only {accepted} entries were accepted before the kill")
        client = start_redis()
        with client, second_daemon(bench, moved(config)) as daemon:
            began = time.monotonic()
            key = wire.stream_key("kept")
            _wait(lambda: client.xlen(key) >= accepted, BACK_WITHIN_S, "what was accepted does not arrive")
            recovered_s = time.monotonic() - began
            told = time.monotonic()
            code = daemon.stop()
            drained_s = time.monotonic() - told
    expect(code == 0, f"it ended with {code} after SIGTERM")
    return Outcome(recovered_s, f"{reloads} reloads; {accepted} entries outlived SIGKILL; drained in {drained_s:.1f} s")


def hung_inference(bench: Bench) -> Outcome:
    """The inference thread of a second daemon is stopped where it stands; the bench acts as systemd would."""
    config = second_config(bench, {"cam": {"url": str(CLIP), "loop": True, "pace": "fast"}})  # always a batch in hand
    with second_daemon(bench, config) as daemon, Listener(config["publish"]["zeromq"]["bind"]) as listener:
        expect(listener.wait_for(_is_result, time.time(), 30.0), "it publishes nothing")
        _wait(lambda: daemon.watchdog_at > 0, BACK_WITHIN_S, "WATCHDOG=1 is never sent")
        with hung(find_thread(daemon.pid, "infer")):
            hung_s = time.monotonic()
            silent_s = 0.0
            while silent_s < 12.0:  # two rounds of the main loop and more
                expect(time.monotonic() - hung_s < WATCHDOG_WITHIN_S, "WATCHDOG=1 is still sent")
                time.sleep(0.5)
                silent_s = time.monotonic() - daemon.watchdog_at
            noticed_s = daemon.watchdog_at - hung_s
            os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait(STOP_S)
    with second_daemon(bench, moved(config)) as daemon:
        code = daemon.stop()
    expect(code == 0, f"the next one ended with {code}")
    return Outcome(note=f"the last WATCHDOG=1 came {noticed_s:.0f} s after the hang; the restart works")


def no_descriptors(bench: Bench) -> Outcome:
    """The limit of descriptors falls far below what is open, and a stream has to reconnect; then it is set back."""
    with bench.stream(bench.camera(Camera(bench.clip))) as victim:
        victim.delivers()
        soft, hard = prlimit(bench.daemon.pid, RLIMIT_NOFILE)
        prlimit(bench.daemon.pid, RLIMIT_NOFILE, (FEW, hard))
        try:
            failed_at = time.time()
            bench.cameras.hang_up("cam")
            victim.fails()
            time.sleep(2.0)
            reasons = {status.reason for status in victim.statuses(failed_at) if status.retry_in_s is not None}
        finally:
            prlimit(bench.daemon.pid, RLIMIT_NOFILE, (soft, hard))
        recovered_s = victim.recovers(time.time(), 35.0)
        clear = [reason for reason in reasons if "files can be opened" in reason]
        expect(clear, f"no reason says that descriptors are used up: {reasons}")
    return Outcome(recovered_s, clear[0])


@contextmanager
def _killed(bench: Bench) -> Iterator[None]:
    bench.redis.kill()
    try:
        yield
    finally:
        bench.redis.start()


@contextmanager
def _slow(bench: Bench) -> Iterator[None]:
    with bench.redis.client() as client:
        client.execute_command("CLIENT", "PAUSE", int((OUTAGE_S + 2) * 1e3), "ALL")
        yield


@contextmanager
def _readonly(bench: Bench) -> Iterator[None]:
    with bench.redis.client() as client:
        client.config_set("replica-serve-stale-data", "yes")
        client.replicaof("127.0.0.1", "1")
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def _out_of_memory(bench: Bench) -> Iterator[None]:
    with bench.redis.client() as client:
        client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            client.config_set("maxmemory", "0")


@contextmanager
def _locked(bench: Bench) -> Iterator[None]:
    with bench.redis.client() as client:
        client.config_set("requirepass", "changed")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        try:
            yield
        finally:
            client.config_set("requirepass", "")


@contextmanager
def redis_away(bench: Bench) -> Iterator[tuple[str, Callable[[], redis.Redis]]]:
    """Give the URL of a server that is not there, and a call that starts it and connects."""
    server = RedisServer()
    try:

        def start() -> redis.Redis:
            server.start()
            return server.client()

        yield server.url, start
    finally:
        server.stop()


@contextmanager
def _subscriber(address: str, keys: ClientKeys) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.RCVHWM, 1)
        subscriber.setsockopt(zmq.RCVBUF, 4096)
        subscriber.setsockopt(zmq.LINGER, 0)
        public = zmq.curve_public(keys.secret.encode())
        subscriber.curve_serverkey, subscriber.curve_publickey = keys.server.encode(), public
        subscriber.curve_secretkey = keys.secret.encode()
        subscriber.subscribe(b"streamd/")
        subscriber.connect(address)
        yield subscriber


def _is_result(message: wire.Message) -> bool:
    return isinstance(message, wire.DetectionsMessage)


def _newest_id(bench: Bench) -> str:
    """Return Redis' id of the newest entry of the stored stream."""
    with bench.redis.client() as client:
        return str(client.xrevrange(wire.stream_key(STORED), count=1)[0][0].decode())


def _missing(bench: Bench, since: str) -> int:
    """Count the entries of the stored stream that are not there, or came before an earlier one, since Redis' id."""
    with bench.redis.client() as client:
        entries = client.xrange(wire.stream_key(STORED), min=since)
    numbers = [int(fields[b"id"].rpartition(b"-")[2]) for _, fields in entries]
    seen = list(dict.fromkeys(numbers))  # an entry that comes again counts where it first came
    gaps = sum(later - earlier - 1 for earlier, later in pairwise(seen) if later > earlier)
    return gaps + sum(later < earlier for earlier, later in pairwise(seen))


def _spooled(path: Path) -> int:
    with sqlite3.connect(path) as database:
        (count,) = database.execute("SELECT count(*) FROM entries").fetchone()
    return int(count)


def _wait(holds: Callable[[], bool], within_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        expect(time.monotonic() < deadline, f"{otherwise} within {within_s:g} s")
        time.sleep(0.2)


ROWS = (
    Row(
        48,
        "Redis killed, slow, READONLY, OOM, NOAUTH",
        redis_fails,
        brief=redis_fails_briefly,
        in_ci=True,
        in_soak=True,
    ),
    Row(49, "ZeroMQ: slow or late subscriber, wrong CURVE key", subscribers),
    Row(50, "disk full for the spool", full_disk, in_ci=True, in_soak=True),
    Row(51, "bad configuration on reload", bad_reload, in_ci=True, in_soak=True),
    Row(52, "SIGHUP storm; SIGTERM; SIGKILL", signals),
    Row(53, "inference thread hangs", hung_inference),
    Row(54, "descriptor limit reached", no_descriptors, in_ci=True, in_soak=True),
)
