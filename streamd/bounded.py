"""Read files from outside without trusting their size, and YAML without trusting what it unfolds to."""

from __future__ import annotations

import errno
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_MERGES = 64  # of maps into one map
MAX_PAIRS = 100_000  # of keys and values in one map, once others are merged into it
MAX_NUMBER = 400  # characters; YAML's numbers to the base 60 take time by the square of their length


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file. Raises OSError, also where there is more than `max_bytes`."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {_as_text(max_bytes)}", str(path))
    return content


def _as_text(num_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >> shift:
            return f"{num_bytes >> shift} {unit}"
    return f"{num_bytes} bytes"


class PlainLoader(yaml.SafeLoader):
    """Build plain values; what a few lines would unfold to without end is an error of YAML."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        num = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if num > MAX_MERGES:
            raise yaml.constructor.ConstructorError(
                problem=f"{num} maps are merged into one, and {MAX_MERGES} is the limit", problem_mark=node.start_mark
            )
        super().flatten_mapping(node)
        if len(node.value) > MAX_PAIRS:
            raise yaml.constructor.ConstructorError(
                problem=f"a map has more than {MAX_PAIRS} keys", problem_mark=node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        try:
            return super().construct_mapping(node, deep)
        except TypeError as err:  # a key that holds a list is hashable by its type and not by its value
            raise yaml.constructor.ConstructorError(problem="a key is no word", problem_mark=node.start_mark) from err

    def plain_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise yaml.constructor.ConstructorError(
                problem="half of a character", problem_mark=node.start_mark
            ) from err
        return text

    def plain_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > MAX_NUMBER:
            raise yaml.constructor.ConstructorError(
                problem=f"a number of {len(node.value)} characters", problem_mark=node.start_mark
            )
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


PlainLoader.add_constructor("tag:yaml.org,2002:str", PlainLoader.plain_text)
for _kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainLoader.plain_number)
