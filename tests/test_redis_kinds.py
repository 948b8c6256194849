"""TLS, ACL users, Sentinel and Cluster on real servers, for the live sink, the spool's store and the subscriber."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import redis

from streamd.client import subscribe
from streamd.errors import PublishError, SubscribeError
from streamd.publish import Outgoing
from streamd.publish.redis_streams import RedisSink, RedisStore
from streamd.publish.spool import Entry
from streamd.redis_connection import check_url
from tests.redis_cases import Certificates, cluster_redis, make_certificates, sentinel_redis, tls_redis
from tests.redis_server import RedisServer
from tests.wire_samples import make_message, outgoing

STREAMS = ("gate", "yard", "door", "roof")  # in a Cluster of three they are on several nodes


def entries(stream: str, *seqs: int) -> list[Entry]:
    return [Entry(stream, "detections", f"abc-{seq}", outgoing(stream, seq).payload) for seq in seqs]


def stored(stream: str, seq: int) -> Outgoing:
    return Outgoing(stream, "detections", outgoing(stream, seq).payload, stored=True)


def seqs_of(url: str, stream: str, count: int) -> list[int]:
    with subscribe(url, stream, since="0", timeout_s=30.0) as messages:
        return [next(messages).seq for _ in range(count)]


def check_both_ways(url: str, tls: dict[str, str] | None = None, reader_url: str | None = None) -> None:
    """Publish live and store, and read both with the client."""
    sink, store = RedisSink(url, options=tls or {}), RedisStore(url, options=tls or {})
    sink.open()
    store.open()
    with subscribe(reader_url or url, timeout_s=30.0) as listener:
        sink.ping()
        sink.send([outgoing("gate", 0), stored("yard", 0), outgoing("door", 0)])
        assert sorted(next(listener).stream for _ in range(3)) == ["door", "gate", "yard"]
    store.ping()
    for stream in STREAMS[1:2] + STREAMS[3:]:
        store.store(entries(stream, *range(50)))
        store.store(entries(stream, *range(40, 60)))
        assert seqs_of(reader_url or url, stream, 60) == list(range(60))
    assert seqs_of(reader_url or url, "gate", 1) == [0]
    with subscribe(reader_url or url, since="0", timeout_s=30.0) as everything:
        received = [next(everything) for _ in range(122)]
    assert {message.stream for message in received} == set(STREAMS)
    sink.close()
    store.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_port(certificates: Certificates) -> Iterator[int]:
    with tls_redis(certificates) as port:
        yield port


def test_tls_with_an_authority_and_a_client_certificate(tls_port: int, certificates: Certificates) -> None:
    url = f"rediss://127.0.0.1:{tls_port}/0"
    tls = {"ssl_ca_certs": certificates.ca, "ssl_certfile": certificates.certificate, "ssl_keyfile": certificates.key}
    options = {name: str(path) for name, path in tls.items()}
    check_both_ways(url, options, url + "?" + "&".join(f"{name}={path}" for name, path in options.items()))


def test_tls_without_the_authority_is_refused(tls_port: int) -> None:
    with pytest.raises(SubscribeError, match="certificate verify failed"):
        subscribe(f"rediss://127.0.0.1:{tls_port}/0")


def test_an_acl_user_may_do_what_it_needs_and_no_more(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        channels = ["&streamd:*", "&streamd:*:detections"]  # a pattern is compared as it is written
        rights = [
            "+xadd",
            "+xtrim",
            "+publish",
            "+multi",
            "+exec",
            "+ping",
            "+xread",
            "+scan",
            "+psubscribe",
            "+subscribe",
        ]
        client.execute_command("ACL", "SETUSER", "camera", "on", ">p@ss:word", "~streamd:*", *channels, *rights)
    url = f"redis://camera:p%40ss%3Aword@127.0.0.1:{redis_server.port}/0"
    check_both_ways(url)
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "camera", "-xadd")
    store = RedisStore(url)
    store.open()
    with pytest.raises(PublishError, match="allow it with ACL SETUSER") as raised:
        store.store(entries("gate", 0))
    assert "captured_at" not in str(raised.value) and "p@ss" not in str(raised.value)
    store.close()


def test_a_sentinel_names_the_primary_before_and_after_a_fail_over() -> None:
    with sentinel_redis(password="sesame-open") as case:
        check_both_ways(case.url)
        store = RedisStore(case.url)
        store.open()
        store.store(entries("late", 0, 1))
        with redis.Redis(port=case.primary_port, password="sesame-open") as client:
            client.wait(1, 10_000)  # the replica has it: what it had not, a fail-over loses
        case.primary.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(PublishError):
                store.store(entries("late", 1, 2))
                break
            time.sleep(0.1)
        store.close()
        with redis.Redis(port=case.replica_port, password="sesame-open") as client:
            assert client.xlen("streamd:late") == 4
        assert seqs_of(case.url, "late", 3) == [0, 1, 2]


def test_sentinels_may_ask_for_a_login_of_their_own() -> None:
    with sentinel_redis(password="sesame-open", sentinel_password="s3ntinel@pass") as case:
        login = {"sentinel_password": "s3ntinel@pass"}
        check_both_ways(case.url, login, f"{case.url}?sentinel_username=default&sentinel_password=s3ntinel%40pass")
        for wrong in ({}, {"sentinel_password": "wrong-wrong"}):
            sink = RedisSink(case.url, options=wrong)
            sink.open()
            with pytest.raises(PublishError, match="the sentinels refuse the login") as raised:
                sink.ping()
            assert "wrong-wrong" not in str(raised.value) and len(str(raised.value)) < 300
            sink.close()


def test_a_sentinel_that_knows_no_such_service_is_told() -> None:
    with sentinel_redis() as case:
        sink = RedisSink(case.url.replace("mymaster", "other"))
        sink.open()
        with pytest.raises(PublishError, match="is the service's name right"):
            sink.ping()
        sink.close()


def test_a_cluster_keeps_each_stream_on_its_own_node() -> None:
    with cluster_redis() as url:
        check_both_ways(url)


def test_a_cluster_that_is_not_there_is_told() -> None:
    sink = RedisSink("redis+cluster://127.0.0.1:1")
    sink.open()
    with pytest.raises(PublishError, match="cannot publish on"):
        sink.ping()
    sink.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:26379,i:26380/svc",
        "rediss+sentinel://u:p%40@h/svc/3?ssl_ca_certs=/ca.crt&sentinel_username=u&sentinel_password=p",
        "redis+cluster://h:1,[::1]:2",
        "redis+cluster://:p@h",
    ],
)
def test_urls_of_all_kinds_are_read(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:26379",
        "redis+sentinel:///svc",
        "redis+sentinel://h/svc/0/1",
        "redis+cluster://h/3",
        "redis+cluster://h,",
        "redis+cluster://h:port",
        "redis+ring://h",
        "unix+cluster://h",
        "redis+cluster://h?ssl_cert_reqs=none",
        "redis+cluster://h?sentinel_password=p",
    ],
)
def test_a_wrong_url_says_the_forms(url: str) -> None:
    with pytest.raises(ValueError, match="the URL must read like"):
        check_url(url)


def test_a_message_of_the_samples_is_what_is_read(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url)
    store.open()
    store.store(entries("gate", 7))
    with subscribe(redis_server.url, "gate", since="0", timeout_s=30.0) as messages:
        assert next(messages) == make_message("gate", 7)
    store.close()
