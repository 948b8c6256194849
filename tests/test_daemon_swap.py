"""Swaps of a model in the real daemon: every message says which version saw its frame, and none is missing."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamd.client import subscribe
from streamd.control_client import ask
from streamd.control_messages import Answer, ModelEntry, ReloadRequest, RollbackRequest, StatusRequest
from streamd.errors import ConfigError
from streamd.wire import DetectionsMessage
from tests.clips import write_clip
from tests.daemon_process import DaemonProcess
from tests.redis_server import free_port
from tests.test_daemon_reload import Message, assert_unbroken, collect, has_results, results_of
from tests.versions import Squares, write_version

WITHIN_S = 90.0
STREAMS = ("gate", "yard")
OLD, NEW, BAD, FAR = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def test_versions_come_go_and_are_refused_while_no_frame_is_lost(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", 3000, fps=10)
    published = tmp_path / "published"
    current = write_version(published / "people.pt", OLD)
    control = tmp_path / "control.sock"
    address = f"tcp://127.0.0.1:{free_port()}"
    gate = {"frames": 2, "agreement": 0.5}
    config: dict[str, Any] = {
        "models": {"m": {"path": "people", "workers": 1, "threads": 1, "gate": gate}},
        "streams": {name: {"url": str(clip)} for name in STREAMS},
        "publish": {"zeromq": {"bind": address}},
        "metrics": {"listen": None},
        "control": {"path": str(control)},
    }

    def publish(sha256: str, network: Squares | None = None, **changes: object) -> None:
        """Put a version in place of the one at work, as `streamd train --publish people` does."""
        os.replace(write_version(tmp_path / "next.pt", sha256, network, **changes), current)

    def reload() -> Answer:
        return ask(control, ReloadRequest(), WITHIN_S)

    def at_work() -> ModelEntry:
        state = ask(control, StatusRequest(), WITHIN_S).state
        assert state is not None
        return state.models[0]

    def until_seen(sha256: str) -> list[Message]:
        def is_seen(received: list[Message]) -> bool:
            return all(sum(m.model.sha256 == sha256 for m in results_of(received, one)) > 3 for one in STREAMS)

        return collect(messages, is_seen)

    environment = {"STREAMD_MODELS": str(published)}
    with DaemonProcess(tmp_path, config, environment) as daemon:
        with subscribe(address, kinds=("detections", "status"), timeout_s=WITHIN_S) as messages:
            received = collect(messages, has_results(*STREAMS))
            assert reload().done == "nothing changed"

            publish(NEW, Squares(shift=1))
            done = reload().done or ""
            assert done.startswith("models changed: m; streams moved to another model: gate, yard; model m: agreement ")
            assert at_work().sha256 == NEW and at_work().previous == OLD and at_work().on_probation
            received += until_seen(NEW)

            publish(FAR, Squares(shift=9))
            with pytest.raises(ConfigError, match=r"agreement 0\.000 .* less than the 0\.5 wanted"):
                reload()
            assert at_work().sha256 == NEW and "less than the 0.5 wanted" in at_work().last_event
            received += collect(messages, has_results(*STREAMS))

            done = ask(control, RollbackRequest(model="m"), WITHIN_S).done or ""
            assert done == f"rolled back to {OLD[:12]}: asked for on the control socket"
            received += until_seen(OLD)
            with pytest.raises(ConfigError, match="model m: there is no version to go back to"):
                ask(control, RollbackRequest(model="m"), WITHIN_S)

            # Without a gate nothing sees before the probation that it fails where pictures are bright.
            config["models"]["m"]["gate"] = None
            publish(BAD, Squares("raises"))
            daemon.config_path.write_text(yaml.safe_dump(config))
            assert "models changed: m" in (reload().done or "")
            received += collect(messages, lambda got: any("was rolled back" in reason for reason in reasons(got)))
            received += until_seen(OLD)
            assert at_work().sha256 == OLD and at_work().last_event.startswith(f"rolled back to {OLD[:12]}: it failed")
            assert reload().done == "nothing changed", "what was rolled back is not tried again"
            received += collect(messages, has_results(*STREAMS))
        assert daemon.stop() == 0
        log = daemon.log()

    for stream in STREAMS:
        assert_unbroken(received, stream)
        versions = [sha256 for sha256, _ in groupby(m.model.sha256 for m in results_of(received, stream))]
        assert versions in ([OLD, NEW, OLD, BAD, OLD], [OLD, NEW, OLD]), "the bad one may fail with its first frame"
        assert {m.model.name for m in results_of(received, stream)} == {"m"}
        told = [reason for reason in reasons(received) if "less than the 0.5 wanted" in reason]
        assert len(told) == len(STREAMS), "once for each stream"
    assert "Traceback" not in log and log.count("rolled back to") == 2


def reasons(messages: list[Message]) -> list[str]:
    return [m.reason for m in messages if not isinstance(m, DetectionsMessage)]
