"""What a configuration exposes is said, and a daemon at work says no secret in any of the places where it speaks."""

from __future__ import annotations

import logging
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from streamd import cli
from streamd.client import subscribe
from streamd.config_file import load
from streamd.control_client import ask
from streamd.control_messages import AddRequest, ReloadRequest, StatusRequest, encode
from streamd.curve import ClientKeys
from streamd.errors import ConfigError
from tests.daemon_process import DaemonProcess
from tests.keys import make_pair
from tests.redis_server import free_port

HEAD = "models: {m: {path: m.pt}}\n"
PLAIN = HEAD + "streams: {gate: {url: a.mp4}}\n"


def warnings_of(folder: Path, text: str, caplog: pytest.LogCaptureFixture, mode: int = 0o600) -> str:
    path = folder / "streamd.yaml"
    path.write_text(text)
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        load(path)
    return caplog.text


def test_a_secret_file_that_everybody_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = HEAD + 'streams: {gate: {url: "rtsp://u:${file:gate.password}@192.0.2.1/1"}}\n'
    secret = tmp_path / "gate.password"
    secret.write_text("swordfish")
    secret.chmod(0o640)
    assert warnings_of(tmp_path, text, caplog, mode=0o644) == "", "the configuration itself holds no password"
    secret.chmod(0o644)
    assert "gate.password holds a secret and every user" in warnings_of(tmp_path, text, caplog)
    assert "swordfish" not in caplog.text


def test_a_password_in_a_configuration_that_everybody_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = HEAD + 'streams: {gate: {url: "rtsp://u:swordfish@192.0.2.1/1"}}\n'
    assert warnings_of(tmp_path, text, caplog, mode=0o640) == ""
    assert "streamd.yaml holds a password and every user" in warnings_of(tmp_path, text, caplog, mode=0o644)
    assert "swordfish" not in caplog.text


@pytest.mark.parametrize(
    ("redis", "warned"),
    [
        ("{url: 'redis://:swordfish@192.0.2.1'}", True),
        ("{url: 'redis+cluster://u:swordfish@127.0.0.1:1,redis.example:2'}", True),
        ("{url: 'redis+sentinel://192.0.2.1/s', sentinel_password: swordfish}", True),
        ("{url: 'redis://192.0.2.1'}", False),
        ("{url: 'rediss://:swordfish@192.0.2.1'}", False),
        ("{url: 'rediss+cluster://:swordfish@192.0.2.1'}", False),
        ("{url: 'redis://:swordfish@[::1]:6379/0'}", False),
        ("{url: 'redis+cluster://u:swordfish@127.0.0.1:1,localhost:2'}", False),
        ("{url: 'unix://:swordfish@/run/redis.sock'}", False),
    ],
)
def test_a_redis_password_that_crosses_the_network_in_the_clear_is_warned_of(
    redis: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = warnings_of(tmp_path, f"{PLAIN}publish: {{redis: {redis}}}\n", caplog)
    assert ("crosses the network in the clear" in said) == warned
    assert "swordfish" not in said


def test_a_bug_of_a_command_shows_its_trace_without_a_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(**options: object) -> None:
        raise LookupError("cannot parse rtsp://u:swordfish@192.0.2.1")

    monkeypatch.setattr(cli, "app", crash)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "LookupError" in said and "rtsp://u:***@" in said and "swordfish" not in said


def test_no_secret_is_said_by_a_daemon_at_work(demo_clip: Path, untrained_artifact: Path, tmp_path: Path) -> None:
    secrets = {name: f"{name}-sw0rdfish" for name in ("camera", "redis", "sentinel")}
    for name, secret in secrets.items():
        (tmp_path / name).write_text(secret)
    server, client = make_pair(), make_pair()
    (tmp_path / "curve").write_text(server.secret)
    metrics, address = free_port(), f"tcp://127.0.0.1:{free_port()}"
    config = {
        "models": {"m": {"path": str(untrained_artifact), "workers": 1, "threads": 1, "max_batch": 1}},
        "streams": {
            "clip": {"url": str(demo_clip), "loop": True, "fps": 5},
            "gate": {"url": f"rtsp://viewer:${{file:camera}}@127.0.0.1:{free_port()}/1"},
            "yard": {"url": f"rtsp://viewer:pl4in-fish@127.0.0.1:{free_port()}/1"},
        },
        "publish": {
            "zeromq": {
                "bind": address,
                "curve": {"secret_key": "${file:curve}", "clients": {"test": client.public.replace("$", "$$")}},
            },
            "redis": {
                "url": f"redis+sentinel://u:${{file:redis}}@127.0.0.1:{free_port()}/s",
                "sentinel_password": "${file:sentinel}",
            },
            "spool": {"path": "spool.sqlite"},
        },
        "metrics": {"listen": f"tcp://127.0.0.1:{metrics}", "log_interval_s": 1.0},
        "control": {"path": str(tmp_path / "control.sock")},
    }
    said: list[str] = []
    with DaemonProcess(tmp_path, config) as daemon:
        with subscribe(
            address, kinds=("detections", "status"), keys=ClientKeys(server.public, client.secret), timeout_s=120
        ) as messages:
            streams: set[str] = set()
            while not {"clip", "gate", "yard"} <= streams:
                message = next(messages)
                streams.add(message.stream)
                said.append(repr(message))
        answer = ask(tmp_path / "control.sock", StatusRequest(), 30.0)
        said += [encode(answer).decode(), repr(answer)]
        for path in ("metrics", "healthz", "readyz"):
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/{path}") as page:
                said.append(page.read().decode())
        wrong = yaml.safe_dump(
            {**config, "metrics": {"listen": "tcp://${file:camera}:1"}, "defaults": {"fps": "${file:redis}"}}
        )
        daemon.config_path.write_text(wrong)
        with pytest.raises(ConfigError) as refused:
            ask(tmp_path / "control.sock", ReloadRequest(), 60.0)
        said.append(str(refused.value))
        with pytest.raises(ConfigError) as refused:
            request = AddRequest(name="door", settings={"url": "ftp://u:pl4in-fish@h", "fps": "camera-sw0rdfish"})
            ask(tmp_path / "control.sock", request, 60.0)
        said.append(str(refused.value))
        command_line = Path(f"/proc/{daemon.pid}/cmdline").read_text()
    said += [daemon.log(), command_line, *daemon.notifications]
    checked = subprocess.run(
        [sys.executable, "-m", "streamd", "check", str(daemon.config_path)], capture_output=True, text=True, timeout=120
    )
    said += [checked.stdout, checked.stderr]
    assert checked.returncode == 78 and "gate" in said[-3] + daemon.log()
    for secret in (*secrets.values(), server.secret, client.secret, "pl4in-fish"):
        for text in said:
            assert secret not in text
