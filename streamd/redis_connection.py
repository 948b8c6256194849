"""Redis for both ends: one server, Sentinel or Cluster behind one URL, and what the errors mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from streamd.redact import redact, register_url

Client: TypeAlias = redis.Redis | RedisCluster
REDIS_ERRORS = (redis.RedisError, redis.exceptions.RedisClusterException)  # the latter is none of the former

_NONE: Mapping[str, str] = MappingProxyType({})
CONNECT_TIMEOUT_S = 2.0
NUM_CLUSTER_RETRIES = 3  # within one command: redis-py learns the new layout of a cluster by failing once

_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "db", "username", "password"}
_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}
_FORM = (
    "the URL must read like redis://[USER:PASSWORD@]HOST[:PORT][/DB], unix:///PATH, "
    "redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/SERVICE[/DB] or redis+cluster://[USER:PASSWORD@]HOST:PORT, "
    "or rediss... for TLS, with the special characters of a password percent-encoded"
)

# In this order: in redis-py a refused password and a server that still loads are also connection errors.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (redis.AuthenticationError, "Redis refuses the user or password; correct the URL"),
    (redis.exceptions.NoPermissionError, "this user may not do that; allow it with ACL SETUSER"),
    (redis.BusyLoadingError, "Redis still loads its data"),
    (redis.TimeoutError, "Redis does not answer in time"),
    (redis.ReadOnlyError, "this Redis is a read-only replica; give the URL of the primary"),
    (redis.exceptions.OutOfMemoryError, "Redis is out of memory; raise its maxmemory or lower max_len"),
    (redis.sentinel.MasterNotFoundError, "no sentinel knows a primary by that name; is the service's name right?"),
    (redis.exceptions.RedisClusterException, "the cluster does not answer; is it up, and are all slots covered?"),
    (redis.ConnectionError, "no connection; is redis-server running and reachable from here?"),
)


def make_client(url: str, reply_timeout_s: float, options: Mapping[str, str] = _NONE) -> Client:
    """Return a client; raise ValueError with advice where the URL is wrong.

    It connects on its first command, but a Cluster's asks for the layout here and raises one of REDIS_ERRORS.
    `options` may have ssl_ca_certs, ssl_certfile and ssl_keyfile, and for the sentinels sentinel_username and
    sentinel_password; a URL may give them in its query too.
    """
    register_url(url)
    settings, hosts, service = _read(url)
    settings |= options
    asking_as = {name.removeprefix("sentinel_"): settings.pop(name) for name in _SENTINEL_OPTIONS & settings.keys()}
    settings |= {"socket_timeout": reply_timeout_s, "socket_connect_timeout": CONNECT_TIMEOUT_S, "protocol": 2}
    never = Retry(NoBackoff(), 0)  # both ends retry themselves, and can be stopped while they wait
    kind = url.partition("://")[0].lower().partition("+")[2]
    if not kind:
        pool = redis.ConnectionPool(**settings, retry=never)
        return redis.Redis.from_pool(pool)
    uses_tls = settings.pop("connection_class", None) is not None
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in hosts]
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), NUM_CLUSTER_RETRIES)
        if uses_tls:
            settings["ssl"] = True
        return RedisCluster(startup_nodes=nodes, retry=retry, **settings)
    asking = {name: value for name, value in settings.items() if name.startswith(("socket_", "ssl_", "protocol"))}
    sentinel = Sentinel(hosts, sentinel_kwargs={**asking, **asking_as, "ssl": uses_tls, "retry": never}, **settings)
    client: redis.Redis = sentinel.master_for(service, ssl=uses_tls, retry=never)
    return client


def check_url(url: str) -> None:
    """Raise ValueError with advice where the URL is wrong; nothing is connected."""
    register_url(url)
    _read(url)


def explain(err: Exception) -> str:
    """Say what an error of redis-py means and what to do."""
    advice = next((advice for kind, advice in _ADVICE if isinstance(err, kind)), None)
    if isinstance(err, redis.sentinel.MasterNotFoundError):
        text, _, causes = str(err).partition(" : ")  # redis-py shows a page of each sentinel's settings here
        if "AuthenticationError" in causes:
            advice = "the sentinels refuse the login; correct sentinel_username and sentinel_password"
        return redact(f"{advice} ({text})")
    return redact(f"{advice} ({err})" if advice else str(err))


def _read(url: str) -> tuple[dict[str, Any], list[tuple[str, int]], str]:
    """Split a URL into redis-py's options, the hosts, and a Sentinel's service."""
    try:
        return _split(url)
    except (ValueError, TypeError):
        # Without the cause: urllib quotes pieces of a password that is not percent-encoded.
        raise ValueError(_FORM) from None


def _split(url: str) -> tuple[dict[str, Any], list[tuple[str, int]], str]:
    scheme, _, kind = url.partition("://")[0].lower().partition("+")
    if not kind:
        return parse_url(url), [], ""
    if scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
        raise ValueError("unknown scheme")
    parts = urlsplit(url)
    known = _OPTIONS | (_SENTINEL_OPTIONS if kind == "sentinel" else set())
    if unknown := set(parse_qs(parts.query)) - known:
        raise ValueError(f"unknown options {unknown}")
    login, at, names = parts.netloc.rpartition("@")
    hosts = [_host(name) for name in names.split(",")]
    path = parts.path.strip("/").split("/")
    service, database = (path[0], path[1:]) if kind == "sentinel" else ("", path)
    if (kind == "sentinel") != bool(service) or len(database) > 1 or (kind == "cluster" and database != [""]):
        raise ValueError("the path does not fit")
    # redis-py reads what the three kinds have in common: the login, the database and the query
    options = parse_url(f"{scheme}://{login}{at}host/{''.join(database)}?{parts.query}")
    del options["host"]
    return options, hosts, service


def _host(name: str) -> tuple[str, int]:
    parts = urlsplit(f"//{name}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or 6379
