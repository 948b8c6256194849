"""What counts as a change, and of what."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.changes import Changes, Names, difference
from streamd.config import Config

TREE: dict[str, Any] = {
    "models": {"people": {"path": "a.pt"}, "cars": {"path": "b.pt"}},
    "streams": {
        "gate": {"url": "rtsp://u:secret@10.0.0.1/1", "model": "people"},
        "yard": {"url": "rtsp://10.0.0.2/1", "model": "people"},
        "road": {"url": "rtsp://10.0.0.3/1", "model": "cars"},
    },
    "publish": {"zeromq": {"bind": "tcp://127.0.0.1:5555"}},
}
KEY, OTHER_KEY = "0" * 40, "1" * 40
WITH_KEYS = {"publish": {"zeromq": {"curve": {"secret_key": KEY, "clients": {"dashboard": KEY}}}}}


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge a tree into another; the text "gone" removes a key."""
    result = dict(tree)
    for key, value in changes.items():
        if value == "gone":
            del result[key]
        else:
            result[key] = merged(result.get(key) or {}, value) if isinstance(value, dict) else value
    return result


def changes_by(changes: dict[str, Any]) -> Changes:
    return difference(Config.model_validate(TREE), Config.model_validate(merged(TREE, changes)))


def test_the_same_configuration_makes_no_changes() -> None:
    assert not changes_by({})
    assert str(changes_by({})) == "nothing changed"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"streams": {"door": {"url": "a.mp4", "model": "cars"}}}, Changes(streams=Names(added=("door",)))),
        ({"streams": {"yard": "gone"}}, Changes(streams=Names(removed=("yard",)))),
        ({"streams": {"yard": {"fps": 5}}}, Changes(streams=Names(changed=("yard",)))),
        ({"streams": {"gate": {"url": "rtsp://u:other@10.0.0.1/1"}}}, Changes(streams=Names(changed=("gate",)))),
        ({"streams": {"gate": {"model": "cars"}}}, Changes(moved=("gate",))),
        ({"streams": {"gate": {"model": "cars", "fps": 5}}}, Changes(streams=Names(changed=("gate",)))),
        (
            {"models": {"people": {"path": "new.pt"}}},
            Changes(moved=("gate", "yard"), models=Names(changed=("people",))),
        ),
        ({"models": {"dogs": {"path": "c.pt"}}}, Changes(models=Names(added=("dogs",)))),
        ({"publish": {"redis": {"url": "redis://h"}}}, Changes(publishers=Names(added=("redis",)))),
        ({"publish": {"zeromq": None}}, Changes(publishers=Names(removed=("zeromq",)))),
        ({"publish": {"zeromq": {"bind": "tcp://127.0.0.1:1"}}}, Changes(publishers=Names(changed=("zeromq",)))),
        ({"publish": {"zeromq": {"high_water_mark": 5}}}, Changes(at_restart=("publish.zeromq.high_water_mark",))),
        ({"publish": {"queue_size": 5}}, Changes(followed=("publish.queue_size",))),
        ({"publish": {"format": "msgpack"}}, Changes(followed=("publish.format",))),
        ({"metrics": {"log_interval_s": 5.0}}, Changes(followed=("metrics.log_interval_s",))),
        ({"metrics": {"listen": None}}, Changes(at_restart=("metrics.listen",))),
        ({"control": None}, Changes(at_restart=("control",))),
        ({"control": {"path": "/run/other.sock"}}, Changes(at_restart=("control.path",))),
    ],
)
def test_each_change_is_told_as_what_it_is(changes: dict[str, Any], expected: Changes) -> None:
    assert changes_by(changes) == expected


def test_who_may_subscribe_is_followed_and_other_keys_wait_for_a_restart() -> None:
    before = merged(TREE, WITH_KEYS)

    def changes_to(curve: dict[str, Any] | None) -> Changes:
        after = merged(before, {"publish": {"zeromq": {"curve": curve}}})
        return difference(Config.model_validate(before), Config.model_validate(after))

    clients = "publish.zeromq.curve.clients"
    assert changes_to({"clients": {"dashboard": OTHER_KEY}}) == Changes(followed=(clients,))
    assert changes_to({"secret_key": OTHER_KEY, "clients": {"phone": KEY}}) == Changes(
        followed=(clients,), at_restart=("publish.zeromq.curve.secret_key",)
    )
    assert changes_to(None) == Changes(at_restart=("publish.zeromq.curve",))
    assert str(changes_to({"secret_key": OTHER_KEY})) == "waits for a restart: publish.zeromq.curve.secret_key"


def test_a_model_that_comes_first_now_moves_the_streams_that_name_none() -> None:
    one = Config.model_validate({"models": {"a": {"path": "a.pt"}}, "streams": {"gate": {"url": "a.mp4"}}})
    other = Config.model_validate({"models": {"b": {"path": "b.pt"}}, "streams": {"gate": {"url": "a.mp4"}}})
    assert difference(one, other) == Changes(moved=("gate",), models=Names(added=("b",), removed=("a",)))


def test_the_words_hold_every_change_and_no_secret() -> None:
    changes = changes_by(
        {
            "models": {"people": {"path": "new.pt"}},
            "streams": {
                "yard": "gone",
                "gate": {"url": "rtsp://u:other@10.0.0.1/1"},
                "door": {"url": "a", "model": "cars"},
            },
            "publish": {"redis": {"url": "redis://:hidden@h"}, "format": "msgpack"},
            "control": None,
        }
    )
    assert str(changes) == (
        "streams added: door; streams changed: gate; streams removed: yard; models changed: people; "
        "publishers added: redis; changed: publish.format; waits for a restart: control"
    )
