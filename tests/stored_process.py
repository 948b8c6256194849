"""A daemon's half of "at least once", to be killed: python -m tests.stored_process URL SPOOL LIFE.

Puts numbered messages of three streams and prints again and again how many were accepted; payloads are LIFE:NUMBER.
"""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path

from streamd.backoff import Backoff
from streamd.publish import Outgoing
from streamd.publish.redis_streams import RedisStore
from streamd.publish.spool import Spool
from streamd.publish.stored import StoredPublisher

STREAMS = ("gate", "yard", "door")
MAX_AHEAD = 300  # messages put and not yet accepted; the queue is larger
KEEP = 10_000_000  # entries of a Redis Stream: nothing is trimmed


def make_publisher(url: str, path: Path) -> StoredPublisher:
    """Make what the daemon makes, with a back-off that suits a test."""
    spool = Spool(path, max_entries=10_000_000, max_bytes=1 << 40)
    return StoredPublisher(RedisStore(url, KEEP), spool, backoff=lambda: Backoff(base_s=0.02, ceiling_s=0.2))


def main() -> None:
    url, path, life = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    publisher = make_publisher(url, path)
    publisher.start()
    pause = threading.Event()  # never set
    for number in itertools.count():
        publisher.put(Outgoing(STREAMS[number % len(STREAMS)], "detections", f"{life}:{number}".encode(), stored=True))
        if number % 20 == 0:
            print(publisher.num_accepted, publisher.num_dropped, flush=True)
        while number - publisher.num_accepted > MAX_AHEAD:
            pause.wait(0.002)
            print(publisher.num_accepted, publisher.num_dropped, flush=True)


if __name__ == "__main__":
    main()
