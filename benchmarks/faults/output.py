"""Publishers: rows 48 to 50."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import zmq

from benchmarks.faults.bench import CLIP, FPS, STORED, WITNESSES, Bench
from benchmarks.faults.row import Absent, Outcome, Row, expect, wait_until
from benchmarks.faults.second import second_config, second_daemon
from benchmarks.faults.victim import Victim
from streamd import wire
from streamd.curve import ClientKeys
from tests.rtsp_faults import Bitstream, Camera

OUTAGE_S = 3.0
BACK_WITHIN_S = 20.0
SILENT_S, READ_S = 12.0, 4.0  # of a subscriber that reads nothing, and then much
FULL_WITHIN_S = 45.0  # until SQLite needs a page more than its files have
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
        wait_until(
            lambda: bench.metric(SPOOL_METRIC) <= FPS, BACK_WITHIN_S, f"{fault.__name__}: the spool does not drain"
        )
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
    wait_until(lambda: bench.metric(SPOOL_METRIC) <= FPS, BACK_WITHIN_S, "the spool does not drain")
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
    stored = {"publisher": f"stored redis {bench.redis.url}"}  # the live one loses messages as well while Redis is away
    lost_before = bench.metric("streamd_publisher_lost_total", **stored)
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
            wait_until(
                lambda: bench.metric("streamd_publisher_lost_total", **stored) > lost_before,
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
        wait_until(
            lambda: bench.metric("streamd_spool_accepted_total") > accepted, BACK_WITHIN_S, "the spool takes nothing"
        )
        lost = bench.metric("streamd_publisher_lost_total", **stored) - lost_before
    expect(complaints == 1, f"the log complains {complaints} times")
    return Outcome(time.monotonic() - back_at, f"{lost:.0f} not accepted, and counted; one line in the log")


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


ROWS = (
    Row(
        48,
        "Redis killed, slow, READONLY, OOM, NOAUTH",
        redis_fails,
        brief=redis_fails_briefly,
        in_ci=True,
        in_soak=True,
        stand_in=None,
    ),
    Row(49, "ZeroMQ: slow or late subscriber, wrong CURVE key", subscribers, stand_in=None),
    Row(50, "disk full for the spool", full_disk, in_ci=True, in_soak=True),
)
