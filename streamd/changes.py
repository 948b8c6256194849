"""What is different between two configurations, in the terms in which a running daemon can follow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel

from streamd.config import Config, ModelConfig, PublishConfig, StreamConfig

_PUBLISHERS = ("zeromq", "redis")
_FOLLOWED = {("publish", "queue_size"), ("publish", "format"), ("metrics", "log_interval_s")}
_FOLLOWED |= {("publish.zeromq.curve", "clients")}
_OF_NEXT_VERSION = ("gate", "probation_s")  # keys of a model that are read when it is next replaced
_SAID_AS_PUBLISHERS = {("publish", name) for name in _PUBLISHERS}


@dataclass(frozen=True, slots=True)
class Names:
    """Which entries of a section are new, gone, or different, in the order of the files."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def describe(self, kind: str) -> list[str]:
        """Say each kind of change in a few words: `streams added: gate, yard`."""
        groups = (("added", self.added), ("changed", self.changed), ("removed", self.removed))
        return [f"{kind} {verb}: {', '.join(names)}" for verb, names in groups if names]


@dataclass(frozen=True, slots=True)
class Changes:
    """The way from one configuration to another."""

    streams: Names = Names()  # changed ones connect anew
    moved: tuple[str, ...] = ()  # streams that only get another model, or another version of it: they stay connected
    models: Names = Names()
    publishers: Names = Names()
    followed: tuple[str, ...] = ()  # other keys, by their place, that apply at once
    at_restart: tuple[str, ...] = ()  # keys, by their place, that wait for the daemon's next start
    notes: tuple[str, ...] = ()  # what else there is to say of them

    def __bool__(self) -> bool:
        return self != Changes()

    def __str__(self) -> str:
        said = self.streams.describe("streams") + self.models.describe("models")
        said += self.publishers.describe("publishers")
        if self.moved:
            said.append(f"streams moved to another model: {', '.join(self.moved)}")
        if self.followed:
            said.append(f"changed: {', '.join(self.followed)}")
        if self.at_restart:
            said.append(f"waits for a restart: {', '.join(self.at_restart)}")
        return "; ".join((*said, *self.notes)) or "nothing changed"


def difference(old: Config, new: Config, replaced: Collection[str] = ()) -> Changes:
    """Compare two configurations. `defaults:` counts only through the streams that have a value from it.

    `replaced` names the models whose path means another file by now.
    """
    models = _names(*({name: _at_work(one) for name, one in tree.models.items()} for tree in (old, new)))
    anew = tuple(name for name in new.models if name in models.changed or (name in old.models and name in replaced))
    models = replace(models, changed=anew)
    kept = [name for name in new.streams if name in old.streams]
    changed = tuple(name for name in kept if not _is_same_camera(old.streams[name], new.streams[name]))
    moved = tuple(
        name
        for name in kept
        if name not in changed and (new.model_of(name) in models.changed or old.model_of(name) != new.model_of(name))
    )
    streams = _names(old.streams, new.streams)
    others = [key for key in Config.model_fields if key not in ("defaults", "models", "streams")]
    places = [place for key in others for place in _different_keys(key, getattr(old, key), getattr(new, key))]
    if _has_same_port(old.publish, new.publish):
        places += _different_zeromq(old.publish, new.publish)
    followed = [place for place in places if place in _FOLLOWED] + _gates(old.models, new.models)
    return Changes(
        streams=Names(streams.added, changed, streams.removed),
        moved=moved,
        models=models,
        publishers=_publishers(old.publish, new.publish),
        followed=tuple(".".join(place) for place in followed),
        at_restart=tuple(".".join(filter(None, place)) for place in places if place not in _FOLLOWED),
    )


def _names(old: Mapping[str, object], new: Mapping[str, object]) -> Names:
    return Names(
        added=tuple(name for name in new if name not in old),
        changed=tuple(name for name in new if name in old and new[name] != old[name]),
        removed=tuple(name for name in old if name not in new),
    )


def _at_work(model: ModelConfig) -> ModelConfig:
    """Leave out what concerns only the next version."""
    return model.model_copy(update=dict.fromkeys(_OF_NEXT_VERSION))


def _gates(old: Mapping[str, ModelConfig], new: Mapping[str, ModelConfig]) -> list[tuple[str, ...]]:
    kept = [name for name in new if name in old]
    return [
        ("models", name, key)
        for name in kept
        for key in _OF_NEXT_VERSION
        if getattr(old[name], key) != getattr(new[name], key)
    ]


def _is_same_camera(old: StreamConfig, new: StreamConfig) -> bool:
    return old.model_copy(update={"model": None}) == new.model_copy(update={"model": None})


def _publishers(old: PublishConfig, new: PublishConfig) -> Names:
    """Compare the publishers. A port can be bound only once: one that stays on its port keeps its old settings."""
    names = _names(*({name: one for name in _PUBLISHERS if (one := getattr(tree, name))} for tree in (old, new)))
    if not _has_same_port(old, new):
        return names
    return Names(names.added, tuple(name for name in names.changed if name != "zeromq"), names.removed)


def _has_same_port(old: PublishConfig, new: PublishConfig) -> bool:
    return old.zeromq is not None and new.zeromq is not None and old.zeromq.bind == new.zeromq.bind


def _different_zeromq(old: PublishConfig, new: PublishConfig) -> list[tuple[str, str]]:
    assert old.zeromq is not None and new.zeromq is not None, "they have the same port"
    places = _different_keys("publish.zeromq", old.zeromq, new.zeromq)
    curve = ("publish.zeromq", "curve")
    if curve in places:
        places.remove(curve)
        places += _different_keys("publish.zeromq.curve", old.zeromq.curve, new.zeromq.curve)
    return places


def _different_keys(section: str, old: BaseModel | None, new: BaseModel | None) -> list[tuple[str, str]]:
    if old is None or new is None:
        return [] if old == new else [(section, "")]
    keys = [key for key in type(new).model_fields if getattr(old, key) != getattr(new, key)]
    return [(section, key) for key in keys if (section, key) not in _SAID_AS_PUBLISHERS]
