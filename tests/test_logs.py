"""One line an event on stderr, with a priority for the journal or a time for a terminal, and never a secret."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from streamd import logs, redact

logger = logging.getLogger("streamd.test")


@pytest.fixture(autouse=True)
def _root_logger_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_terminal_gets_time_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up()
    logger.warning("%s: %s", "gate", "stalled")
    captured = capsys.readouterr()
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING gate: stalled\n", captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_the_journal_gets_the_priority_and_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, level: str, priority: int
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    logs.set_up("debug")
    logger.log(getattr(logging, level.upper()), "gate: running")
    assert capsys.readouterr().err == f"<{priority}>gate: running\n"


def test_each_line_of_a_trace_has_its_priority(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    logs.set_up()
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logger.exception("gate crashed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 4 and all(line.startswith("<3>") for line in lines)


@pytest.mark.parametrize("journal", ["", "8:1234"])
def test_no_secret_gets_into_the_log_not_even_in_a_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    monkeypatch.setattr(redact, "_secrets", set())
    monkeypatch.setattr(redact, "_secrets_pattern", None)
    monkeypatch.setenv("JOURNAL_STREAM", journal)
    redact.register_secret("swordfish")
    logs.set_up()
    logger.info("%s: connecting to %s", "gate", "rtsp://viewer:hunter22@camera/1")
    logger.info("the secret is swordfish")
    try:
        raise ValueError("cannot open redis://:hunter22@localhost with swordfish")
    except ValueError:
        logger.exception("gate crashed")
    text = capsys.readouterr().err
    assert "hunter22" not in text and "swordfish" not in text
    assert "gate: connecting to rtsp://viewer:***@camera/1" in text


def test_what_is_below_the_level_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("error")
    logger.warning("not this")
    logger.error("but this")
    assert "not this" not in (text := capsys.readouterr().err) and "but this" in text


def test_setting_up_twice_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up()
    logs.set_up()
    logger.info("once")
    assert capsys.readouterr().err.count("once") == 1
