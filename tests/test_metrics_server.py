"""The page server on real sockets, with clients that behave and clients that do not."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http import HTTPStatus
from pathlib import Path

import pytest
from pydantic import ValidationError

from streamd.config import MetricsConfig
from streamd.errors import ConfigError, PublishError
from streamd.metrics.endpoint import Endpoint
from streamd.metrics.server import Page, PageServer
from streamd.metrics.tls import TlsFiles
from tests.redis_cases import Certificates, make_certificates

TIMEOUT_S = 20.0
ANY_PORT = Endpoint("127.0.0.1", 0)


def hello() -> Page:
    return Page(HTTPStatus.OK, b"hello\n")


def broken() -> Page:
    raise RuntimeError("a bug")


@pytest.fixture
def serve() -> Iterator[Callable[[Endpoint], Endpoint]]:
    """Start servers, which end with the test."""
    with ExitStack() as stack:

        def start(endpoint: Endpoint, tls: ssl.SSLContext | None = None) -> Endpoint:
            server = PageServer(endpoint, {"/hello": hello, "/broken": broken}, tls)
            stack.callback(server.close)
            server.start()
            return server.endpoint

        yield start


def connect(endpoint: Endpoint) -> socket.socket:
    if endpoint.path:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT_S)
        client.connect(endpoint.path)
        return client
    return socket.create_connection((endpoint.host, endpoint.port), TIMEOUT_S)


def ask(endpoint: Endpoint, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = connect(endpoint)
    with closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_page_is_served_over_tcp(serve: Callable[[Endpoint], Endpoint], host: str) -> None:
    try:
        endpoint = serve(Endpoint(host, 0))
    except PublishError as err:
        if host == "::1":
            pytest.skip(f"this machine has no IPv6: {err}")
        raise
    assert endpoint.port
    assert ask(endpoint, "/hello") == (200, b"hello\n")
    assert ask(endpoint, "/hello?x=1") == (200, b"hello\n")
    assert ask(endpoint, "/hello", "HEAD") == (200, b"")
    assert ask(endpoint, "/../etc/passwd")[0] == 404
    assert ask(endpoint, "/hello", "POST")[0] == 501


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def ask_secured(endpoint: Endpoint, certificates: Certificates, *, with_own: bool) -> bytes:
    context = ssl.create_default_context(cafile=str(certificates.ca))
    if with_own:
        context.load_cert_chain(certificates.certificate, certificates.key)
    connection = http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=TIMEOUT_S, context=context)
    with closing(connection):
        connection.request("GET", "/hello")
        return connection.getresponse().read()


def test_with_tls_a_page_is_served_to_who_checks_the_certificate_and_to_nobody_in_the_clear(
    certificates: Certificates, serve: Callable[..., Endpoint]
) -> None:
    endpoint = serve(ANY_PORT, TlsFiles(str(certificates.certificate), str(certificates.key)).context())
    with connect(endpoint):  # says nothing, and holds up nobody
        assert ask_secured(endpoint, certificates, with_own=False) == b"hello\n"
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(endpoint, "/hello")


def test_clients_may_be_asked_for_a_certificate(certificates: Certificates, serve: Callable[..., Endpoint]) -> None:
    files = TlsFiles(str(certificates.certificate), str(certificates.key), str(certificates.ca))
    endpoint = serve(ANY_PORT, files.context())
    assert ask_secured(endpoint, certificates, with_own=True) == b"hello\n"
    with pytest.raises((http.client.HTTPException, OSError)):
        ask_secured(endpoint, certificates, with_own=False)


def test_files_of_tls_that_are_wrong_are_an_error_that_names_them(certificates: Certificates, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.crt.*No such file"):
        TlsFiles(str(tmp_path / "nope.crt"), str(certificates.key)).context()
    with pytest.raises(ConfigError, match=r"metrics: .*own\.key"):
        TlsFiles(str(certificates.key), str(certificates.key)).context()


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ({"listen": "tcp://0.0.0.0:9464"}, "give cert_file and key_file"),
        ({"cert_file": "a"}, "cert_file and key_file belong together"),
        ({"client_ca_file": "a"}, "client_ca_file needs cert_file and key_file"),
        ({"listen": "tcp://0.0.0.0:9464", "cert_file": "a", "key_file": "b"}, None),
        ({"listen": "tcp://0.0.0.0:9464", "insecure": True}, None),
    ],
)
def test_an_address_that_others_reach_needs_tls_or_the_word_insecure(
    metrics: dict[str, object], complaint: str | None
) -> None:
    if complaint is None:
        MetricsConfig.model_validate(metrics)
    else:
        with pytest.raises(ValidationError, match=complaint):
            MetricsConfig.model_validate(metrics)


def test_a_unix_socket_is_for_user_and_group_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    server = PageServer(Endpoint(path=str(path)), {"/hello": hello})
    server.start()
    try:
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o007 == 0
        assert ask(server.endpoint, "/hello") == (200, b"hello\n")
    finally:
        server.close()
    assert not path.exists()


def test_the_socket_that_a_killed_daemon_left_is_replaced(
    serve: Callable[[Endpoint], Endpoint], tmp_path: Path
) -> None:
    endpoint = Endpoint(path=str(tmp_path / "metrics.sock"))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(endpoint.path)
    assert ask(serve(endpoint), "/hello")[0] == 200


def test_a_socket_that_somebody_listens_on_is_left_alone(serve: Callable[[Endpoint], Endpoint], tmp_path: Path) -> None:
    endpoint = serve(Endpoint(path=str(tmp_path / "metrics.sock")))
    with pytest.raises(PublishError, match="taken"):
        PageServer(endpoint, {})
    assert ask(endpoint, "/hello")[0] == 200


def test_a_file_in_the_way_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(PublishError, match="taken"):
        PageServer(Endpoint(path=str(path)), {})
    assert path.read_text() == "mine"


def test_a_port_that_is_taken_is_an_error_that_names_it(serve: Callable[[Endpoint], Endpoint]) -> None:
    endpoint = serve(ANY_PORT)
    with pytest.raises(PublishError, match=str(endpoint.port)):
        PageServer(endpoint, {})


def test_silent_and_rude_clients_neither_block_nor_crash_it(
    serve: Callable[[Endpoint], Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = serve(ANY_PORT)
    with ExitStack() as stack, caplog.at_level(logging.WARNING):
        for _ in range(3):
            stack.enter_context(connect(endpoint))  # says nothing
        for garbage in (
            b"\x00\xff" * 1000,
            b"GET " + b"x" * 100_000 + b"\r\n\r\n",
            b"GET /hello HTTP/9.9\r\n\r\n",
            b"\r\n",
        ):
            with connect(endpoint) as rude:
                rude.sendall(garbage)
        assert ask(endpoint, "/hello") == (200, b"hello\n")
    assert not caplog.records


def test_more_clients_than_there_is_room_for_are_hung_up_on_and_the_room_comes_back(
    serve: Callable[[Endpoint], Endpoint],
) -> None:
    endpoint = serve(ANY_PORT)
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(endpoint))
        with connect(endpoint) as ninth, pytest.raises((ConnectionError, AssertionError)):
            ninth.sendall(b"GET /hello HTTP/1.0\r\n\r\n")
            assert ninth.recv(100)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:  # the handlers notice the closed connections one after the other
        try:
            status, _body = ask(endpoint, "/hello")
        except (ConnectionError, http.client.HTTPException):
            continue
        assert status == 200
        return
    raise AssertionError("the room never came back")


def test_a_page_that_fails_is_logged_and_the_next_one_is_served(
    serve: Callable[[Endpoint], Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = serve(ANY_PORT)
    assert ask(endpoint, "/broken") == (500, b"failed; the log says why\n")
    assert ask(endpoint, "/hello")[0] == 200
    assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)
