"""Clients come and go while the daemon runs: a file in a folder, and a reload."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from streamd.client import Subscription, subscribe
from streamd.control_client import ask
from streamd.control_messages import ReloadRequest
from streamd.curve import ClientKeys
from streamd.errors import SubscribeError
from streamd.key_commands import make_pair
from streamd.wire import DetectionsMessage
from tests.daemon_process import DaemonProcess
from tests.redis_server import free_port

WITHIN_S = 120.0


class Keys:
    """A folder of keys, as `streamd keys` makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.add("server", folder)

    def add(self, name: str, public: Path | None = None) -> None:
        public = public or self.folder / "clients"
        make_pair(self.folder / f"{name}.secret", public / f"{name}.public", force=False)

    def remove(self, name: str) -> None:
        (self.folder / "clients" / f"{name}.public").unlink()

    def of(self, name: str) -> ClientKeys:
        return ClientKeys.read(self.folder / "server.public", self.folder / f"{name}.secret")


def refusal(messages: Subscription[DetectionsMessage]) -> str:
    """Read until the daemon refuses."""
    deadline = time.monotonic() + WITHIN_S
    with pytest.raises(SubscribeError) as raised:
        while time.monotonic() < deadline:
            messages.receive(1.0)
    return str(raised.value)


def test_clients_are_added_and_removed_by_a_reload(demo_clip: Path, untrained_artifact: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    keys.add("old")
    address, control = f"tcp://127.0.0.1:{free_port()}", tmp_path / "control.sock"
    config = {
        "models": {"m": {"path": str(untrained_artifact), "workers": 1, "threads": 1, "max_batch": 1}},
        "streams": {"gate": {"url": str(demo_clip), "loop": True, "fps": 5}},
        "publish": {
            "zeromq": {
                "bind": address,
                "curve": {"secret_key": "${file:keys/server.secret}", "clients": "keys/clients"},
            }
        },
        "metrics": {"listen": None},
        "control": {"path": str(control)},
    }
    with DaemonProcess(tmp_path, config) as daemon, subscribe(address, keys=keys.of("old"), timeout_s=WITHIN_S) as old:
        assert next(old).stream == "gate"
        keys.add("new")
        with subscribe(address, keys=keys.of("new"), timeout_s=WITHIN_S) as new:
            assert "does not know this key" in refusal(new)
            assert ask(control, ReloadRequest(), WITHIN_S).done == "changed: publish.zeromq.curve.clients"
            assert next(new).stream == "gate"
            first = next(old).seq
            assert [next(old).seq for _ in range(5)] == list(range(first + 1, first + 6)), "nobody was hung up on"
            keys.remove("old")
            assert ask(control, ReloadRequest(), WITHIN_S).done == "changed: publish.zeromq.curve.clients"
            assert "does not know this key" in refusal(old)
            assert next(new).stream == "gate"
        assert "new subscribes from 127.0.0.1" in daemon.log()
