"""The service on a real systemd, booted in a container: installed by its command, run, hurt, changed, removed.

One boot and one story: the tests follow each other in this order, and each leaves the service running for the next.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clips import white, write_clip
from tests.hanging_model import INPUT_SIZE, export_hanging_model
from tests.nspawn import PROGRAM, BootFailure, Container, missing_for_nspawn

pytestmark = pytest.mark.slow

WITHIN_S = 150.0  # a loaded machine loads torch slowly
CONFIG = "/etc/streamd/streamd.yaml"
UNIT = "streamd.service"
PLAIN, CREDENTIAL, REDIS = "plain-hunter-22", "credential/hunter 23", "redis-hunter-24"
# What a test cannot wait for; everything else is as shipped.
SHORTER = "[Service]\nWatchdogSec=12\nRestartSec=1\n"

Message = dict[str, Any]


class Machine:
    """A booted container and the folder that is its /etc/streamd."""

    def __init__(self, container: Container, etc: Path) -> None:
        self.container = container
        self._etc = etc
        size = (INPUT_SIZE[1], INPUT_SIZE[0])
        assert size == (96, 64), "the clips are of this shape"
        long = {"url": "/srv/streamd/long.mp4"}
        self.config: dict[str, Any] = {
            "models": {"m": {"path": "/srv/streamd/hanging.pt", "workers": 1, "threads": 1, "max_batch": 2}},
            "streams": {
                "steady": long,
                "leaving": {**long, "delivery": "stored"},  # Redis is away: into the spool
                # Nobody listens there: a camera that is away must not keep the service from starting.
                "away": {"url": f"rtsp://viewer:{PLAIN}@127.0.0.1:9/stream"},
                "locked": {"url": "rtsp://viewer:${file:credentials/locked}@127.0.0.1:9/stream"},
            },
            "publish": {"redis": {"url": "redis://:${file:credentials/redis}@127.0.0.1:9/0"}},
            "metrics": {"log_interval_s": 2},
        }

    def write(self, config: dict[str, Any], name: str = "streamd") -> None:
        (self._etc / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def streamd(self, *words: str, check: bool = True) -> str:
        return self.container.run(PROGRAM, *words, check=check, within_s=WITHIN_S)

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.container.run("systemctl", *words, check=check, within_s=WITHIN_S)

    def is_active(self, num_restarts: int) -> bool:
        """Tell whether the service is up for the (1 + n)th time."""
        show = self.container.show
        return show(UNIT, "NRestarts") == str(num_restarts) and show(UNIT, "ActiveState") == "active"

    def num_spooled(self) -> int:
        """Count the entries that wait for Redis on the disk."""
        state = json.loads(self.streamd("status", "--json"))
        (spool,) = [publisher["spool"] for publisher in state["publishers"] if publisher.get("spool")]
        return int(spool["entries"])

    def logged_at_us(self, words: str) -> int:
        """Say when, on the monotonic clock, the unit's journal first has a line with these words."""
        lines = self.container.run("journalctl", f"--unit={UNIT}", "--output=json", "--no-pager").splitlines()
        entries = (json.loads(line) for line in lines)
        return next(int(entry["__MONOTONIC_TIMESTAMP"]) for entry in entries if words in str(entry.get("MESSAGE")))

    @contextmanager
    def watching(self, folder: Path) -> Iterator[Callable[[], list[Message]]]:
        """Subscribe in the container; give what returns all messages so far."""
        out = folder / "messages.jsonl"
        with out.open("wb") as file:
            subscriber = subprocess.Popen(self.container.enter(PROGRAM, "watch", "--json"), stdout=file)
        try:
            yield lambda: [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        finally:
            subscriber.terminate()
            subscriber.wait(WITHIN_S)


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:.0f} s: {what}"
        time.sleep(0.3)


def results(messages: list[Message], stream: str) -> list[Message]:
    return [message for message in messages if message["stream"] == stream and "seq" in message]


def wait_for_results(messages: Callable[[], list[Message]], stream: str, num: int = 5) -> list[Message]:
    """Wait for `num` more results of a stream; return all messages so far."""
    before = len(results(messages(), stream))
    wait_for(lambda: len(results(messages(), stream)) >= before + num, f"{num} results of {stream}")
    return messages()


def assert_unbroken(messages: list[Message], stream: str) -> None:
    found = results(messages, stream)
    assert [one["seq"] for one in found] == list(range(found[0]["seq"], found[0]["seq"] + len(found)))
    assert {one["epoch"] for one in found} == {0}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if missing := missing_for_nspawn():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("machine")
    etc, credentials, media = folder / "etc", folder / "etc" / "credentials", folder / "media"
    for made in (etc, credentials, media):
        made.mkdir(mode=0o755)
    (credentials / "locked").write_text("credential%2Fhunter%2023\n")
    (credentials / "redis").write_text(f"{REDIS}\n")
    (etc / "private").touch(mode=0o600)
    export_hanging_model(media / "hanging.pt")
    write_clip(media / "long.mp4", 6000, fps=10, size=(96, 64))  # ten minutes: one that repeats begins a new epoch
    write_clip(media / "white.mp4", 30, fps=10, size=(96, 64), draw=white)
    try:
        with Container(folder, {etc: "/etc/streamd"}, {media: "/srv/streamd"}) as container:
            yield Machine(container, etc)
    except BootFailure as failure:
        pytest.skip(f"systemd-nspawn cannot boot a container here: {failure}")


def test_the_installed_service_is_active_only_when_its_models_are_warm(machine: Machine, tmp_path: Path) -> None:
    machine.write(machine.config)
    machine.container.run(
        "sh", "-c", f"mkdir -p /etc/systemd/system/{UNIT}.d; printf '{SHORTER}' >/etc/systemd/system/{UNIT}.d/test.conf"
    )
    said = machine.streamd("service", "install", CONFIG, "--now")
    assert "streamd.service: active (running)" in said
    began, active = (
        int(machine.container.show(UNIT, f"{name}TimestampMonotonic")) for name in ("InactiveExit", "ActiveEnter")
    )
    assert began < machine.logged_at_us("model m: hanging on cpu: 1 worker(s)") < active
    assert machine.container.show(UNIT, "NRestarts") == "0"
    with machine.watching(tmp_path) as messages:
        wait_for_results(messages, "steady")
    assert "active (running)" in machine.streamd("service", "status", CONFIG)
    assert "unchanged" in machine.streamd("service", "install", CONFIG)
    rights = machine.container.run("stat", "--format=%a %U %G", CONFIG, "/etc/streamd/credentials", "/var/lib/streamd")
    assert rights.splitlines() == ["640 root streamd", "700 root root", "750 streamd streamd"]


def test_a_reload_adds_a_model_and_adds_and_removes_streams_and_the_others_notice_nothing(
    machine: Machine, tmp_path: Path
) -> None:
    pid = machine.container.show(UNIT, "MainPID")
    streams = {name: stream for name, stream in machine.config["streams"].items() if name != "leaving"}
    fresh = {"url": "/srv/streamd/long.mp4", "model": "other"}
    changed = {
        **machine.config,
        "models": {**machine.config["models"], "other": machine.config["models"]["m"]},  # by a process of its own
        "defaults": {"model": "m"},
        "streams": {**streams, "fresh": fresh},
    }
    with machine.watching(tmp_path) as messages:
        wait_for_results(messages, "steady")
        wait_for_results(messages, "leaving")
        machine.write(changed)
        machine.systemctl("reload", UNIT)
        wait_for_results(messages, "fresh")
        since = len(messages())
        after = wait_for_results(messages, "steady", 20)
        assert results(after[since:], "leaving") == []

        machine.write({**changed, "streams": {**streams, "fresh": {**fresh, "fsp": 3}}})
        assert "failed" in machine.systemctl("reload", UNIT, check=False), "a wrong file is refused"
        assert "line " in machine.container.journal(UNIT) and "unknown key 'fsp'" in machine.container.journal(UNIT)
        machine.write(changed)
        assert_unbroken(wait_for_results(messages, "steady"), "steady")
        assert results(wait_for_results(messages, "fresh"), "fresh")
    said = machine.streamd("service", "install", CONFIG, "--now")
    assert "active (running)" in said and "wrote" not in said, "it only reads its file again"
    assert machine.container.show(UNIT, "MainPID") == pid


def test_a_killed_daemon_comes_back_and_publishes(machine: Machine, tmp_path: Path) -> None:
    """The stream whose entries wait for Redis is gone since the reload, so what is in the spool stays as it is."""
    num_waiting = machine.num_spooled()
    assert num_waiting > 0
    machine.container.run("kill", "-9", machine.container.show(UNIT, "MainPID"))
    wait_for(lambda: machine.is_active(num_restarts=1), "active again")
    assert machine.num_spooled() == num_waiting, "what was on disk is still to be sent"
    with machine.watching(tmp_path) as messages:
        wait_for_results(messages, "steady")


def test_a_model_that_hangs_is_noticed_by_the_watchdog(machine: Machine, tmp_path: Path) -> None:
    """The stream that makes it hang came by the control socket, so it is gone after the restart."""
    machine.streamd("streams", "add", "white", "/srv/streamd/white.mp4")
    wait_for(lambda: machine.is_active(num_restarts=2), "restarted by the watchdog")
    log = machine.container.journal(UNIT)
    assert "stuck: model m on cpu: one batch for" in log
    assert "Watchdog timeout" in log
    assert "Fatal Python error: Aborted" in log, "it says where its threads were"
    with machine.watching(tmp_path) as messages:
        wait_for_results(messages, "steady")


def test_a_wrong_configuration_is_78_and_is_not_tried_again(machine: Machine) -> None:
    machine.systemctl("stop", UNIT)
    machine.write({**machine.config, "streams": {"steady": {"url": "/srv/streamd/long.mp4", "fsp": 3}}})
    machine.systemctl("start", UNIT, check=False)
    for _ in range(5):  # systemd would start it again after a second
        assert machine.container.show(UNIT, "ActiveState") == "failed"
        time.sleep(1)
    assert machine.container.show(UNIT, "ExecMainStatus") == "78"
    assert machine.container.show(UNIT, "NRestarts") == "0"
    said = machine.streamd("service", "status", CONFIG, check=False)
    assert "exit code 78, the configuration or a model is wrong" in said
    assert "streams.steady: unknown key 'fsp' (did you mean 'fps'?)" in said


def test_stopping_drains_in_time(machine: Machine, tmp_path: Path) -> None:
    machine.write(machine.config)
    machine.systemctl("start", UNIT)
    num_stops = machine.container.journal(UNIT).count("results published")
    with machine.watching(tmp_path) as messages:
        wait_for_results(messages, "steady")
        machine.systemctl("stop", UNIT)
    assert machine.container.show(UNIT, "Result") == "success", "systemd had to kill it"
    assert machine.container.show(UNIT, "ExecMainStatus") == "0"
    assert machine.container.journal(UNIT).count("results published") == num_stops + 1, "it said that it was done"


def test_an_instance_has_its_own_socket_and_state(machine: Machine) -> None:
    north = {**machine.config, "publish": {"zeromq": {"bind": "tcp://127.0.0.1:5556"}}}
    machine.write({**north, "streams": {"yard": {"url": "rtsp://u:x${file:private}@127.0.0.1:9/"}}}, "north")
    said = machine.streamd("service", "install", "/etc/streamd/north.yaml", check=False)
    assert "the user streamd cannot read /etc/streamd/private" in said
    streams = {"steady": machine.config["streams"]["steady"], "desk": {"url": "v4l2:///dev/video0"}}
    machine.write({**north, "streams": streams}, "north")
    said = machine.streamd("service", "install", "/etc/streamd/north.yaml", "--hardware", "gpu", "--now")
    drop_ins = "/etc/systemd/system/streamd@north.service.d"
    assert f"removed       {drop_ins}/cpu.conf" in said and f"wrote         {drop_ins}/v4l2.conf" in said
    assert "streamd@north.service: active (running)" in said
    assert "steady" in machine.streamd("streams", "list", "--socket", "/run/streamd-north/control.sock")
    assert {"north", "spool.sqlite"} <= {*machine.container.run("ls", "/var/lib/streamd").split()}
    said = machine.streamd("service", "uninstall", "/etc/streamd/north.yaml")
    assert "/etc/sysusers.d" not in said, "streamd.service still needs it"
    assert machine.container.show("streamd@north.service", "ActiveState") == "inactive"


def test_the_journal_holds_no_secret(machine: Machine) -> None:
    """After all that these tests have done, with cameras and a Redis that refused the passwords."""
    everything = machine.container.run("journalctl", "--output=export", "--no-pager")
    assert "away: unreachable" in everything and "locked: unreachable" in everything
    for secret in (PLAIN, CREDENTIAL, REDIS, "credential%2Fhunter"):
        assert secret not in everything


def test_uninstalling_leaves_configuration_and_state(machine: Machine) -> None:
    said = machine.streamd("service", "uninstall", CONFIG)
    assert "test.conf" in said, "what somebody else wrote stays"
    left = machine.container.run(
        "find", "/etc/systemd/system", "/etc/sysusers.d", "/etc/tmpfiles.d", "/etc/streamd", "/var/lib/streamd"
    )
    ours = sorted(line for line in left.splitlines() if "streamd" in line)
    assert f"/etc/systemd/system/{UNIT}" not in ours
    assert not [line for line in ours if line.startswith(("/etc/sysusers.d/", "/etc/tmpfiles.d/"))]
    assert {CONFIG, "/etc/streamd/credentials/redis", "/var/lib/streamd"} <= {*ours}
    machine.streamd("service", "uninstall", CONFIG)  # again: nothing is left to do
