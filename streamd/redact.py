"""Keep passwords out of logs, errors and statuses: the one place through which such text passes."""

from __future__ import annotations

import logging
import re
import threading
from urllib.parse import unquote

MASK = "***"
MIN_SECRET_LENGTH = 4  # a shorter value would blank out half of every line, and show itself by that

# Passwords are not always percent-encoded as they should be, so everything up to the last @ of the word is hidden:
# rather too much than a piece of the password.
_URL_PASSWORD = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://[^\s:/]*:)\S*@", re.IGNORECASE)
_QUERY_PASSWORD = re.compile(
    r"(?P<before>[?&](?:sentinel_)?(?:password|passwd|passphrase|pass|pwd|psw|token|secret|api_?key|auth)=)"
    r"(?P<value>[^&\s\"'<>]+)",
    re.IGNORECASE,
)
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://[^:/]*:(?P<password>.*)@", re.IGNORECASE | re.DOTALL)

_secrets: set[str] = set()
_secrets_lock = threading.Lock()
_secrets_pattern: re.Pattern[str] | None = None


def register_secret(value: str) -> None:
    """Hide `value` in all text from now on, for the life of the process. Values under four characters are ignored."""
    global _secrets_pattern
    if len(value) < MIN_SECRET_LENGTH:
        return
    with _secrets_lock:
        _secrets.add(value)
        longest_first = sorted(_secrets, key=len, reverse=True)  # a secret may be part of another
        _secrets_pattern = re.compile("|".join(re.escape(secret) for secret in longest_first))


def passwords_in(url: str) -> list[str]:
    """List the passwords of a URL, as written: that of its login, and those of its query."""
    found = _URL.match(url)
    login = [found["password"]] if found else []
    return login + [query["value"] for query in _QUERY_PASSWORD.finditer(url)]


def register_url(url: str) -> None:
    """Register the passwords of a URL, as written and percent-decoded: libraries quote either in their errors."""
    for password in passwords_in(url):
        register_secret(password)
        register_secret(unquote(password))


def redact(text: str) -> str:
    """Replace by *** the registered secrets and the password of every URL in `text`."""
    pattern = _secrets_pattern
    if pattern is not None:
        text = pattern.sub(MASK, text)
    text = _URL_PASSWORD.sub(rf"\g<before>{MASK}@", text)
    return _QUERY_PASSWORD.sub(rf"\g<before>{MASK}", text)


class RedactingFormatter(logging.Formatter):
    """Format as logging does, then redact: message, arguments and traceback alike."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
