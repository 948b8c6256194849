"""Say when each message of a daemon came, in a process that does nothing else.

    python -m benchmarks.faults.receiver DAEMON_ENDPOINT BENCH_ENDPOINT

What the bench does beside it, which plays the cameras at fault, would otherwise hold Python's lock when a message of a
healthy stream comes, and be taken for the daemon's doing. Each message goes on to the bench with its time before it;
an empty one says at first that the receiver is connected. It ends with its parent.
"""

from __future__ import annotations

import os
import struct
import sys
import time

import zmq

STAMP = struct.Struct("d")  # Unix s
_LOOK_MS = 500  # for the parent


def main(daemon: str, bench: str) -> None:
    parent = os.getppid()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.SUB) as subscriber, context.socket(zmq.PUSH) as to_bench:
        subscriber.setsockopt(zmq.RCVHWM, 0)
        subscriber.setsockopt(zmq.RECONNECT_IVL, 50)  # ms
        subscriber.subscribe(b"streamd/")
        subscriber.connect(daemon)
        to_bench.setsockopt(zmq.SNDHWM, 0)
        to_bench.setsockopt(zmq.LINGER, 0)
        to_bench.connect(bench)
        to_bench.send(b"")
        while os.getppid() == parent:
            if subscriber.poll(_LOOK_MS):
                message = subscriber.recv_multipart()
                to_bench.send_multipart([STAMP.pack(time.time()), *message])


if __name__ == "__main__":
    main(*sys.argv[1:])
