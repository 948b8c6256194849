"""Several daemons over one Redis Cluster, and what becomes of a stream whose daemon is gone."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from redis.cluster import RedisCluster

from streamd.client import subscribe
from streamd.control_client import ask
from streamd.control_messages import AddRequest, ListRequest
from streamd.redis_connection import make_client
from streamd.wire import stream_key
from tests.daemon_process import READY_WITHIN_S, DaemonProcess
from tests.redis_cases import cluster_redis

WITHIN_S = 60.0
FPS = 10
PAUSE_MS = 60_000


@pytest.fixture
def cluster_url() -> Iterator[str]:
    with cluster_redis() as url:
        yield url


@pytest.fixture
def cluster(cluster_url: str) -> Iterator[RedisCluster]:
    client = make_client(cluster_url, reply_timeout_s=5.0)
    assert isinstance(client, RedisCluster)
    yield client
    client.close()


class Machine:
    """A daemon with a spool and a control socket of its own, as on a machine of its own."""

    def __init__(
        self, folder: Path, model: Path, cluster_url: str, streams: dict[str, Path], *, spool: Path | None = None
    ) -> None:
        folder.mkdir()
        self.spool = spool or folder / "spool.sqlite"
        self.control = folder / "control.sock"
        self.process = DaemonProcess(
            folder,
            {
                "defaults": {"delivery": "stored", "loop": True, "fps": FPS},
                "models": {"people": {"path": str(model), "workers": 1, "threads": 1, "max_batch": 1}},
                "streams": {name: {"url": str(clip)} for name, clip in streams.items()},
                "publish": {
                    "zeromq": None,
                    "redis": {"url": cluster_url, "max_len": 100_000},
                    "spool": {"path": str(self.spool)},
                },
                "metrics": {"listen": None},
                "control": {"path": str(self.control)},
            },
        )

    def wait_until_ready(self) -> None:
        self.process.wait_for_notification("READY=1", READY_WITHIN_S)

    def add(self, stream: str, clip: Path) -> None:
        """Do what `streamd streams add` does."""
        ask(self.control, AddRequest(name=stream, settings={"url": str(clip)}), WITHIN_S)

    def num_published(self, stream: str) -> int:
        streams = ask(self.control, ListRequest(), WITHIN_S).streams
        assert streams is not None
        return next(entry.published for entry in streams if entry.status.stream == stream)

    def left_in_spool(self, folder: Path) -> list[str]:
        """Return the ids of what a killed daemon left; reads a copy, so that nothing is changed."""
        folder.mkdir()
        for part in self.spool.parent.glob("spool.sqlite*"):
            shutil.copy(part, folder)
        with closing(sqlite3.connect(folder / self.spool.name)) as database:
            return [entry_id for (entry_id,) in database.execute("SELECT id FROM entries ORDER BY number")]


def wait_for(holds: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {WITHIN_S} s: {what}"
        time.sleep(0.1)


def ids_in(cluster: RedisCluster, stream: str) -> list[str]:
    """Return the ids, <life>-<number>, of a Redis Stream's entries as they stand in it."""
    entries: Any = cluster.xrange(stream_key(stream))
    return [fields[b"id"].decode() for _, fields in entries]


def numbers_of(ids: list[str], life: str) -> list[int]:
    return [int(number) for one, _, number in (entry_id.rpartition("-") for entry_id in ids) if one == life]


@pytest.mark.slow
def test_three_daemons_share_a_cluster_and_a_stream_moves_to_another_when_its_daemon_is_killed(
    cluster_url: str, cluster: RedisCluster, untrained_artifact: Path, demo_clip: Path, tmp_path: Path
) -> None:
    names = {"a": "gate", "b": "yard", "c": "door"}
    with ExitStack() as stack:
        machines = {
            name: Machine(tmp_path / name, untrained_artifact, cluster_url, {stream: demo_clip})
            for name, stream in names.items()
        }
        for machine in machines.values():
            stack.push(machine.process.__exit__)
            machine.process.start()
        for machine in machines.values():
            machine.wait_until_ready()
        assert_all_arrive_in_order(cluster_url, set(names.values()))

        # The node that has the stream hangs, so that results wait in the spool when the daemon is killed.
        node = cluster.get_node_from_key(stream_key("door"))
        assert node is not None
        cluster.execute_command("CLIENT PAUSE", PAUSE_MS, "WRITE", target_nodes=node)
        seen = machines["c"].num_published("door")
        wait_for(lambda: machines["c"].num_published("door") >= seen + 2 * FPS, "detection goes on")
        machines["c"].process.stop(signal.SIGKILL)
        life, _, newest = (left := machines["c"].left_in_spool(tmp_path / "copy"))[-1].rpartition("-")
        assert max(numbers_of(ids_in(cluster, "door"), life)) < int(newest), "something waits in the spool"
        cluster.execute_command("CLIENT UNPAUSE", target_nodes=node)

        # Another daemon takes the stream. It knows nothing of the first one's life or spool.
        machines["a"].add("door", demo_clip)
        wait_for(lambda: lives_in(cluster, "door") > {life}, "the stream goes on")
        assert max(numbers_of(ids_in(cluster, "door"), life)) < int(newest), "the dead one's spool is where it was"

        # A daemon that gets the dead one's spool sends what is in it, whatever streams it reads itself.
        spool = machines["c"].spool
        heir = Machine(tmp_path / "heir", untrained_artifact, cluster_url, {"roof": demo_clip}, spool=spool)
        stack.push(heir.process.__exit__)
        heir.process.start()
        heir.wait_until_ready()
        wait_for(lambda: left[-1] in ids_in(cluster, "door"), "what the dead one had accepted comes")
        numbers = numbers_of(ids_in(cluster, "door"), life)
        assert [*dict.fromkeys(numbers)] == [*range(int(newest) + 1)], "all of it, in order, repeats apart"
        assert_all_arrive_in_order(cluster_url, {*names.values(), "roof"})


def lives_in(cluster: RedisCluster, stream: str) -> set[str]:
    return {entry_id.rpartition("-")[0] for entry_id in ids_in(cluster, stream)}


def assert_all_arrive_in_order(url: str, streams: set[str]) -> None:
    """Read all that the cluster has, up to now, with one subscriber: no life of a stream has a gap or goes back."""
    began_at, to_come = time.time(), set(streams)
    expected: dict[str, list[int]] = {stream: [] for stream in streams}  # what comes next of each life
    with subscribe(url, since="0", timeout_s=WITHIN_S) as messages:
        for message in messages:
            nexts = expected[message.stream]
            assert message.seq == 0 or message.seq in nexts, f"{message.stream}: {message.seq}, {nexts} are due"
            if message.seq:
                nexts.remove(message.seq)
            nexts.append(message.seq + 1)
            if message.captured_at_s > began_at:
                to_come.discard(message.stream)
            if not to_come:
                return
