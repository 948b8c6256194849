"""At least once, with a store that fails as the test says; the real Redis is in test_delivery.py."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from streamd.backoff import Backoff
from streamd.errors import PublishError
from streamd.feeds.repeats import MAX_EPOCHS, Repeats
from streamd.publish import Outgoing
from streamd.publish.spool import Entry, Spool
from streamd.publish.stored import StoredPublisher
from tests.waiting import wait_until


class FakeStore:
    """Keeps what it is given; refuses the streams in `refused`, or all while `is_away`."""

    name = "fake"

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.refused: set[str] = set()
        self.is_away = False
        self.forgets_to_confirm = 0  # so many times the entries arrive and the answer does not
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> None:
        pass

    def ping(self) -> None:
        if self.is_away:
            raise PublishError("no connection")

    def store(self, entries: Sequence[Entry]) -> None:
        self.gate.wait(30)
        if self.is_away or entries[0].stream in self.refused:
            raise PublishError("WRONGTYPE")
        self.entries += entries
        if self.forgets_to_confirm:
            self.forgets_to_confirm -= 1
            raise PublishError("no answer")

    def close(self) -> None:
        pass

    def payloads(self, stream: str) -> list[bytes]:
        return [entry.payload for entry in self.entries if entry.stream == stream]


class Quickly(Backoff):
    def next_delay_s(self, at_most_s: float = 0.0) -> float:
        return 0.01


def message(stream: str, number: int, *, stored: bool = True) -> Outgoing:
    return Outgoing(stream, "detections", b"%d" % number, stored=stored)


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


Start = Callable[..., StoredPublisher]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


@pytest.fixture
def start(store: FakeStore, path: Path) -> Iterator[Start]:
    started: list[StoredPublisher] = []

    def start(max_entries: int = 10_000, path: Path = path, **options: object) -> StoredPublisher:
        spool = Spool(path, max_entries, 1 << 30)
        publisher = StoredPublisher(store, spool, backoff=Quickly, **options)  # type: ignore[arg-type]
        publisher.start()
        started.append(publisher)
        return publisher

    yield start
    store.gate.set()
    for publisher in started:
        publisher.stop(10.0)


def test_entries_arrive_in_order_and_leave_the_spool(store: FakeStore, start: Start) -> None:
    publisher = start()
    for number in range(500):
        publisher.put(message("a", number))
    wait_until(lambda: publisher.num_sent == 500)
    assert store.payloads("a") == numbers(500)
    assert publisher.num_accepted == 500 and publisher.num_dropped == 0 and publisher.healthy
    wait_until(lambda: publisher.spool.num_entries == 0 and not publisher.spool.has_garbage)


def test_live_messages_are_not_for_the_spool(store: FakeStore, start: Start, path: Path) -> None:
    publisher = start()
    publisher.put(message("a", 0, stored=False))
    publisher.stop(10.0)
    assert not store.entries and not path.exists()


def test_an_id_has_the_epoch_and_counts_the_stream(store: FakeStore, start: Start) -> None:
    publisher = start()
    for number in range(3):
        publisher.put(message("a", number))
        publisher.put(message("b", number))
    wait_until(lambda: publisher.num_sent == 6)
    epochs, seqs = zip(*(entry.id.rsplit("-") for entry in store.entries if entry.stream == "a"), strict=True)
    assert len(set(epochs)) == 1 and seqs == ("0", "1", "2")


def test_what_was_not_confirmed_is_sent_again_with_the_same_ids(store: FakeStore, start: Start) -> None:
    store.forgets_to_confirm = 2
    publisher = start()
    for number in range(20):
        publisher.put(message("a", number))
    wait_until(lambda: publisher.num_sent == 20)
    assert len(store.entries) > 20
    repeats = Repeats()
    assert [one.payload for one in store.entries if not repeats.has("a", one.id)] == numbers(20)


def test_a_store_that_is_away_gets_all_when_it_is_back(
    store: FakeStore, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamd.publish")
    store.is_away = True
    publisher = start()
    for number in range(300):
        publisher.put(message("a", number))
    wait_until(lambda: publisher.num_accepted == 300 and not publisher.healthy)
    store.is_away = False
    wait_until(lambda: publisher.num_sent == 300)
    assert store.payloads("a") == numbers(300) and publisher.num_dropped == 0 and publisher.healthy
    assert caplog.text.count("entries wait in the spool") == 2  # one complaint and one all-clear
    assert "stored fake: sends again" in caplog.text


def test_a_stream_that_is_refused_does_not_hold_up_another(store: FakeStore, start: Start) -> None:
    store.refused = {"bad"}
    publisher = start()
    for number in range(100):
        publisher.put(message("bad", number))
        publisher.put(message("good", number))
    wait_until(lambda: len(store.payloads("good")) == 100)
    wait_until(lambda: publisher.spool.waiting() == {"bad": 100})
    store.refused = set()
    wait_until(lambda: publisher.num_sent == 200)
    assert store.payloads("bad") == numbers(100)


def test_a_second_life_sends_what_the_first_left(store: FakeStore, start: Start) -> None:
    store.is_away = True
    first = start()
    for number in range(200):
        first.put(message("a", number))
    first.stop(10.0)
    assert first.num_accepted == 200 and first.num_dropped == 0 and not store.entries
    store.is_away = False
    start()
    wait_until(lambda: len(store.entries) == 200)
    assert store.payloads("a") == numbers(200)


def test_stopping_sends_what_waits(store: FakeStore, start: Start) -> None:
    publisher = start()
    for number in range(400):
        publisher.put(message("a", number))
    publisher.stop(30.0)
    assert store.payloads("a") == numbers(400)


def test_what_the_bound_does_not_take_is_counted_and_said_once(
    store: FakeStore, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    store.gate.clear()
    publisher = start(max_entries=10)
    for number in range(50):
        publisher.put(message("a", number))
    wait_until(lambda: publisher.num_accepted + publisher.num_dropped == 50)
    for number in range(50, 60):
        publisher.put(message("a", number))
    wait_until(lambda: publisher.num_dropped == 50)
    assert publisher.num_accepted == 10 and not publisher.healthy
    assert caplog.text.count("the spool is full: 10 entries wait in it") == 1
    store.gate.set()
    wait_until(lambda: publisher.num_sent == 10)
    publisher.put(message("a", 60))
    wait_until(lambda: publisher.num_sent == 11)
    assert store.entries[-1].id.endswith("-60"), "the jump of seq shows the loss"


def test_a_disk_that_fails_stops_nothing_and_lets_the_messages_go_live(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    live: list[Outgoing] = []
    publisher = start(path=tmp_path / "file" / "spool.sqlite", on_disk_failure=live.append)
    for number in range(30):
        publisher.put(message("a", number))
    wait_until(lambda: len(live) == 30)
    assert [outgoing.payload for outgoing in live] == numbers(30)
    assert publisher.num_dropped == 30 and not publisher.healthy
    assert caplog.text.count("cannot use the spool") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system, for a disk that is really full")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_what_comes_meanwhile_and_nothing_that_was_accepted(
    store: FakeStore, start: Start, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.is_away = True
    live: list[Outgoing] = []
    publisher = start(path=small_disk / "spool.sqlite", on_disk_failure=live.append)
    number = 0
    while not publisher.num_dropped:  # the spool itself fills the disk
        publisher.put(Outgoing("a", "detections", b"%d " % number + bytes(10_000), stored=True))
        number += 1
        wait_until(lambda: publisher.num_accepted + publisher.num_dropped == number)  # noqa: B023
        assert number < 1000
    num_accepted = publisher.num_accepted
    assert num_accepted > 10 and "the disk is full" in caplog.text and not live
    store.is_away = False
    wait_until(lambda: publisher.num_sent == num_accepted)
    assert [int(payload.split()[0]) for payload in store.payloads("a")] == list(range(num_accepted))
    while publisher.num_sent == num_accepted:  # what was sent leaves the disk, which needs room for a while
        publisher.put(message("a", 0))
        time.sleep(0.05)
    assert caplog.text.count("the disk is full") == 1


def test_a_damaged_spool_is_said_and_the_daemon_goes_on(
    store: FakeStore, start: Start, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(bytes(range(256)) * 100)
    publisher = start()
    publisher.put(message("a", 0))
    wait_until(lambda: publisher.num_sent == 1)
    assert "spool.sqlite is damaged" in caplog.text and "damaged-" in caplog.text


def test_the_next_owner_of_the_file_waits_for_it_and_loses_nothing(store: FakeStore, start: Start) -> None:
    before = start()
    before.put(message("a", 0))
    wait_until(lambda: before.num_sent == 1)
    after = start()  # as a reload does: the new one before the old one ends
    after.put(message("a", 1))
    before.stop(10.0)
    wait_until(lambda: after.num_sent == 1)
    assert after.num_dropped == 0 and store.payloads("a") == numbers(2)


def test_a_bug_is_told_to_the_daemon(store: FakeStore, start: Start) -> None:
    crashes: list[Exception] = []
    store.store = lambda entries: [][0]  # type: ignore[method-assign]
    publisher = start(on_crash=crashes.append)
    publisher.put(message("a", 0))
    wait_until(lambda: len(crashes) == 1)
    assert not publisher.healthy


def test_an_old_epoch_after_a_new_one_is_no_repeat() -> None:
    repeats = Repeats()
    assert [repeats.has("a", entry_id) for entry_id in ("x-0", "x-1", "y-0", "x-1", "x-2", "y-0")] == [
        *(False, False, False, True, False, True)
    ]
    assert not repeats.has("b", "x-0")


@pytest.mark.parametrize("entry_id", ["", "x", "-1", "x-", "x-y", "x-²"])
def test_an_id_of_another_form_is_never_a_repeat(entry_id: str) -> None:
    repeats = Repeats()
    assert not repeats.has("a", entry_id) and not repeats.has("a", entry_id)


def test_few_epochs_are_remembered() -> None:
    repeats = Repeats()
    for epoch in range(MAX_EPOCHS + 1):
        assert not repeats.has("a", f"{epoch}-0")
    assert repeats.has("a", "1-0") and not repeats.has("a", "0-0")
