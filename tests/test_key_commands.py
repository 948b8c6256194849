"""`streamd keys` makes what the daemon and its subscribers read, and never replaces a key unasked."""

from __future__ import annotations

import re
import stat
import threading
from pathlib import Path

import pytest
import zmq
from typer.testing import CliRunner

from streamd import curve
from streamd.cli import app
from streamd.client import subscribe
from streamd.config_file import load, parse
from streamd.curve import ClientKeys
from streamd.errors import ConfigError, OutputError, SubscribeError
from streamd.publish.zeromq import ServerKeys, ZeroMqSink
from streamd.publishers import Publishers
from tests.keys import make_pair
from tests.wire_samples import outgoing

HEAD = "models: {m: {path: m.pt}}\nstreams: {gate: {url: a.mp4}}\n"


def keys(*arguments: object) -> str:
    """Run `streamd keys ARGUMENTS`; raises what it raises."""
    result = CliRunner().invoke(app, ["keys", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_it_makes_and_prints_lets_a_client_in(tmp_path: Path) -> None:
    said = keys("server", "--out", tmp_path / "keys")
    keys("client", "dashboard", "recorder", "--out", tmp_path / "keys")
    written = "\n".join(line for line in said.splitlines() if line.startswith("  "))
    path = tmp_path / "streamd.yaml"
    path.write_text(HEAD + re.sub(r"^  ", "", written, flags=re.MULTILINE).replace("tcp://*:5555", "tcp://127.0.0.1:*"))
    config = load(path)
    assert config.publish.zeromq is not None and config.publish.zeromq.curve is not None
    assert list(config.publish.zeromq.curve.client_keys) == ["dashboard", "recorder"]

    publishers = Publishers(config.publish, lambda err: None)
    publishers.start()
    own = ClientKeys.read(tmp_path / "keys/server.public", tmp_path / "keys/recorder.secret")
    [publisher] = publishers.all
    address = publisher.sink.endpoint  # type: ignore[attr-defined]
    with subscribe(address, keys=own, timeout_s=30) as messages:
        while messages.receive(0.05) is None:
            publishers.outlets[0](outgoing("gate", 0))
    publishers.stop(5.0)


def test_secret_keys_are_for_their_owner_alone_and_not_printed(tmp_path: Path) -> None:
    said = keys("server", "--out", tmp_path) + keys("client", "dashboard", "--out", tmp_path)
    for name in ("server.secret", "dashboard.secret"):
        assert mode_of(tmp_path / name) == 0o600
        assert (tmp_path / name).read_text().strip() not in said
    assert curve.read_key(tmp_path / "clients/dashboard.public") == (
        zmq.curve_public(curve.read_key(tmp_path / "dashboard.secret").encode()).decode()
    )


def test_a_key_that_is_there_is_only_replaced_when_told(tmp_path: Path) -> None:
    keys("client", "dashboard", "--out", tmp_path)
    before = (tmp_path / "dashboard.secret").read_text()
    with pytest.raises(OutputError, match=r"dashboard\.secret is there already; --force replaces it"):
        keys("client", "dashboard", "--out", tmp_path)
    assert (tmp_path / "dashboard.secret").read_text() == before
    keys("client", "dashboard", "--out", tmp_path, "--force")
    assert (tmp_path / "dashboard.secret").read_text() != before
    assert mode_of(tmp_path / "dashboard.secret") == 0o600


@pytest.mark.parametrize("name", ["../x", "server", "", "a b"])
def test_a_name_that_is_no_name_makes_nothing(name: str, tmp_path: Path) -> None:
    keys("client", name, "--out", tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_a_folder_that_may_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        keys("server", "--out", tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "good"), [("0" * 40, True), ("#" * 40, False), ("0" * 39, False), ("0" * 39 + "~", False), ("", False)]
)
def test_a_key_is_told_from_other_text_as_libzmq_does(text: str, good: bool) -> None:
    assert curve.is_key(text) == good


def test_every_key_of_libzmq_is_a_key() -> None:
    assert all(curve.is_key(key) for _ in range(200) for key in make_pair())


def test_a_subscribers_key_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("hello\n")
    with pytest.raises(SubscribeError, match="wrong: must be a key as `streamd keys` makes them"):
        ClientKeys.read(tmp_path / "wrong", tmp_path / "wrong")
    with pytest.raises(SubscribeError, match=r"cannot read the key .*nope: No such file"):
        ClientKeys.read(tmp_path / "nope", tmp_path / "wrong")


def with_curve(curve_yaml: str) -> str:
    return f'{HEAD}publish:\n  zeromq:\n    bind: "tcp://*:5555"\n    curve: {curve_yaml}\n'


def test_a_clients_folder_that_is_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    path, secret = tmp_path / "streamd.yaml", make_pair().secret
    (tmp_path / "server.secret").write_text(secret)
    secret_key = '"${file:server.secret}"'
    with pytest.raises(ConfigError, match=r"line 6: publish\.zeromq\.curve\.clients: cannot read .*no such folder"):
        parse(with_curve(f"{{secret_key: {secret_key}, clients: nowhere}}"), path)
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/phone.public").write_text("garbage")
    (tmp_path / "clients/README").write_text("not looked at")
    with pytest.raises(ConfigError, match=r"phone\.public: must be a key"):
        parse(with_curve(f"{{secret_key: {secret_key}, clients: clients}}"), path)
    with pytest.raises(ConfigError, match=r"curve\.clients: 'phone' must be a key") as raised:
        parse(with_curve(f"{{secret_key: {secret_key}, clients: {{phone: garbage}}}}"), path)
    assert secret not in str(raised.value)


def test_a_secret_key_that_is_none_is_told_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"publish\.zeromq\.curve\.secret_key: must be a key") as raised:
        parse(with_curve("{secret_key: hunter22, clients: {}}"), tmp_path / "streamd.yaml")
    assert "hunter22" not in str(raised.value)
    assert "other machines" not in str(raised.value), "the address has keys, though wrong ones"


@pytest.mark.parametrize(
    "bind", ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://eth0:5555", "tcp://192.0.2.1:5555", "tcp://[::]:5555"]
)
def test_an_address_that_others_reach_needs_keys_or_the_word_insecure(bind: str, tmp_path: Path) -> None:
    path = tmp_path / "streamd.yaml"
    with pytest.raises(ConfigError, match=r"publish\.zeromq\.bind: other machines reach this address"):
        parse(f'{HEAD}publish: {{zeromq: {{bind: "{bind}"}}}}\n', path)
    parse(f'{HEAD}publish: {{zeromq: {{bind: "{bind}", insecure: true}}}}\n', path)


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1:5555", "tcp://127.8.8.8:*", "tcp://[::1]:5555", "tcp://localhost:1", "ipc:///run/s"]
)
def test_an_address_of_this_machine_alone_needs_neither(bind: str, tmp_path: Path) -> None:
    parse(f'{HEAD}publish: {{zeromq: {{bind: "{bind}"}}}}\n', tmp_path / "streamd.yaml")


def test_watch_takes_the_keys_from_options_or_the_environment(tmp_path: Path) -> None:
    keys("server", "--out", tmp_path)
    keys("client", "dashboard", "--out", tmp_path)
    server_keys = ServerKeys(
        curve.read_key(tmp_path / "server.secret"),
        {"dashboard": curve.read_key(tmp_path / "clients/dashboard.public")},
    )
    sink = ZeroMqSink("tcp://127.0.0.1:0", keys=server_keys)
    sink.open()
    stop = threading.Event()

    def publish() -> None:
        while not stop.wait(0.05):
            sink.send([outgoing("gate", 0)])

    thread = threading.Thread(target=publish)
    thread.start()
    command = ["watch", "--zmq", sink.endpoint, "--json", "--seconds", "3"]
    server, own = str(tmp_path / "server.public"), str(tmp_path / "dashboard.secret")
    by_options = CliRunner().invoke(app, [*command, "--server-key", server, "--secret-key", own])
    by_environment = CliRunner().invoke(app, command, env={"STREAMD_SERVER_KEY": server, "STREAMD_SECRET_KEY": own})
    without = CliRunner().invoke(app, command)
    stop.set()
    thread.join()
    sink.close()
    assert '"gate"' in by_options.output and '"gate"' in by_environment.output
    assert isinstance(without.exception, SubscribeError) and not without.output
