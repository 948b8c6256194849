from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from streamd.threads import guarded, join, name_thread


def name_seen_by_the_system(name: str) -> str:
    seen: list[str] = []

    def work() -> None:
        name_thread(name)
        seen.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    return seen[0]


@pytest.mark.parametrize(
    ("name", "seen"), [("stream gate", "stream gate"), ("infer yolox_nano 0", "infer yolox_nan"), ("größe", "größe")]
)
def test_a_thread_has_the_first_fifteen_bytes_of_its_name(name: str, seen: str) -> None:
    assert name_seen_by_the_system(name) == seen


def test_other_threads_keep_their_names() -> None:
    main = Path("/proc/self/comm").read_text()
    name_seen_by_the_system("stream gate")
    assert Path("/proc/self/comm").read_text() == main


def test_a_crash_is_told_and_logged_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    crashes: list[Exception] = []
    thread = guarded("infer people 0", lambda: [].pop(), crashes.append)
    thread.start()
    assert join([thread], 10) == []
    assert [type(err) for err in crashes] == [IndexError]
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "infer people 0 crashed") and record.exc_info


def test_who_does_not_end_in_time_is_named_and_who_never_began_is_not_waited_for() -> None:
    stop = threading.Event()

    def wait() -> None:
        stop.wait()

    hung, done, unborn = (guarded(name, wait, lambda err: None) for name in ("hung", "done", "unborn"))
    hung.start()
    assert join([unborn, hung], 0.05) == ["hung"]
    stop.set()
    done.start()
    assert join([unborn, hung, done], 10) == []
