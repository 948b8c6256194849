"""Be the far end of a publisher, in a process of its own: read everything, and do nothing with it.

python -m benchmarks.scale.listener zeromq tcp://127.0.0.1:5555
python -m benchmarks.scale.listener redis redis://127.0.0.1:6379
"""

from __future__ import annotations

import sys

import redis
import zmq


def drain_zeromq(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        monitor = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        subscriber.subscribe(b"streamd/")
        subscriber.connect(endpoint)
        monitor.recv_multipart()
        print("connected", flush=True)
        while True:
            subscriber.recv_multipart()


def drain_redis(url: str) -> None:
    with redis.Redis.from_url(url) as client, client.pubsub() as subscriber:
        subscriber.psubscribe("streamd:*")
        for message in subscriber.listen():
            if message["type"] == "psubscribe":
                print("connected", flush=True)


if __name__ == "__main__":
    {"zeromq": drain_zeromq, "redis": drain_redis}[sys.argv[1]](sys.argv[2])
