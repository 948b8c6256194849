"""No password comes through, however the user wrote it; what is no secret stays readable."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd import redact as redact_module
from streamd.redact import RedactingFormatter, redact, register_secret, register_url


@pytest.fixture(autouse=True)
def no_registered_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact_module, "_secrets", set())
    monkeypatch.setattr(redact_module, "_secrets_pattern", None)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("rtsp://admin:hunter2@10.0.0.7:554/live", "rtsp://admin:***@10.0.0.7:554/live"),
        ("redis://:hunter2@localhost:6379/0", "redis://:***@localhost:6379/0"),
        ("rtsp://admin:p@ss/w#r?d:x@cam/live", "rtsp://admin:***@cam/live"),
        ("rtsp://ops@example.org:hunter2@cam/live", "rtsp://ops@example.org:***@cam/live"),
        ("rtsp://admin:hunter2@[::1]:554/live", "rtsp://admin:***@[::1]:554/live"),
        ("rtsp://admin:p%40ss@cam/live", "rtsp://admin:***@cam/live"),
        ("cannot open 'rtsp://a:b@cam/1': 401; see http://wiki/cams", "cannot open 'rtsp://a:***@cam/1': 401; see http://wiki/cams"),
        ("http://cam/mjpg?user=admin&pwd=hunter2&fps=5", "http://cam/mjpg?user=admin&pwd=***&fps=5"),
        ("two: rtsp://a:b@x and rtsp://c:d@y", "two: rtsp://a:***@x and rtsp://c:***@y"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_hidden(text: str, clean: str) -> None:
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "tcp://*:5555",
        "rtsp://cam:554/live",
        "rtsp://[::1]:554/live",
        "rtsp://token@cam:554/live",
        "mail to ops@example.org: now",
        "10:30 gate",
    ],
)
def test_text_without_a_password_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(st.characters(exclude_categories=("Z", "C")), min_size=1))
def test_no_password_without_spaces_survives_in_a_url(password: str) -> None:
    assert redact(f"open rtsp://admin:{password}@cam/live failed") == "open rtsp://admin:***@cam/live failed"


def test_registered_secrets_are_hidden_anywhere_the_longest_first() -> None:
    register_secret("hunter2")
    register_secret("hunter2-and-more")
    assert redact("token hunter2-and-more, then (hunter2)") == "token ***, then (***)"


def test_a_short_value_is_not_registered() -> None:
    register_secret("1")
    register_secret("")
    assert redact("11 frames") == "11 frames"


def test_a_registered_url_hides_its_password_as_written_and_decoded() -> None:
    register_url("redis://user:my p%40ss@host/0")
    assert redact("refused my p%40ss, refused my p@ss") == "refused ***, refused ***"


def test_the_formatter_redacts_message_arguments_and_traceback() -> None:
    formatter = RedactingFormatter("%(message)s")
    err = ValueError("bad rtsp://a:hunter2@cam")
    info = (ValueError, err, None)
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "gate: %s", ("rtsp://a:hunter2@cam",), info)

    text = formatter.format(record)

    assert "hunter2" not in text and text.count("rtsp://a:***@cam") == 2
