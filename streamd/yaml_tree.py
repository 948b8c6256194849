"""Build plain values from YAML and remember where each stands; anchors, aliases and merge keys work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import yaml

from streamd.errors import ConfigError

Place = tuple[str | int, ...]  # keys from the root to a value

_MAX_DEPTH = 20  # a configuration has five levels
_MAX_VALUES = 100_000  # a few lines of aliases of aliases stand for billions of values
_MAX_INT_BITS = 63
_MAX_NUMBER = 400  # characters; numbers to the base 60 take time by the square of their length
_MERGE_TAG = "tag:yaml.org,2002:merge"


class YamlTree:
    """The values of one YAML document and the line of each."""

    def __init__(
        self, text: str, complain: Callable[[Place, str], None], expected: str = "models: and streams:"
    ) -> None:
        """Read `text`. `complain` hears of values that cannot be read; ConfigError if nothing can.

        `expected` are the first keys that a whole file has, for the error.
        """
        self.lines: dict[Place, int] = {}
        self._complain = complain
        self._num_values = 0
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if not isinstance(root, yaml.MappingNode):
                got = "nothing" if root is None else "no map"
                raise ConfigError(f"expected the keys {expected}, got {got}")
            self.root = self._mapping(root, ())
        except RecursionError:
            raise ConfigError("not valid YAML: nested too deeply; does an anchor contain itself?") from None
        except yaml.YAMLError as err:
            mark = getattr(err, "problem_mark", None)
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise ConfigError(f"not valid YAML: {where}{getattr(err, 'problem', None) or err}") from err

    def line_of(self, place: Place) -> int:
        """Give the line of a value, or of what should hold it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def _value(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        self._count(node)
        if len(place) > _MAX_DEPTH:
            raise RecursionError
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*place, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        """Build a map: its own keys win over merged ones, and earlier merged maps over later ones."""
        values: dict[str, Any] = {}
        for merged in reversed(list(self._merged_maps(node, place))):
            self._count(merged)
            values |= self._mapping(merged, place)
        own: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value.isprintable():
                self._complain(
                    place, f"a list, map or control character is no key (line {line}); quote it if it is text"
                )
                continue
            key = key_node.value  # as written: a stream may be called 1, no or 2026-01-31
            self.lines[*place, key] = line
            if key in own:
                self._complain((*place, key), "stands twice; a name may be used once")
                continue
            own.add(key)
            values[key] = self._value(value_node, (*place, key))
        return values

    def _count(self, node: yaml.Node) -> None:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values", problem_mark=node.start_mark)

    def _merged_maps(self, node: yaml.MappingNode, place: Place) -> Iterator[yaml.MappingNode]:
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE_TAG:
                continue
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if isinstance(source, yaml.MappingNode):
                    yield source
                else:
                    self._complain((*place, "<<"), "merges a map (*name) or a list of maps, and this is neither")

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > _MAX_NUMBER:
            self._complain(place, f"cannot be read: a number of {len(node.value)} characters; quote it if it is text")
            return None
        try:
            return _checked(yaml.constructor.SafeConstructor().construct_object(node))
        except yaml.MarkedYAMLError as err:
            self._complain(place, f"cannot be read: {err.problem}")
        except (ValueError, LookupError, AttributeError, ArithmeticError) as err:  # PyYAML lets these through
            self._complain(place, f"cannot be read: {err}; quote it if it is text")
        return None


def _checked(value: Any) -> Any:
    """Let through what can be printed. Raises ValueError."""
    if isinstance(value, str):
        value.encode()  # an escape such as "\ud800" is half a character
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        raise ValueError("too large a number")
    return value
