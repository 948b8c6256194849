"""Redis for both ends: a client that does not retry by itself, and what its errors mean."""

from __future__ import annotations

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from streamd.redact import redact, register_url

CONNECT_TIMEOUT_S = 2.0

# In this order: in redis-py a refused password and a server that still loads are also connection errors.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (redis.AuthenticationError, "Redis refuses the user or password; correct the URL"),
    (redis.exceptions.NoPermissionError, "this user may not do that; allow it with ACL SETUSER"),
    (redis.BusyLoadingError, "Redis still loads its data"),
    (redis.TimeoutError, "Redis does not answer in time"),
    (redis.ReadOnlyError, "this Redis is a read-only replica; give the URL of the primary"),
    (redis.exceptions.OutOfMemoryError, "Redis is out of memory; raise its maxmemory or lower max_len"),
    (redis.ConnectionError, "no connection; is redis-server running and reachable from here?"),
)


def make_client(url: str, reply_timeout_s: float) -> redis.Redis:
    """Return a client that connects on its first command; raise ValueError with advice where the URL is wrong."""
    register_url(url)
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=reply_timeout_s,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),  # both ends retry themselves, and can be stopped while they wait
            protocol=2,
        )
    except (ValueError, TypeError):
        # Without the cause: urllib quotes pieces of a password that is not percent-encoded.
        raise ValueError(
            "the URL must read like redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://... or unix:///PATH, "
            "with the special characters of a password percent-encoded"
        ) from None


def explain(err: Exception) -> str:
    """Say what an error of redis-py means and what to do."""
    advice = next((advice for kind, advice in _ADVICE if isinstance(err, kind)), None)
    return redact(f"{advice} ({err})" if advice else str(err))
