"""The spool: entries on disk until Redis has confirmed them, in an SQLite database."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

from streamd.errors import PublishError
from streamd.wire import Kind

MAX_READ_ENTRIES = 128
MAX_READ_BYTES = 4 << 20
ENTRY_OVERHEAD_BYTES = 100  # of a row beside its payload, about
REOPEN_INTERVAL_S = 5.0
LOCK_WAIT_S = 5.0  # after a reload the publisher of before still has the file for a moment
MAX_FREE_PAGES = 64  # of 4 KiB, that the file keeps though it is mostly free
PAGES_A_COMMIT = 256  # that it gives back at most: about 6 ms
MAX_DAMAGED_FILES = 3  # kept for who wants to look into them

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    stream TEXT NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    payload BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_stream ON entries (stream, number);
"""
_SIDE_FILES = ("-wal", "-shm")
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Entry(NamedTuple):
    """One message on its way into a Redis Stream."""

    stream: str
    kind: Kind
    id: str  # <epoch>-<seq>: by it a reader knows a repeat
    payload: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.payload) + ENTRY_OVERHEAD_BYTES


class Mark(NamedTuple):
    """How far a stream was read, in which file."""

    file: int  # counts the files of this process
    number: int


class Spool:
    """A bounded queue on disk for each stream, for any number of threads.

    What `add` has taken is on the disk and survives the process and the machine. What is confirmed is deleted with the
    next `add`, so a killed daemon sends it again. A damaged file is moved aside and a new one begun; every other
    failure raises PublishError, and the next call tries again.
    """

    def __init__(
        self, path: Path, max_entries: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()  # guards all that follows
        self._database: sqlite3.Connection | None = None
        self._failure = ""
        self._next_open = float("-inf")
        self._waiting: dict[str, int] = {}  # stream -> entries that Redis has not confirmed
        self._num_bytes = 0
        self._confirmed: dict[str, int] = {}  # stream -> number up to which nothing is sent again
        self._num_files = 1
        self._has_garbage = False  # confirmed and not yet deleted
        self._notices: list[str] = []
        self._nothing = threading.Event()  # never set: a wait for the lock of the file
        self.num_damaged = 0  # entries that a damaged file took with it

    @property
    def path(self) -> Path:
        return self._path

    @property
    def num_entries(self) -> int:
        """Entries that Redis has not confirmed; does not wait for the disk."""
        return sum(self._waiting.copy().values())

    @property
    def num_bytes(self) -> int:
        """Bytes of these entries, about."""
        return self._num_bytes

    @property
    def has_garbage(self) -> bool:
        """Whether something is confirmed and not yet deleted."""
        return self._has_garbage

    def waiting(self) -> dict[str, int]:
        """Return how many entries of each stream wait; empty streams are left out."""
        with self._lock:
            return dict(self._waiting)

    def take_notices(self) -> list[str]:
        """Return what the operator must hear of damaged files, once."""
        with self._lock:
            notices, self._notices = self._notices, []
        return notices

    def add(self, entries: Sequence[Entry]) -> int:
        """Write as many as the bounds allow, from the first on, and return how many; they are then on the disk."""
        with self._using() as database:
            room = self._room_for(entries)
            database.execute("BEGIN")
            for stream, number in self._confirmed.items() if self._has_garbage else ():
                database.execute("DELETE FROM entries WHERE stream = ? AND number <= ?", (stream, number))
            database.executemany("INSERT INTO entries (stream, kind, id, payload) VALUES (?, ?, ?, ?)", entries[:room])
            database.execute("COMMIT")
            self._has_garbage = False
            for entry in entries[:room]:
                self._waiting[entry.stream] = self._waiting.get(entry.stream, 0) + 1
                self._num_bytes += entry.num_bytes
            _give_back(database)
            return room

    def oldest(self, stream: str) -> tuple[list[Entry], Mark]:
        """Return the next entries of a stream, in order, and the mark by which to confirm them."""
        entries: list[Entry] = []
        last = num_bytes = 0
        with self._using() as database:
            rows = database.execute(
                "SELECT number, kind, id, payload FROM entries WHERE stream = ? AND number > ? ORDER BY number LIMIT ?",
                (stream, self._confirmed.get(stream, 0), MAX_READ_ENTRIES),
            )
            for number, kind, entry_id, payload in rows:
                last = number
                entries.append(Entry(stream, cast(Kind, kind), entry_id, payload))
                num_bytes += len(payload)
                if num_bytes >= MAX_READ_BYTES:
                    break
            rows.close()
            return entries, Mark(self._num_files, last)

    def confirm(self, entries: Sequence[Entry], mark: Mark) -> None:
        """Take note that Redis has what `oldest` returned."""
        stream = entries[0].stream
        with self._lock:
            if mark.file != self._num_files:  # it was moved aside meanwhile
                return
            self._confirmed[stream] = mark.number
            self._has_garbage = True
            self._num_bytes -= sum(entry.num_bytes for entry in entries)
            self._waiting[stream] -= len(entries)
            if self._waiting[stream] <= 0:
                del self._waiting[stream]

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def _room_for(self, entries: Sequence[Entry]) -> int:
        room_entries = max(0, self._max_entries - sum(self._waiting.values()))
        room_bytes = self._max_bytes - self._num_bytes
        for number, entry in enumerate(entries[:room_entries]):
            room_bytes -= entry.num_bytes
            if room_bytes < 0:
                return number
        return min(room_entries, len(entries))

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """Yield the open database, and end what fails in it with PublishError."""
        with self._lock:
            try:
                yield self._database or self._open()
            except (sqlite3.Error, OSError) as err:
                if _kind(err) == sqlite3.SQLITE_FULL and self._has_rolled_back():
                    raise PublishError(f"cannot write to the spool {self._path}: {_explain(err)}") from err
                self._disconnect()  # which also rolls back
                self._next_open = self._clock() + REOPEN_INTERVAL_S
                self._failure = f"cannot use the spool {self._path}: {_explain(err)}"
                if _is_damage(err):
                    with suppress(OSError):
                        self._move_aside(err)
                        self._next_open = float("-inf")
                raise PublishError(self._failure) from err

    def _has_rolled_back(self) -> bool:
        """Undo the transaction, so that what is in the file can be read and sent though the disk is full.

        SQLite needs room to delete. Where nothing waits, the whole file goes, with what was sent.
        """
        try:
            if self._database is None:
                return False
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        except sqlite3.Error:
            return False
        if self._has_garbage and not self._waiting:
            self._disconnect()
            for suffix in ("", *_SIDE_FILES):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._begin_file()
        return True

    def _open(self) -> sqlite3.Connection:
        if self._clock() < self._next_open:
            raise PublishError(self._failure)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline = self._clock() + LOCK_WAIT_S
        while True:
            try:
                return self._connect()
            except sqlite3.DatabaseError as err:
                self._disconnect()
                if _is_damage(err):
                    self._move_aside(err)
                elif _kind(err) != sqlite3.SQLITE_BUSY or self._clock() >= deadline:
                    raise
                else:
                    self._nothing.wait(0.05)

    def _connect(self) -> sqlite3.Connection:
        if not self._path.exists():  # else closing it here would release the locks that this process may hold on it
            self._path.touch(mode=0o600)
        database = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
        self._database = database
        # Exclusive: a second daemon on the same file would send everything twice and out of order.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the journal's mode, which begins the file
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # in WAL mode only FULL reaches the disk with each commit
        database.execute("PRAGMA journal_size_limit = 16777216")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Damage(verdict)
        database.executescript(_SCHEMA)
        self._has_garbage = bool(self._confirmed)
        self._waiting, self._num_bytes = {}, 0
        for (stream,) in database.execute("SELECT DISTINCT stream FROM entries").fetchall():
            num_entries, num_bytes = database.execute(
                "SELECT COUNT(*), SUM(LENGTH(payload)) FROM entries WHERE stream = ? AND number > ?",
                (stream, self._confirmed.get(stream, 0)),
            ).fetchone()
            if num_entries:
                self._waiting[stream] = num_entries
                self._num_bytes += num_bytes + num_entries * ENTRY_OVERHEAD_BYTES
        return database

    def _disconnect(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    def _move_aside(self, err: Exception) -> None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self._path.with_name(f"{self._path.name}.damaged-{now}")
        self._path.rename(aside)
        for suffix in _SIDE_FILES:
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        for old in sorted(self._path.parent.glob(f"{self._path.name}.damaged-*Z"))[:-MAX_DAMAGED_FILES]:
            for suffix in ("", *_SIDE_FILES):
                old.with_name(old.name + suffix).unlink(missing_ok=True)
        lost = sum(self._waiting.values())
        self.num_damaged += lost
        known = f"{lost} entries" if lost else "an unknown number of entries"
        self._notices.append(f"{self._path} is damaged ({err}): moved to {aside} with {known}, and a new one is begun")
        self._begin_file()

    def _begin_file(self) -> None:
        self._waiting, self._num_bytes, self._confirmed, self._has_garbage = {}, 0, {}, False
        self._num_files += 1


def _give_back(database: sqlite3.Connection) -> None:
    """Shorten a file that is mostly free: after hours without Redis it would be as long for ever.

    Where it fails, on a full disk for example, what was added stays, and the next commit tries again.
    """
    with suppress(sqlite3.Error):
        (num_free,) = database.execute("PRAGMA freelist_count").fetchone()
        (num_pages,) = database.execute("PRAGMA page_count").fetchone()
        if num_free > max(MAX_FREE_PAGES, num_pages // 2):
            # By `execute` Python would run it to its first page alone.
            database.executescript(f"PRAGMA incremental_vacuum({PAGES_A_COMMIT})")


class _Damage(sqlite3.DatabaseError):
    """SQLite opened the file and found damage in it."""


def _is_damage(err: Exception) -> bool:
    return isinstance(err, _Damage) or _kind(err) in _DAMAGE


def _kind(err: Exception) -> int:
    """Return SQLite's primary code, which is the low byte of the extended one; -1 where it is another's error."""
    code: int | None = getattr(err, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


def _explain(err: Exception) -> str:
    advice = {
        sqlite3.SQLITE_BUSY: "another process uses it; give each daemon a publish.spool.path of its own",
        sqlite3.SQLITE_FULL: "the disk is full; make room or lower publish.spool.max_mb",
        sqlite3.SQLITE_CANTOPEN: "not allowed, or no such folder; give a publish.spool.path that the daemon may write",
        sqlite3.SQLITE_READONLY: "the disk or the file is read-only",
    }.get(_kind(err))
    return f"{advice} ({err})" if advice else str(err)
