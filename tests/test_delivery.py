"""At least once, on a real Redis: both sides killed ten times, and a Redis that refuses in each of its ways."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from streamd.client import subscribe
from streamd.config import Config, SpoolConfig
from streamd.config_file import parse, with_stream
from streamd.control_client import ask
from streamd.control_messages import StatusRequest
from streamd.errors import ConfigError
from streamd.feeds.repeats import Repeats
from streamd.publish import Outgoing
from streamd.publish.redis_streams import RedisStore
from streamd.publish.spool import Entry
from streamd.publish.stored import StoredPublisher
from streamd.wire import stream_key
from tests.daemon_process import DaemonProcess
from tests.redis_server import RedisServer, free_port, missing_for_redis
from tests.stored_process import STREAMS, make_publisher
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
NUM_ROUNDS = 10
STEP = 150  # accepted entries between two events


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[RedisServer]:
    if missing := missing_for_redis():
        pytest.skip(missing)
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(durable_in=folder) as server:
        yield server


class Life:
    """One life of the writing process."""

    def __init__(self, number: int, url: str, spool: Path) -> None:
        self.number = number
        self.num_accepted = 0
        command = [sys.executable, "-m", "tests.stored_process", url, str(spool), str(number)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self._process.stdout is not None
        self._lines = self._process.stdout

    def accept(self, more: int) -> None:
        """Wait until so many more entries were accepted."""
        goal = self.num_accepted + more
        while self.num_accepted < goal:
            line = self._lines.readline()
            assert line, "the process ended by itself"
            self._note(line)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        for line in self._lines.read().splitlines(keepends=True):
            if line.endswith("\n"):
                self._note(line)
        self._lines.close()
        self._process.wait(30)

    def _note(self, line: str) -> None:
        accepted, dropped = map(int, line.split())
        assert dropped == 0, "the queue and the spool are large enough for this test"
        self.num_accepted = max(self.num_accepted, accepted)


def has_loaded(server: RedisServer) -> bool:
    """Tell whether a server that was started has read its file."""
    with server.client() as client:
        try:
            return bool(client.ping())
        except redis.BusyLoadingError:
            return False


def read_once(server: RedisServer, stream: str) -> tuple[list[tuple[int, int]], int]:
    """Return life and number of each entry of a stream as a reader has them, and how many repeats it dropped."""
    repeats, numbers, num_repeats = Repeats(), [], 0
    with server.client() as client:
        entries: Any = client.xrange(stream_key(stream))
    for _, fields in entries:
        if repeats.has(stream, fields[b"id"].decode()):
            num_repeats += 1
            continue
        life, _, number = fields[b"payload"].decode().partition(":")
        numbers.append((int(life), int(number)))
    return numbers, num_repeats


def test_nothing_accepted_is_lost_though_both_sides_are_killed_ten_times(durable: RedisServer, tmp_path: Path) -> None:
    chance = random.Random(6)
    spool = tmp_path / "spool.sqlite"
    lives = []
    for number in range(NUM_ROUNDS):
        life = Life(number, durable.url, spool)
        lives.append(life)
        life.accept(STEP + chance.randrange(STEP))
        durable.kill()
        if number % 2:  # the writer goes on without Redis, and sees it come back
            life.accept(STEP)
            durable.start()
            life.accept(chance.randrange(2 * STEP))
            life.kill()
        else:  # both at once
            life.kill()
            durable.start()
    last = make_publisher(durable.url, spool)
    last.start()
    wait_until(lambda: has_loaded(durable))
    last.put(Outgoing("end", "detections", b"0:0", stored=True))
    wait_until(lambda: last.num_accepted == 1 and not last.spool.num_entries)
    last.stop(30.0)

    for position, stream in enumerate(STREAMS):
        numbers, _ = read_once(durable, stream)
        assert numbers == sorted(set(numbers)), "in order, and each once for a reader that drops repeats"
        accepted = {
            (life.number, number) for life in lives for number in range(position, life.num_accepted, len(STREAMS))
        }
        assert accepted <= set(numbers), f"{len(accepted - set(numbers))} accepted entries of {stream} are lost"
    assert all(life.num_accepted >= STEP for life in lives)


def test_a_crash_in_the_middle_of_a_transaction_costs_no_older_entry(durable: RedisServer, tmp_path: Path) -> None:
    """Redis cuts its file inside the transaction and replays the piece at its second start; see RedisStore."""
    store = RedisStore(durable.url, max_len=1000)

    def store_some(first: int) -> None:
        numbers = range(first, first + 5)
        store.store([Entry("gate", "detections", f"abc-{number}", b"0:%d" % number) for number in numbers])

    store_some(0)
    store_some(5)
    durable.kill()
    (file,) = tmp_path.rglob("*.incr.aof")
    os.truncate(file, file.read_bytes().rindex(b"*1\r\n$4\r\nEXEC") - 5)
    durable.start()
    wait_until(lambda: has_loaded(durable))
    assert read_once(durable, "gate")[0] == [(0, number) for number in range(5)], "what the cut left"
    store_some(5)  # as the spool does with what was not confirmed
    durable.kill()
    durable.start()
    wait_until(lambda: has_loaded(durable))
    assert read_once(durable, "gate")[0] == [(0, number) for number in range(10)]
    store.close()


def test_the_daemon_stores_what_it_finds_while_redis_is_away(
    demo_clip: Path, nano_artifact: Path, durable: RedisServer, tmp_path: Path
) -> None:
    config = {
        "models": {"people": {"path": str(nano_artifact)}},
        "streams": {"clip": {"url": str(demo_clip), "loop": True, "delivery": "stored"}},
        "publish": {
            "zeromq": {"bind": (address := f"tcp://127.0.0.1:{free_port()}")},
            "redis": {"url": durable.url, "pubsub": False, "max_len": 1_000_000},
            "spool": {"path": "spool.sqlite"},
        },
        "metrics": {"listen": None},
        "control": {"path": str(tmp_path / "control.sock")},
    }
    with DaemonProcess(tmp_path, config):
        with subscribe(address, "clip", timeout_s=60.0) as live:
            next(live)
            durable.kill()
            away = [next(live).seq for _ in range(30)]
            wait_until(lambda: waiting_in_spool(tmp_path / "control.sock") > 0)
            durable.start()
        with subscribe(durable.url, "clip", since="0", timeout_s=60.0) as stored:
            seqs = [next(stored).seq for _ in range(away[-1] + 1)]
    assert seqs == list(range(away[-1] + 1)), "what was found meanwhile is there too, in order"
    assert (tmp_path / "spool.sqlite").exists()


def waiting_in_spool(socket: Path) -> int:
    """Ask a daemon how many entries wait in its spool."""
    state = ask(socket, StatusRequest(), 30.0).state
    assert state is not None
    [entry] = [one for one in state.publishers if one.spool]
    assert entry.spool is not None and (entry.spool.bytes > 0) == (entry.spool.entries > 0)
    return entry.spool.entries


@pytest.fixture
def publisher(redis_server: RedisServer, tmp_path: Path) -> Iterator[StoredPublisher]:
    publisher = make_publisher(redis_server.url, tmp_path / "spool.sqlite")
    publisher.start()
    yield publisher
    publisher.stop(10.0)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:{}", "redis+sentinel://127.0.0.1:{}/s", "redis+cluster://127.0.0.1:{}"]
)
def test_a_redis_that_is_away_at_the_start_stops_nothing_and_is_counted_as_failing(tmp_path: Path, url: str) -> None:
    publisher = make_publisher(url.format(free_port()), tmp_path / "spool.sqlite")
    publisher.start()
    for number in range(10):
        publisher.put(Outgoing("gate", "detections", b"0:%d" % number, stored=True))
    wait_until(lambda: publisher.num_accepted == 10 and not publisher.healthy)
    publisher.stop(0.0)
    assert publisher.num_dropped == 0 and publisher.spool.num_entries == 10


def test_a_redis_that_comes_after_the_daemon_gets_all(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.kill()
    publisher = make_publisher(redis_server.url, tmp_path / "spool.sqlite")
    publisher.start()
    for number in range(100):
        publisher.put(Outgoing("gate", "detections", b"0:%d" % number, stored=True))
    wait_until(lambda: publisher.num_accepted == 100 and not publisher.healthy)
    redis_server.start()
    wait_until(lambda: publisher.num_sent == 100)
    publisher.stop(10.0)
    assert read_once(redis_server, "gate")[0] == [(0, number) for number in range(100)]


def out_of_memory(client: redis.Redis) -> Callable[[], object]:
    client.config_set("maxmemory", "1")
    return lambda: client.config_set("maxmemory", "0")


def read_only(client: redis.Redis) -> Callable[[], object]:
    client.replicaof("127.0.0.1", str(free_port()))
    return lambda: client.replicaof("NO", "ONE")


def password_wanted(client: redis.Redis) -> Callable[[], object]:
    client.config_set("requirepass", "sesame-open")
    client.client_kill_filter(_type="normal", skipme=True)  # who is connected stays so without a password
    return lambda: client.config_set("requirepass", "")


def not_allowed(client: redis.Redis) -> Callable[[], object]:
    client.execute_command("ACL", "SETUSER", "default", "-xadd")
    return lambda: client.execute_command("ACL", "SETUSER", "default", "+xadd")


def slow(client: redis.Redis) -> Callable[[], object]:
    client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
    return lambda: client.execute_command("CLIENT", "UNPAUSE")


def another_type(client: redis.Redis) -> Callable[[], object]:
    client.rename(stream_key("gate"), "elsewhere")
    client.set(stream_key("gate"), "no stream")
    return lambda: client.delete(stream_key("gate")) and client.rename("elsewhere", stream_key("gate"))


@pytest.mark.parametrize("refuse", [out_of_memory, read_only, password_wanted, not_allowed, slow, another_type])
def test_what_redis_refuses_comes_when_it_takes_again(
    redis_server: RedisServer, publisher: StoredPublisher, refuse: Callable[[redis.Redis], Callable[[], object]]
) -> None:
    def put(first: int) -> None:
        for number in range(first, first + 100):
            publisher.put(Outgoing("gate", "detections", b"0:%d" % number, stored=True))

    with redis_server.client() as client:
        client.ping()
        put(0)
        wait_until(lambda: publisher.num_sent == 100)
        take_again = refuse(client)
        put(100)
        wait_until(lambda: publisher.num_accepted == 200 and not publisher.healthy)
        take_again()
        wait_until(lambda: publisher.num_sent == 200)
    numbers, _ = read_once(redis_server, "gate")
    assert numbers == [(0, number) for number in range(200)]
    assert publisher.num_dropped == 0 and publisher.healthy


def load_text(folder: Path, publish: str, delivery: str = "stored") -> Config:
    path = folder / "streamd.yaml"
    streams = f"streams: {{gate: {{url: a.mp4, delivery: {delivery}}}, yard: {{url: b.mp4}}}}\n"
    return parse("models: {m: {path: m.pt}}\n" + streams + publish, path)


def test_a_stored_stream_needs_redis_streams(tmp_path: Path) -> None:
    for publish in ("", "publish: {redis: {url: 'redis://h', streams: false}}\n"):
        with pytest.raises(ConfigError, match=r"line 2: streams.gate.delivery: stored needs publish.redis"):
            load_text(tmp_path, publish)
    assert load_text(tmp_path, "", delivery="live").stored_streams == frozenset()
    config = load_text(tmp_path, "publish: {redis: {url: 'redis://h'}}\n")
    assert config.stored_streams == frozenset({"gate"})


def test_a_stored_stream_may_be_added_while_the_daemon_runs_where_there_is_redis(tmp_path: Path) -> None:
    door = {"url": "rtsp://h/door", "delivery": "stored"}
    config = load_text(tmp_path, "publish: {redis: {url: 'redis://:hidden@h'}, format: msgpack}\n")
    added = with_stream(config, "door", door)
    assert added.stored_streams == frozenset({"gate", "door"}) and added.publish == config.publish
    with pytest.raises(ConfigError, match=r"streams.door.delivery: stored needs publish.redis"):
        with_stream(load_text(tmp_path, "", delivery="live"), "door", door)


def test_paths_of_the_spool_and_of_certificates_begin_at_the_file(tmp_path: Path) -> None:
    redis_yaml = "{url: 'rediss://h', ca_file: ca.crt, cert_file: own.crt, key_file: /etc/own.key}"
    publish = load_text(tmp_path, f"publish: {{spool: {{path: s.sqlite}}, redis: {redis_yaml}}}\n").publish
    assert publish.spool.file == tmp_path / "s.sqlite"
    assert publish.redis is not None
    assert publish.redis.tls_options == {
        "ssl_ca_certs": str(tmp_path / "ca.crt"),
        "ssl_certfile": str(tmp_path / "own.crt"),
        "ssl_keyfile": "/etc/own.key",
    }


@pytest.mark.parametrize(
    ("redis_yaml", "complaint"),
    [
        ("{url: 'redis://h', ca_file: ca.crt}", "need a URL that begins with rediss"),
        ("{url: 'rediss://h', cert_file: own.crt}", "cert_file and key_file belong together"),
        ("{url: 'http://h'}", "must begin with redis://"),
        ("{url: 'redis://h', sentinel_password: swordfish}", r"need a redis\[s\]\+sentinel:// URL"),
        ("{url: 'redis+sentinel://h/s', sentinel_username: u}", "sentinel_username needs sentinel_password"),
        ("{url: 'unix+cluster://h'}", "must begin with redis://"),
    ],
)
def test_a_redis_section_that_cannot_work_is_refused(tmp_path: Path, redis_yaml: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_text(tmp_path, f"publish: {{redis: {redis_yaml}}}\n")


def test_the_spool_is_where_systemd_says_or_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/streamd:/var/lib/other")
    assert SpoolConfig().file == Path("/var/lib/streamd/spool.sqlite")
    monkeypatch.delenv("STATE_DIRECTORY")
    assert SpoolConfig().file == Path.home() / ".local/state/streamd/spool.sqlite"
