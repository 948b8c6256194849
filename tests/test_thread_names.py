from __future__ import annotations

import threading
from pathlib import Path

import pytest

from streamd.thread_names import name_thread


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
