"""Redis servers of other kinds than one plain one: TLS, Sentinel with a replica, and a Cluster of three."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.redis_server import answers, free_port, missing_for_redis

DEADLINE_S = 60.0


@contextmanager
def redis_process(
    folder: Path, *arguments: str, port: int, sentinel: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a redis-server with these arguments until the end of the block."""
    if missing := missing_for_redis():
        pytest.skip(missing)
    folder.mkdir(parents=True, exist_ok=True)
    options = [] if sentinel else ["--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command = ["redis-server", *arguments, *options, *(["--sentinel"] if sentinel else [])]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(port), f"redis-server does not listen on {port}: {(folder / 'log').read_text()}")
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def wait_for(holds: object, why: str) -> None:
    """Wait until a call returns something true; fail with `why`."""
    assert callable(holds)
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(why)
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one certificate authority, and of a certificate that it signed for 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    """Make them with openssl; skip where it is missing."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing (Debian: openssl)")
    made = Certificates(folder / "ca.crt", folder / "own.crt", folder / "own.key")
    request, ca_key, extensions = folder / "own.csr", folder / "ca.key", folder / "own.ext"
    extensions.write_text("subjectAltName = IP:127.0.0.1\n")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    signer = ["-CA", made.ca, "-CAkey", ca_key, "-CAcreateserial"]
    commands = (
        ["req", "-x509", *new_key, "-keyout", ca_key, "-out", made.ca, "-days", "2", "-subj", "/CN=test authority"],
        ["req", *new_key, "-keyout", made.key, "-out", request, "-subj", "/CN=127.0.0.1"],
        ["x509", "-req", "-in", request, "-out", made.certificate, "-days", "2", *signer, "-extfile", extensions],
    )
    for command in commands:
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    return made


@contextmanager
def tls_redis(certificates: Certificates) -> Iterator[int]:
    """Run a server that speaks only TLS and asks for a client's certificate; yield its port."""
    port = free_port()
    files = ["--tls-ca-cert-file", certificates.ca, "--tls-cert-file", certificates.certificate]
    files += ["--tls-key-file", certificates.key]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "yes", *map(str, files)]
        try:
            with redis_process(Path(folder), *arguments, port=port):
                yield port
        except RuntimeError as err:
            if "tls" in str(err).lower():
                pytest.skip("this redis-server was built without TLS")
            raise


@dataclass(frozen=True, slots=True)
class SentinelCase:
    """A primary with one replica, which a sentinel watches under the name `mymaster`."""

    url: str
    primary: subprocess.Popen[bytes]
    primary_port: int
    replica_port: int


@contextmanager
def sentinel_redis(password: str = "", sentinel_password: str = "") -> Iterator[SentinelCase]:
    """Run the three; the replica is in step when this yields. The URL has no login for the sentinel."""
    primary_port, replica_port, sentinel_port = free_port(), free_port(), free_port()
    login = ["--requirepass", password, "--masterauth", password] if password else []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        follow = ["--replicaof", f"127.0.0.1 {primary_port}", "--repl-diskless-sync-delay", "0"]
        at_once = ["--repl-diskless-sync-delay", "0"]
        primary = stack.enter_context(
            redis_process(folder / "p", "--port", str(primary_port), *at_once, *login, port=primary_port)
        )
        stack.enter_context(
            redis_process(folder / "r", "--port", str(replica_port), *follow, *login, port=replica_port)
        )
        with redis.Redis(port=replica_port, password=password or None) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up", "the replica does not follow")
        settings = folder / "sentinel.conf"
        lines = [
            f"port {sentinel_port}",
            f"dir {folder}",
            f"sentinel monitor mymaster 127.0.0.1 {primary_port} 1",
            "sentinel down-after-milliseconds mymaster 1000",
            "sentinel failover-timeout mymaster 5000",
            *([f"sentinel auth-pass mymaster {password}"] if password else []),
            *([f"requirepass {sentinel_password}"] if sentinel_password else []),
        ]
        settings.write_text("\n".join(lines) + "\n")
        stack.enter_context(redis_process(folder / "s", str(settings), port=sentinel_port, sentinel=True))
        with redis.Redis(port=sentinel_port, password=sentinel_password or None, decode_responses=True) as client:
            wait_for(lambda: client.sentinel_slaves("mymaster"), "the sentinel does not see the replica")
        user = f":{password}@" if password else ""
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{sentinel_port}"  # the first sentinel is away
        yield SentinelCase(f"redis+sentinel://{user}{hosts}/mymaster", primary, primary_port, replica_port)


@contextmanager
def cluster_redis() -> Iterator[str]:
    """Run a Cluster of three primaries; yield its URL."""
    if not shutil.which("redis-cli"):
        pytest.skip("redis-cli is missing (Debian: redis-tools)")
    ports = [_cluster_port() for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for port in ports:
            arguments = ["--port", str(port), "--cluster-enabled", "yes"]
            stack.enter_context(redis_process(Path(folder) / str(port), *arguments, port=port))
        nodes = [f"127.0.0.1:{port}" for port in ports]
        command = ["redis-cli", "--cluster", "create", *nodes, "--cluster-replicas", "0", "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)
        for port in ports:
            with redis.Redis(port=port, decode_responses=True) as client:
                wait_for(lambda: client.cluster("info")["cluster_state"] == "ok", "the cluster does not form")
        yield f"redis+cluster://127.0.0.1:{free_port()},{nodes[0]}"


def _cluster_port() -> int:
    """Find a free port whose bus port, 10,000 above it, exists."""
    while (port := free_port()) > 55_000:
        pass
    return port
