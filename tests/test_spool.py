"""The spool on a real disk: bounds, order, a second life, damage, a full disk, and two daemons on one file."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.errors import PublishError
from streamd.publish import spool as spool_module
from streamd.publish.spool import ENTRY_OVERHEAD_BYTES, MAX_READ_BYTES, MAX_READ_ENTRIES, Entry, Spool


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0  # so that a wait for the lock ends soon
        return self.now_s


def make_spool(path: Path, max_entries: int = 1000, max_bytes: int = 1 << 30) -> Spool:
    return Spool(path, max_entries, max_bytes, clock=Clock())


def entry(stream: str, seq: int, payload: bytes = b"{}") -> Entry:
    return Entry(stream, "detections", f"abc-{seq}", payload)


def entries(stream: str, *seqs: int) -> list[Entry]:
    return [entry(stream, seq) for seq in seqs]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool.sqlite"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    spool = make_spool(path)
    yield spool
    spool.close()


def test_entries_come_back_in_order_and_by_stream(spool: Spool) -> None:
    assert spool.add([entry("a", 0), entry("b", 0), entry("a", 1)]) == 3
    assert spool.oldest("a")[0] == entries("a", 0, 1)
    assert spool.waiting() == {"a": 2, "b": 1}


def test_what_is_confirmed_is_gone_and_the_rest_waits(spool: Spool) -> None:
    spool.add(entries("a", *range(300)))
    first, mark = spool.oldest("a")
    spool.confirm(first, mark)
    assert len(first) == MAX_READ_ENTRIES and spool.has_garbage
    assert spool.oldest("a")[0][0] == entry("a", MAX_READ_ENTRIES)
    spool.add([])
    assert spool.waiting() == {"a": 300 - MAX_READ_ENTRIES}


def test_a_batch_to_send_is_bounded_in_bytes(spool: Spool) -> None:
    spool.add([entry("a", seq, b"x" * (MAX_READ_BYTES // 2)) for seq in range(5)])
    assert len(spool.oldest("a")[0]) == 2


def test_a_second_life_finds_what_was_not_confirmed(path: Path) -> None:
    before = make_spool(path)
    before.add(entries("a", *range(200)))
    before.confirm(*before.oldest("a"))
    before.close()  # the deletion was not written yet
    after = make_spool(path)
    after.add(entries("a", 200))
    assert after.waiting() == {"a": 201} and after.oldest("a")[0][0] == entry("a", 0)
    after.close()


def test_the_bounds_keep_what_was_accepted(path: Path) -> None:
    spool = make_spool(path, max_entries=3)
    assert spool.add(entries("a", 0, 1)) == 2
    assert spool.add(entries("b", 0, 1)) == 1
    assert spool.add(entries("a", 2)) == 0
    spool.confirm(*spool.oldest("a"))
    assert spool.add(entries("a", 3, 4, 5)) == 2
    assert spool.oldest("a")[0] == entries("a", 3, 4)
    spool.close()


def test_the_bytes_are_bounded_too_and_counted_in_a_second_life(path: Path) -> None:
    size = 1000 + ENTRY_OVERHEAD_BYTES
    spool = make_spool(path, max_bytes=2 * size)
    assert spool.add([entry("a", seq, bytes(1000)) for seq in range(3)]) == 2
    spool.close()
    again = make_spool(path, max_bytes=2 * size)
    assert again.add([entry("a", 3, bytes(1000))]) == 0 and again.num_bytes == 2 * size
    again.confirm(*again.oldest("a"))
    assert again.num_bytes == 0 and again.add([entry("a", 4, bytes(1000))]) == 1
    again.close()


def test_only_the_owner_may_read_the_file(path: Path, spool: Spool) -> None:
    spool.add(entries("a", 0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("size", [100, 4096, 100_000])
def test_a_file_of_random_bytes_is_moved_aside_and_a_new_one_begun(path: Path, size: int) -> None:
    path.parent.mkdir()
    garbage = os.urandom(size)
    path.write_bytes(garbage)
    spool = make_spool(path)
    assert spool.add(entries("a", 0)) == 1
    (aside,) = path.parent.glob("spool.sqlite.damaged-*")
    assert aside.read_bytes() == garbage
    (notice,) = spool.take_notices()
    assert str(aside) in notice and "a new one is begun" in notice
    assert not spool.take_notices()
    spool.close()


def test_damage_in_the_middle_of_a_spool_is_found_at_the_start(path: Path) -> None:
    spool = make_spool(path)
    spool.add([entry("a", seq, os.urandom(500)) for seq in range(500)])
    spool.close()
    with path.open("r+b") as file:
        for page in range(3, path.stat().st_size // 4096, 2):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    again = make_spool(path)
    assert again.add(entries("a", 0)) == 1
    assert again.waiting() == {"a": 1} and len(again.take_notices()) == 1
    again.close()


def test_damage_found_at_work_begins_a_new_file_and_nothing_of_the_old_confirms_the_new(path: Path) -> None:
    spool = make_spool(path)
    spool.add(entries("a", *range(5)))
    sent = spool.oldest("a")
    spool.close()  # as after any failure; the next call opens the file
    path.write_bytes(os.urandom(50_000))
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    assert spool.add(entries("a", 5)) == 1
    assert spool.num_damaged == 5
    spool.confirm(*sent)
    assert spool.oldest("a")[0] == entries("a", 5) and spool.waiting() == {"a": 1}
    spool.close()


def test_few_damaged_files_are_kept(path: Path) -> None:
    for _ in range(spool_module.MAX_DAMAGED_FILES + 2):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(1000))
        spool = make_spool(path)
        spool.add([])
        spool.close()
    assert len(list(path.parent.glob("*.damaged-*"))) == spool_module.MAX_DAMAGED_FILES


def test_a_full_disk_is_told_and_the_next_try_goes_on(path: Path, spool: Spool) -> None:
    spool.add(entries("a", 0))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # the kernel refuses to let a file grow
    try:
        with pytest.raises(PublishError, match=r"cannot use the spool .*spool\.sqlite"):
            spool.add([entry("a", seq, os.urandom(50_000)) for seq in range(1, 5)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with pytest.raises(PublishError):
        spool.add(entries("a", 5))  # not at once, or each batch would wait for a broken disk
    spool._clock.now_s += 60  # type: ignore[attr-defined]
    assert spool.add(entries("a", 6)) == 1
    assert spool.oldest("a")[0] == entries("a", 0, 6)


def test_a_file_that_was_long_gives_its_room_back_when_redis_has_all(path: Path) -> None:
    spool = make_spool(path, max_entries=20_000)
    spool.add([entry("a", seq, b"x" * 1000) for seq in range(10_000)])
    spool.add([entry("b", 0)])
    longest = path.stat().st_size
    assert longest > 10_000_000
    while "a" in spool.waiting():
        spool.confirm(*spool.oldest("a"))
        spool.add([])
    for seq in range(1, 1500):  # SQLite shortens the file when it copies its journal into it, every 1000 pages
        spool.add([entry("b", seq)])
    assert path.stat().st_size < longest // 5
    assert spool.oldest("b")[0] == entries("b", *range(MAX_READ_ENTRIES)), "what waits is still there, in order"
    spool.close()
    again = make_spool(path)
    assert again.add([]) == 0 and again.waiting() == {"b": 1500}
    again.close()


def test_room_that_cannot_be_given_back_loses_nothing(spool: Spool) -> None:
    spool.add([entry("a", seq, b"x" * 100_000) for seq in range(20)])
    while spool.waiting():
        spool.confirm(*spool.oldest("a"))
    refused: list[str] = []

    def authorize(action: int, argument: str | None, *_: str | None) -> int:
        if argument != "incremental_vacuum":
            return sqlite3.SQLITE_OK
        refused.append(argument)
        return sqlite3.SQLITE_DENY

    assert spool._database is not None
    spool._database.set_authorizer(authorize)
    assert spool.add(entries("a", 20, 21)) == 2
    assert refused, "there was room to give back"
    assert spool.oldest("a")[0] == entries("a", 20, 21)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="cannot use the spool"):
        make_spool(tmp_path / "file" / "spool.sqlite").add(entries("a", 0))


def test_a_second_process_on_the_file_is_refused(path: Path, spool: Spool) -> None:
    spool.add(entries("a", 0))
    second = make_spool(path)
    with pytest.raises(PublishError, match="another process uses it"):
        second.add(entries("a", 0))
    second.close()
    assert spool.add(entries("a", 1)) == 1


def test_numbers_are_never_used_again(path: Path, spool: Spool) -> None:
    spool.add(entries("a", 0))
    spool.confirm(*spool.oldest("a"))
    spool.add([])  # now the table is empty
    spool.add(entries("a", 1))
    assert spool.oldest("a")[0] == entries("a", 1)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(path, timeout=0).execute("SELECT * FROM entries")
