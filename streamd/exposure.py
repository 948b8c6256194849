"""Find what a configuration shows to who should not see it: warnings, since some networks and machines are trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from streamd.addresses import is_loopback
from streamd.config import Config, RedisConfig
from streamd.redact import MIN_SECRET_LENGTH, passwords_in


def secrets_of(config: Config) -> Iterator[str]:
    """Yield every password and key, wherever it came from."""
    for stream in config.streams.values():
        yield from passwords_in(stream.url.get_secret_value())
    redis, zeromq = config.publish.redis, config.publish.zeromq
    if redis:
        yield from passwords_in(redis.url.get_secret_value())
        if redis.sentinel_password:
            yield redis.sentinel_password.get_secret_value()
    if zeromq and zeromq.curve:
        yield zeromq.curve.secret_key.get_secret_value()


def exposures(config: Config, text: str, path: Path) -> Iterator[str]:
    """Say, one sentence each, what is exposed by a configuration that was read as `text` from `path`."""
    is_written = any(len(secret) >= MIN_SECRET_LENGTH and secret in text for secret in secrets_of(config))
    if is_written and is_for_everybody(path):
        yield f"{path} holds a password and every user of this machine may read it: chmod o-r it, or use ${{file:PATH}}"
    if config.publish.redis and _sends_password_in_clear(config.publish.redis):
        yield "publish.redis: the password crosses the network in the clear; use rediss:// where others can listen"


def is_for_everybody(file: Path | int) -> bool:
    """Tell whether every user of this machine may read a file, by its own mode; False where it cannot be asked."""
    try:
        return bool(os.stat(file).st_mode & stat.S_IROTH)
    except OSError:
        return False


def _sends_password_in_clear(redis: RedisConfig) -> bool:
    scheme, _, rest = redis.url.get_secret_value().partition("://")
    has_password = redis.sentinel_password is not None or any(passwords_in(redis.url.get_secret_value()))
    return has_password and scheme.startswith("redis") and scheme[:6] != "rediss" and not _is_local(rest)


def _is_local(rest: str) -> bool:
    """Judge the hosts of a Redis URL, of which Sentinel and Cluster have several."""
    hosts = rest.partition("?")[0].rpartition("@")[2].partition("/")[0].split(",")
    return all(is_loopback(_without_port(host)) for host in hosts)


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
